from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from mtrec_ray.config import ConfigError, NoRetrievalError, RunConfig, load_config, parse_config
from mtrec_ray.expressions import Expression
from mtrec_ray.features import CategoricalSpec
from mtrec_ray.schema import ActionSpec, LabelStats, LogSchema, bin_names, fit_action

ML100K = Path(__file__).parents[2] / "jobs" / "configs" / "ml100k.yaml"


def minimal() -> dict[str, Any]:
    """The smallest run: a log with one numeric label, and a retrieval task under a name of its own."""
    return {
        "name": "small",
        "data": {"interactions": {"path": "log"}, "labels": {"rating": {"min": 1, "max": 5}}},
        "tasks": {"next": {"kind": "retrieval"}},
        "train": {"monitor": "next/ndcg@10"},
    }


def full() -> dict[str, Any]:
    """Every optional table: items with text, users with attributes, a context column and five labels."""
    raw = minimal()
    raw["data"] |= {
        "items": {"path": "items"},
        "users": {"path": "users"},
        "labels": {
            "rating": {"min": 1, "max": 5},
            "click": {"kind": "binary"},
            "like": {"expression": "rating >= 4", "kind": "binary"},
        },
        "actions": ["rating", "click"],
        "context": ["device"],
        "attributes": {"sex": {"column": "gender"}, "age_group": {"column": "age", "bins": [25, 35]}},
        "text": {"template": "{name}. {genre}", "title": "name", "columns": ["genre"]},
    }
    raw["encoder"] = {"model": "some/encoder"}
    return raw


