from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray.expressions import Expression, ExpressionError

NAN = float("nan")


def evaluate(text: str, **columns: list[float]) -> list[float | None]:
    """Values of an expression; missing is None."""
    out = Expression(text)({name: np.array(values, dtype=np.float64) for name, values in columns.items()})
    assert out.dtype == np.float64
    return [None if math.isnan(v) else v for v in out.tolist()]


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x < 2", [1, 0, 0, None]),
        ("x <= 2", [1, 1, 0, None]),
        ("x > 2", [0, 0, 1, None]),
        ("x >= 2", [0, 1, 1, None]),
        ("x == 2", [0, 1, 0, None]),
        ("x != 2", [1, 0, 1, None]),
        ("2 < x", [0, 0, 1, None]),
    ],
)
def test_comparisons_are_one_zero_or_missing(text: str, expected: list[float | None]) -> None:
    assert evaluate(text, x=[1, 2, 3, NAN]) == expected


def test_a_column_compares_with_a_column() -> None:
    assert evaluate("x > y", x=[1, 5, NAN, 2], y=[2, 4, 1, NAN]) == [0, 1, None, None]


# all nine pairs of (true, false, missing)
A = [1, 1, 1, 0, 0, 0, NAN, NAN, NAN]
B = [1, 0, NAN, 1, 0, NAN, 1, 0, NAN]


def test_and_is_false_as_soon_as_one_side_is_false() -> None:
    assert evaluate("a and b", a=A, b=B) == [1, 0, None, 0, 0, 0, None, 0, None]


def test_or_is_true_as_soon_as_one_side_is_true() -> None:
    assert evaluate("a or b", a=A, b=B) == [1, 1, 1, 1, 0, None, 1, None, None]


def test_not_keeps_what_is_missing() -> None:
    assert evaluate("not a", a=[1, 0, NAN, 5]) == [0, 1, None, 0]


def test_and_or_return_one_or_zero_and_not_the_operand() -> None:
    assert evaluate("a and 7", a=[3, 0]) == [1, 0]
    assert evaluate("a or 7", a=[3, 0]) == [1, 1]


def test_and_binds_stronger_than_or_and_not_stronger_than_both() -> None:
    assert evaluate("a or b and c", a=[1], b=[1], c=[0]) == [1]
    assert evaluate("(a or b) and c", a=[1], b=[1], c=[0]) == [0]
    assert evaluate("not a or b", a=[1], b=[1]) == [1]
    assert evaluate("not (a or b)", a=[1], b=[1]) == [0]


def test_chains_of_and_and_or_take_every_operand() -> None:
    assert evaluate("a and b and c", a=[1, 1, 1], b=[1, NAN, NAN], c=[1, 1, 0]) == [1, None, 0]
    assert evaluate("a or b or c", a=[0, 0, 0], b=[0, NAN, NAN], c=[0, 0, 1]) == [0, None, 1]


def test_present_is_never_missing() -> None:
    assert evaluate("present(x)", x=[0, 4, NAN]) == [1, 1, 0]
    assert evaluate("not present(x)", x=[0, 4, NAN]) == [0, 0, 1]
    assert evaluate("present(x + y)", x=[1, 1, NAN], y=[1, NAN, 1]) == [1, 0, 0]


def test_present_and_a_comparison_decide_for_rows_without_the_label() -> None:
    assert evaluate("click > 0 and present(rating)", click=[1, 1, 0, NAN], rating=[5, NAN, NAN, NAN]) == [1, 0, 0, 0]


def test_arithmetic_follows_the_usual_precedence_and_keeps_what_is_missing() -> None:
    assert evaluate("x + 2 * y - 1", x=[1, NAN, 1], y=[3, 3, NAN]) == [6, None, None]
    assert evaluate("(x + 2) * y", x=[1], y=[3]) == [9]
    assert evaluate("-x / 4", x=[6, NAN]) == [-1.5, None]
    assert evaluate("x - -x", x=[6]) == [12]


def test_division_by_zero_does_not_raise_and_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    assert evaluate("x / y", x=[1, -1, 0, 6], y=[0, 0, 0, 3]) == [math.inf, -math.inf, None, 2]
    assert evaluate("1 / 0 > 5", x=[1]) == [1]
    assert evaluate("x / 0 > 1 or x == 0", x=[0, 1]) == [1, 1]
    assert not recwarn.list


def test_a_constant_has_the_length_of_the_columns() -> None:
    assert evaluate("1 > 0", x=[7, NAN, 7]) == [1, 1, 1]
    assert evaluate("True", x=[7, 7]) == [1, 1]
    assert evaluate("x > 3", x=[]) == []


def test_the_columns_are_not_changed_and_not_handed_out() -> None:
    column = np.array([1.0, NAN])
    result = Expression("x")({"x": column})
    result[:] = 9
    assert column[0] == 1 and np.isnan(column[1])


def test_integer_and_boolean_columns_are_read_as_numbers() -> None:
    columns: dict[str, Any] = {"x": np.array([1, 5], dtype=np.int32), "b": np.array([True, False])}
    assert Expression("x > 2 or b")(columns).tolist() == [1, 1]


def test_names_are_the_labels_read_and_present_is_none_of_them() -> None:
    assert Expression("a > 1 and present(b) or 2 * c > a").names == {"a", "b", "c"}
    assert Expression("1 > 0").names == frozenset()


