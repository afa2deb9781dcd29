"""Expressions over labels, such as `rating >= 4` or `click > 0 and present(rating)`.

Python's own grammar, cut down to comparisons, and/or/not, + - * /, numbers, names and `present(name)`.
Missing values (NaN) stay missing, except under `present` and where and/or are already decided.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class ExpressionError(ValueError):
    """An expression that cannot be used."""


_COMPARE: dict[type[ast.cmpop], Callable[[FloatArray, FloatArray], NDArray[np.bool_]]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[FloatArray, FloatArray], FloatArray]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
}


class Expression:
    """A parsed expression; `names` are the labels it reads."""

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._body = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            raise ExpressionError(f"{text!r} is not an expression such as 'rating >= 4'") from None
        self.names: frozenset[str] = frozenset(n.id for n in ast.walk(self._body) if isinstance(n, ast.Name) and n.id != "present")
        try:  # refuses what is not supported, before any data is read
            self({name: np.zeros(1) for name in self.names})
        except (RecursionError, MemoryError, OverflowError):
            raise ExpressionError(f"{text[:60]!r}…: too deep, or a number too large") from None

    @property
    def is_truth(self) -> bool:
        """Whether every value is 0, 1 or missing, by the form of the expression."""
        body = self._body
        negated = isinstance(body, ast.UnaryOp) and isinstance(body.op, ast.Not)
        return negated or isinstance(body, ast.Compare | ast.BoolOp | ast.Call)

    def __call__(self, columns: Mapping[str, FloatArray]) -> FloatArray:
        """Evaluate on columns of equal length -> float64, 1 true, 0 false, NaN missing."""
        with np.errstate(all="ignore"):
            value = np.asarray(self._eval(self._body, columns), dtype=np.float64)
        length = len(next(iter(columns.values()))) if columns else 1
        return np.broadcast_to(value, (length,)).copy()

    def _eval(self, node: ast.expr, columns: Mapping[str, FloatArray]) -> FloatArray:
        match node:
            case ast.Constant(value=bool() | int() | float()):
                return np.float64(node.value)  # type: ignore[arg-type, return-value]
            case ast.Name():
                if node.id not in columns:
                    raise ExpressionError(f"{self.text!r}: {node.id!r} is not a label")
                return np.asarray(columns[node.id], dtype=np.float64)
            case ast.Call(func=ast.Name(id="present"), args=[argument], keywords=[]):
                return (~np.isnan(self._eval(argument, columns))).astype(np.float64)
            case ast.UnaryOp(op=ast.Not()):
                value = self._eval(node.operand, columns)
                return np.where(np.isnan(value), np.nan, value == 0)
            case ast.UnaryOp(op=ast.USub()):
                return -self._eval(node.operand, columns)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return _ARITHMETIC[type(node.op)](self._eval(node.left, columns), self._eval(node.right, columns))
            case ast.Compare(ops=[op], comparators=[right_node]) if type(op) in _COMPARE:
                left, right = self._eval(node.left, columns), self._eval(right_node, columns)
                missing = np.isnan(left) | np.isnan(right)
                return np.where(missing, np.nan, _COMPARE[type(op)](left, right))
            case ast.BoolOp():
                values = [self._eval(v, columns) for v in node.values]
                decided = 0.0 if isinstance(node.op, ast.And) else 1.0
                truth = [np.where(np.isnan(v), np.nan, v != 0) for v in values]
                some_decided = np.any(np.broadcast_arrays(*[t == decided for t in truth]), axis=0)
                some_missing = np.any(np.broadcast_arrays(*[np.isnan(t) for t in truth]), axis=0)
                return np.where(some_decided, decided, np.where(some_missing, np.nan, 1.0 - decided))
        raise ExpressionError(f"{self.text!r}: {ast.unparse(node)!r} is not supported")