def put(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set a value at a dotted path."""
    *parents, last = path.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return raw


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()), encoding="utf-8")
    return path


# --------------------------------------------------------------------------- what is accepted


def test_the_minimal_and_the_full_config_load() -> None:
    assert parse_config(minimal()).retrieval_task == "next"
    assert parse_config(full()).data.text is not None


def test_ml100k_yaml_loads_with_the_settings_of_the_papers() -> None:
    config = load_config(ML100K)
    assert config.data.same_time == "order"
    assert config.data.exclude_seen is True
    assert config.data.window == 100
    assert config.data.protocol == "leave_one_out"


def test_defaults_are_the_safe_ones() -> None:
    data = parse_config(minimal()).data
    assert (data.same_time, data.protocol, data.exclude_seen, data.time_unit) == ("group", "time", False, "ms")
    assert (data.unknown_items, data.unknown_users) == ("quarantine", "keep")


@pytest.mark.parametrize("part", ["", "data", "data.interactions", "model", "train", "tasks.next", "data.labels.rating"])
def test_models_are_frozen(part: str) -> None:
    node: Any = parse_config(minimal())
    for name in filter(None, part.split(".")):
        node = node[name] if isinstance(node, dict) else getattr(node, name)
    field = next(iter(type(node).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(node, field, getattr(node, field))


def test_actions_default_to_the_labels_that_are_not_expressions_in_their_order() -> None:
    raw = full()
    del raw["data"]["actions"]
    assert parse_config(raw).data.action_names == ("rating", "click")


def test_the_default_history_needs_a_present_rating_or_a_positive_click() -> None:
    data = parse_config(full()).data
    nan = float("nan")
    columns = {"rating": np.array([3, nan, nan, nan]), "click": np.array([0, 1, 0, nan])}
    history = np.nan_to_num(Expression(data.history_expression)(columns))
    assert history.tolist() == [1, 1, 0, 0]


def test_positives_are_the_history_unless_the_task_says_otherwise() -> None:
    raw = put(full(), "data.history", "click > 0")
    assert parse_config(raw).positive_expression == "click > 0"
    put(raw, "tasks.next.positive", "like > 0")
    assert parse_config(raw).positive_expression == "like > 0"


# --------------------------------------------------------------------------- single keys


@pytest.mark.parametrize(
    "path", ["colour", "data.colour", "data.interactions.colour", "data.labels.rating.colour", "tasks.next.colour", "train.colour"]
)
def test_unknown_key_is_refused_with_its_path(path: str) -> None:
    assert f"{path}: unknown key" in refusal(put(minimal(), path, 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 5),
        ("data.window", "many"),
        ("data.interactions", None),
        ("data.interactions.path", 3),
        ("data.labels.rating", "numeric"),
        ("data.labels.rating.min", [1]),
        ("data.exclude_seen", "perhaps"),
        ("train.epochs", 1.5),
        ("tasks.next.weight", "heavy"),
        ("tasks.next", "retrieval"),
        ("train", 5),
    ],
)
def test_wrong_type_is_refused_with_its_path_and_what_was_found(path: str, value: Any) -> None:
    message = refusal(put(minimal(), path, value))
    assert f"  {path}: Input should be" in message or f"  {path}: Unable" in message or f"  {path}: Value" in message, message
    assert f"found {value!r}" in message


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("data.interactions.format", "xml", "recbole"),
        ("data.time_unit", "h", "'ns'"),
        ("data.same_time", "shuffle", "group"),
        ("data.protocol", "yearly", "leave_one_out"),
        ("data.labels.rating.kind", "ordinal", "binary"),
        ("data.unknown_items", "drop", "quarantine"),
        ("balancing.kind", "magic", "uncertainty"),
        ("tasks.next.kind", "ranking", "similarity"),
    ],
)
def test_wrong_enum_value_is_refused_with_its_path_and_the_allowed_ones(path: str, value: str, allowed: str) -> None:
    message = refusal(put(minimal(), path, value))
    assert f"  {path}: " in message
    assert repr(value) in message and allowed in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.window", 1),
        ("data.max_bad_share", 1.5),
        ("data.partitions", 0),
        ("model.dropout", 1.0),
        ("train.learning_rate", 0),
        ("train.learning_rate", float("nan")),
        ("train.workers", -1),
        ("ranking.candidates", 0),
        ("tasks.next.weight", -1),
    ],
)
def test_number_out_of_range_is_refused_with_its_path(path: str, value: float) -> None:
    assert f"  {path}: Input should be" in refusal(put(minimal(), path, value))


def test_missing_keys_are_named() -> None:
    message = refusal({"name": "x", "data": {"labels": {}}})
    assert "data.interactions: Field required" in message
    assert "tasks: Field required" in message


def test_every_wrong_key_has_its_own_line() -> None:
    raw = put(put(put(minimal(), "data.window", 1), "model.layers", 0), "colour", "red")
    lines = refusal(raw).splitlines()
    assert lines[0] == "config: 3 wrong key(s)"
    assert sorted(line.strip().split(":")[0] for line in lines[1:]) == ["colour", "data.window", "model.layers"]


@pytest.mark.parametrize("name", ["retrieval", "profile"])
def test_the_path_keeps_a_task_that_is_named_like_its_kind(name: str) -> None:
    raw = minimal()
    raw["tasks"] = {name: {"kind": "retrieval", "weight": -1}}
    raw["train"]["monitor"] = f"{name}/ndcg@10"
    assert f"tasks.{name}.weight: " in refusal(raw)


def test_true_is_not_a_whole_number() -> None:
    assert "train.epochs" in refusal(put(minimal(), "train.epochs", True))


@pytest.mark.parametrize(
    ("path", "value"),
    [("train.learning_rate", float("inf")), ("tasks.next.weight", float("inf")), ("tasks.next.final_weight", float("nan"))],
)
def test_a_number_that_json_cannot_hold_is_refused(path: str, value: float) -> None:
    assert path in refusal(put(minimal(), path, value))


def test_a_config_survives_its_own_json() -> None:
    config = parse_config(full())
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


# --------------------------------------------------------------------------- contradictions in data


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("data.labels.rating", {"min": 5, "max": 1}, "data.labels.rating: min is above max"),
        ("data.time_split", [0.9, 0.8], "data.time_split: two increasing shares"),
        ("data.time_split", [0.0, 0.8], "data.time_split: two increasing shares"),
        ("data.time_split", [0.8, 1.0], "data.time_split: two increasing shares"),
        ("data.attributes", {"sex": {"column": "gender"}}, "data.attributes: a users table is needed"),
        ("data.text", {"template": "{name}", "title": "name"}, "data.text: an items table is needed"),
        ("data.actions", ["click"], "data.actions: 'click' is not among labels ['rating']"),
        ("data.labels.bad name", {}, "'bad name'"),
        ("data.labels.like", {"expression": "stars >= 4"}, "labels.like.expression: 'stars >= 4' uses ['stars']"),
        ("data.labels.like", {"expression": "rating >="}, "labels.like.expression: 'rating >=' is not an expression"),
        ("data.labels.like", {"expression": "like > 0"}, "labels.like.expression: 'like > 0' uses ['like']"),
        ("data.history", "click > 0", "history: 'click > 0' uses ['click']"),
        ("model.width", 7, "model.width: 7 is not a multiple of heads 2"),
        ("evaluation.profile_fold_valid", 1, "evaluation: profile folds are distinct"),
        ("evaluation.profile_folds_test", [0, 10], "evaluation: profile folds are distinct numbers from 0 to 9"),
    ],
)
def test_contradictory_values_are_refused_with_the_key_and_the_reason(path: str, value: Any, expected: str) -> None:
    message = refusal(put(minimal(), path, value))
    assert expected in message
    assert message.splitlines()[1].strip().startswith(path.split(".")[0])


def test_a_derived_label_may_not_use_another_derived_label() -> None:
    raw = put(full(), "data.labels.love", {"expression": "like > 0 and rating > 4"})
    assert "labels.love.expression" in refusal(raw)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.labels.like.expression", "stars >= 4"),
        ("data.history", "stars > 4"),
        ("data.time_split", [0.9, 0.8]),
        ("data.actions", ["stars"]),
        ("model.width", 7),
    ],
)
def test_contradictory_values_are_refused_with_the_dotted_path(path: str, value: Any) -> None:
    assert f"{path}: " in refusal(put(minimal(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("data.context", ["sex"], "sex"),  # the attribute's name
        ("data.context", ["gender"], "gender"),  # the column that it is read from
        ("data.context", ["device", "age"], "age"),
    ],
)
def test_a_profile_attribute_that_is_also_a_context_column_is_refused(path: str, value: list[str], name: str) -> None:
    message = refusal(put(full(), path, value))
    assert f"{name!r} is a profile attribute and may not be an input feature" in message


def test_a_profile_attribute_that_is_also_an_action_is_refused() -> None:
    raw = put(put(full(), "data.labels.age", {}), "data.actions", ["rating", "age"])
    assert "'age' is a profile attribute and may not be an input feature" in refusal(raw)


def test_a_label_with_an_attributes_name_is_fine_while_it_is_not_shown() -> None:
    raw = put(full(), "data.labels.age", {})  # actions are rating and click
    assert parse_config(raw).data.action_names == ("rating", "click")


def _shown_by_default(raw: dict[str, Any]) -> None:
    put(raw, "data.labels.age", {})
    del raw["data"]["actions"]  # so that every plain label is an action, age too


def _renamed_in_the_log(raw: dict[str, Any]) -> None:
    put(raw, "data.context", ["who"])
    put(raw, "data.interactions.columns", {"who": "gender"})


def _derived(raw: dict[str, Any]) -> None:
    put(raw, "data.labels.age", {})
    put(raw, "data.labels.old", {"expression": "age > 60", "kind": "binary"})
    put(raw, "data.actions", ["rating", "old"])


@pytest.mark.parametrize("change", [_shown_by_default, _renamed_in_the_log, _derived])
def test_a_profile_attribute_is_refused_however_it_becomes_an_input(change: Callable[[dict[str, Any]], None]) -> None:
    raw = full()
    change(raw)
    assert "is a profile attribute and may not be an input feature" in refusal(raw)


def test_the_default_history_leaves_out_a_numeric_action_of_zero() -> None:
    raw = put(minimal(), "data.labels", {"plays": {"min": 0}})
    history = Expression(parse_config(raw).data.history_expression)({"plays": np.array([0.0, 3.0, np.nan])})
    assert np.nan_to_num(history).tolist() == [0, 1, 0]


def test_a_log_without_labels_is_refused_or_has_a_history_that_can_be_evaluated() -> None:
    raw = put(minimal(), "data.labels", {})
    try:
        data = parse_config(raw).data
    except ConfigError as error:
        assert "labels" in str(error)
        return
    Expression(data.history_expression)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.labels.user_id", {}),  # a column of every event
        ("data.labels.present", {}),  # the function of expressions
        ("data.labels.class", {}),  # a Python keyword: present(class) cannot be parsed
        ("data.context", ["item_id"]),
        ("data.context", ["rating"]),  # already a label
    ],
)
def test_a_name_that_is_already_taken_is_refused(path: str, value: Any) -> None:
    assert "data" in refusal(put(minimal(), path, value))


@pytest.mark.parametrize("bins", [[], [35, 25], [25, 25]])
def test_bins_that_do_not_increase_are_refused(bins: list[float]) -> None:
    assert "data.attributes.age_group" in refusal(put(full(), "data.attributes.age_group.bins", bins))


@pytest.mark.parametrize("template", ["{name", "name}", "{} by {name}", "{0} by {name}", "{name:.1f}"])
def test_a_text_template_that_cannot_be_filled_is_refused(template: str) -> None:
    assert "data.text" in refusal(put(full(), "data.text.template", template))


@pytest.mark.parametrize("column", ["count", "recent_count", "trained", "text"])
def test_an_items_column_named_like_one_of_the_catalogue_is_refused(column: str) -> None:
    assert "data.text" in refusal(put(full(), "data.text.columns", ["genre", column]))


def test_limits_on_a_derived_label_are_refused() -> None:
    raw = put(minimal(), "data.labels.twice", {"expression": "rating * 2", "max": 8})
    assert "data.labels.twice" in refusal(raw)


# --------------------------------------------------------------------------- tasks


def test_a_task_on_an_unknown_label_is_refused() -> None:
    for kind in ("regression", "binary"):
        message = refusal(put(minimal(), "tasks.stars", {"kind": kind, "label": "stars"}))
        assert "tasks.stars.label: 'stars' is not among data.labels ['rating']" in message


def test_a_binary_task_on_a_numeric_label_is_refused() -> None:
    message = refusal(put(minimal(), "tasks.good", {"kind": "binary", "label": "rating"}))
    assert "tasks.good.label: 'rating' is numeric" in message


def test_a_binary_task_on_a_binary_or_on_a_derived_label_is_fine() -> None:
    raw = put(full(), "tasks.click", {"kind": "binary", "label": "click"})
    put(raw, "data.labels.like", {"expression": "rating >= 4"})
    put(raw, "tasks.like", {"kind": "binary", "label": "like"})
    assert set(parse_config(raw).tasks) == {"next", "click", "like"}


def test_a_binary_task_on_an_arithmetic_expression_is_refused() -> None:
    raw = put(minimal(), "data.labels.twice", {"expression": "rating * 2"})
    assert "tasks.good.label" in refusal(put(raw, "tasks.good", {"kind": "binary", "label": "twice"}))


def test_a_profile_task_on_an_unknown_attribute_is_refused() -> None:
    message = refusal(put(full(), "tasks.taste", {"kind": "profile", "attribute": "taste"}))
    assert "tasks.taste.attribute: 'taste' is not among data.attributes ['age_group', 'sex']" in message


def test_without_a_retrieval_task_the_monitor_names_another_and_nothing_can_be_served() -> None:
    raw = minimal()
    raw["tasks"] = {"rating": {"kind": "regression", "label": "rating"}}
    message = refusal(raw)
    assert "train.monitor: 'next/ndcg@10' is not task/metric with a task of ['rating']" in message and "rating/rmse" in message
    config = parse_config(put(raw, "train.monitor", "rating/rmse"))
    assert config.retrieval_task is None and config.positive_expression == config.data.history_expression
    with pytest.raises(NoRetrievalError, match=r"tasks: serving needs .* add retrieval: {kind: retrieval}"):
        config.require_retrieval("serving")


def test_no_task_at_all_is_refused() -> None:
    raw = minimal()
    raw["tasks"] = {}
    assert "tasks: at least one is needed" in refusal(raw)


def test_two_retrieval_tasks_are_refused_by_name() -> None:
    message = refusal(put(minimal(), "tasks.again", {"kind": "retrieval"}))
    assert "tasks: at most one task of kind retrieval" in message and "['next', 'again']" in message


def test_two_similarity_tasks_are_refused() -> None:
    raw = put(put(minimal(), "tasks.one", {"kind": "similarity"}), "tasks.two", {"kind": "similarity"})
    assert "tasks: at most one task of kind similarity, found ['one', 'two']" in refusal(raw)


def test_a_task_without_a_kind_is_refused() -> None:
    message = refusal(put(minimal(), "tasks.odd", {"label": "rating"}))
    assert "tasks.odd: " in message and "kind" in message


@pytest.mark.parametrize("name", ["score", "title", "user_id", "item_id", "rank", "a-b", "1st"])
def test_a_task_named_like_an_output_column_or_unfit_for_one_is_refused(name: str) -> None:
    message = refusal(put(minimal(), f"tasks.{name}", {"kind": "regression", "label": "rating"}))
    assert f"tasks.{name}: task names are letters" in message


def test_an_unusable_positive_expression_is_refused() -> None:
    assert "tasks.next.positive: 'click > 0' uses ['click']" in refusal(put(minimal(), "tasks.next.positive", "click > 0"))


def test_an_encoder_without_text_is_refused() -> None:
    message = refusal(put(minimal(), "encoder.model", "some/encoder"))
    assert "encoder: data.text is missing" in message


@pytest.mark.parametrize("monitor", ["rating/rmse", "next", "next/", "/ndcg@10", ""])
def test_a_monitor_that_names_no_task_or_no_metric_is_refused(monitor: str) -> None:
    message = refusal(put(minimal(), "train.monitor", monitor))
    assert f"train.monitor: {monitor!r} is not task/metric with a task of ['next']" in message


# --------------------------------------------------------------------------- files and overrides


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("text", ["", "- a list", "just text", "3"])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="expected a mapping at the top"):
        load_config(tmp_path / "x.yaml")


def test_broken_yaml_is_refused_with_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: a\ndata: [1,\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: not valid YAML(.|\n)*line"):
        load_config(tmp_path / "x.yaml")


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "x.yaml")


def test_keys_that_are_not_strings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(minimal()) + "1: one\n")
    with pytest.raises(ConfigError, match="1: Keys should be strings"):
        load_config(tmp_path / "x.yaml")


def test_a_file_that_is_not_utf8_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(minimal()) + "name: other\n")
    with pytest.raises(ConfigError, match="name"):
        load_config(tmp_path / "x.yaml")


def test_the_message_names_the_file(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: 1 wrong key"):
        load_config(file, ["data.window=1"])


def test_an_override_replaces_a_value_read_as_yaml(file: Path) -> None:
    config = load_config(
        file,
        ["name=other", "data.window=7", "data.exclude_seen=true", "data.time_split=[0.5, 0.6]", "train.learning_rate=1e-4"],
    )
    assert (config.name, config.data.window, config.data.exclude_seen) == ("other", 7, True)
    assert (config.data.time_split, config.train.learning_rate) == ((0.5, 0.6), 1e-4)


def test_an_override_leaves_everything_else_as_it_is(file: Path) -> None:
    before, after = load_config(file).model_dump(), load_config(file, ["data.window=7"]).model_dump()
    before["data"]["window"] = 7
    assert after == before


def test_an_override_creates_the_mappings_it_passes_through(file: Path) -> None:
    overrides = ["data.interactions.columns.user_id=who", "evaluation.bootstrap=5", "data.labels.like.expression=rating >= 4"]
    config = load_config(file, overrides)
    assert config.data.interactions.columns == {"user_id": "who"}
    assert config.evaluation.bootstrap == 5
    assert config.data.labels["like"].expression == "rating >= 4"


def test_the_last_override_of_a_key_wins(file: Path) -> None:
    assert load_config(file, ["data.window=7", "data.window=9"]).data.window == 9


def test_an_override_may_hold_equals_signs_and_may_be_empty(file: Path) -> None:
    assert load_config(file, ["name=a=b"]).name == "a=b"
    assert load_config(file, ["train.clip_norm=1", "train.clip_norm="]).train.clip_norm is None


@pytest.mark.parametrize("override", ["data.window", "=7", " =7", ""])
def test_an_override_without_key_and_value_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load_config(file, [override])


def test_an_override_below_a_value_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="'name' holds a value, not a mapping"):
        load_config(file, ["name.first=a"])


def test_an_override_that_is_not_yaml_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\[1,' is not a YAML value"):
        load_config(file, ["data.time_split=[1,"])


@pytest.mark.parametrize("override", ["data.colour=red", "colour=red", "data..window=5", ".=1"])
def test_an_override_of_an_unknown_key_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(file, [override])


# --------------------------------------------------------------------------- the fitted schema


def test_bins_are_named_by_the_whole_numbers_in_them() -> None:
    assert bin_names([25, 35, 50]) == ("<25", "25-34", "35-49", "50+")
    assert bin_names([18.0]) == ("<18", "18+")
    assert bin_names([0.5, 1.5]) == ("<0.5", "0.5-1.5", "1.5+")


def test_bin_names_are_one_more_than_the_edges_like_the_classes_of_digitize() -> None:
    edges = [25.0, 35.0, 50.0]
    ages = [24, 25, 34, 35, 49, 50, 90]
    names = [bin_names(edges)[i] for i in np.digitize(ages, edges)]
    assert names == ["<25", "25-34", "25-34", "35-49", "35-49", "50+", "50+"]


def test_a_binary_action_is_embedded_by_value_and_a_numeric_one_keeps_its_statistics() -> None:
    stats = LabelStats(count=4, mean=3.5, std=1.2)
    assert fit_action("click", None, "binary", stats).values == (0.0, 1.0)
    assert fit_action("rating", None, "numeric", stats) == ActionSpec(name="rating", mean=3.5, std=1.2)
    assert fit_action("rating", (1.0, 2.0), "numeric", stats).values == (1.0, 2.0)


def test_a_constant_action_can_still_be_standardised() -> None:
    assert fit_action("plays", None, "numeric", LabelStats(count=4, mean=1.0, std=0.0)).std > 0


def test_a_log_schema_survives_its_own_json_and_refuses_unknown_keys() -> None:
    schema = LogSchema(
        window=5,
        same_time="group",
        exclude_seen=True,
        protocol="time",
        labels={},
        n_items=3,
        n_train_items=2,
        actions=(ActionSpec(name="rating", values=(1.0, 2.0)),),
        context=(CategoricalSpec(name="device", values=("web",)),),
    )
    assert LogSchema.model_validate_json(schema.model_dump_json()) == schema
    with pytest.raises(ValidationError, match="extra"):
        LogSchema.model_validate(schema.model_dump() | {"colour": "red"})