def test_further_columns_may_be_given_and_missing_ones_are_named() -> None:
    assert evaluate("x > 1", x=[2], other=[NAN]) == [1]
    with pytest.raises(ExpressionError, match="'x' is not a label"):
        evaluate("x > 1", y=[2])


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "text",
    [
        "abs(x)",
        "__import__('os')",
        "eval(x)",
        "x()",
        "present()",
        "present(x, y)",
        "present(x=x)",
        "present(*x)",
        "present.real(x)",
        "x.real",
        "x.__class__",
        "().__class__.__bases__",
        "'a'",
        "x == 'a'",
        "b'a'",
        "f'{x}'",
        "lambda: 1",
        "lambda x: x",
        "[x]",
        "(x, 1)",
        "{x}",
        "{x: 1}",
        "[y for y in x]",
        "x[0]",
        "x if x else 1",
        "(y := 1)",
        "x ** 9",
        "x % 2",
        "x // 2",
        "x @ x",
        "x & 1",
        "x << 1",
        "~x",
        "x is 1",
        "x in 1",
        "1 < x < 3",
        "1j",
        "None",
        "...",
        "await x",
    ],
)
def test_anything_but_comparisons_logic_and_arithmetic_is_refused_at_once(text: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(text)


@pytest.mark.parametrize(
    "text", ["", "   ", "x >", "x y", "x = 1", "x; y", "import os", "x > 1 # \n y", "(", "\0", "x >= 4 and", "§"]
)
def test_text_that_is_no_expression_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ExpressionError, match="is not an expression such as 'rating >= 4'"):
        Expression(text)


def test_a_refusal_behind_a_decided_side_is_still_a_refusal() -> None:
    with pytest.raises(ExpressionError, match=r"abs\(x\)"):
        Expression("0 and abs(x)")
    with pytest.raises(ExpressionError, match="'a'"):
        Expression("1 or present('a')")


def test_the_message_shows_the_expression_and_the_part() -> None:
    with pytest.raises(ExpressionError, match=r"'x > 1 and x\.real': 'x\.real' is not supported"):
        Expression("x > 1 and x.real")


@pytest.mark.parametrize(
    "text", ["x > 1" + "0" * 400, "not " * 3000 + "x", "-" * 20000 + "x"], ids=["huge number", "deep not", "deep minus"]
)
def test_numbers_too_large_and_nesting_too_deep_are_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(text)


# --------------------------------------------------------------------------- against plain Python

Missing = float | None
_NUMBERS = st.integers(-3, 3)
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}

_leaves = st.one_of(st.sampled_from(["a", "b", "c"]).map(lambda n: ("name", n)), _NUMBERS.map(lambda v: ("number", v)))
_trees = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.tuples(st.just("compare"), st.sampled_from(sorted(_COMPARISONS)), inner, inner),
        st.tuples(st.just("arithmetic"), st.sampled_from(sorted(_ARITHMETIC)), inner, inner),
        st.tuples(st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.sampled_from(["not", "minus", "present"]), inner),
    ),
    max_leaves=10,
)


def _text(tree: Any) -> str:
    match tree:
        case ("name" | "number", value):
            return str(value) if tree[0] == "name" or value >= 0 else f"({value})"
        case ("compare" | "arithmetic", op, left, right):
            return f"({_text(left)} {op} {_text(right)})"
        case ("and" | "or" as op, parts):
            return "(" + f" {op} ".join(_text(p) for p in parts) + ")"
        case ("not", inner):
            return f"(not {_text(inner)})"
        case ("minus", inner):
            return f"(-{_text(inner)})"
    return f"present({_text(tree[1])})"


def _python(tree: Any, row: dict[str, Missing]) -> Missing:
    """The same tree by plain Python on one row, with None for missing (Kleene's three-valued logic)."""
    match tree:
        case ("name", name):
            return row[name]
        case ("number", value):
            return value
        case ("compare" | "arithmetic" as kind, op, left, right):
            x, y = _python(left, row), _python(right, row)
            if x is None or y is None:
                return None
            return float(_COMPARISONS[op](x, y)) if kind == "compare" else _ARITHMETIC[op](x, y)
        case ("and", parts):
            values = [_python(p, row) for p in parts]
            return 0.0 if any(v == 0 for v in values) else None if None in values else 1.0
        case ("or", parts):
            values = [_python(p, row) for p in parts]
            return 1.0 if any(v not in (0, None) for v in values) else None if None in values else 0.0
        case ("not", inner):
            x = _python(inner, row)
            return None if x is None else float(x == 0)
        case ("minus", inner):
            x = _python(inner, row)
            return None if x is None else -x
    return float(_python(tree[1], row) is not None)


_values = st.one_of(st.none(), _NUMBERS)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(_trees, st.lists(st.fixed_dictionaries({"a": _values, "b": _values, "c": _values}), min_size=1, max_size=5))
def test_every_expression_equals_plain_python_row_by_row(tree: Any, rows: list[dict[str, Missing]]) -> None:
    columns = {name: [NAN if row[name] is None else float(row[name] or 0) for row in rows] for name in "abc"}
    assert evaluate(_text(tree), **columns) == [_python(tree, row) for row in rows]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab01 ()+-*/<>=!.,'\"[]{}:notadrpes\n\\#", max_size=20))
def test_any_text_is_an_expression_or_an_expression_error(text: str) -> None:
    try:
        expression = Expression(text)
    except ExpressionError:
        return
    assert len(expression({"a": np.zeros(3), **{n: np.zeros(3) for n in expression.names}})) == 3
