"""The search space: what is refused at load, what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.tune import main
from mtrec_ray.config import ConfigError, RunConfig, load_config
from mtrec_ray.tuning.space import Distribution, Space, draw, load_space, value_at, with_values
from tests import tiny

CONFIGS = Path(__file__).parent.parent.parent / "jobs" / "configs"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return tiny.make_config(Path("nowhere"))  # width 16, heads 2


def written(folder: Path, raw: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return path


def space_of(**raw: Any) -> Space:
    return Space.model_validate(raw)


GOOD = {"train.learning_rate": {"log_uniform": [0.0003, 0.003]}}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"search": {}}, r"search: empty; name at least one key"),
        ({}, r"search: Field required"),
        ({"search": {"model.widht": {"choice": [8, 16]}}}, r"search\.model\.widht: unknown key; did you mean model\.width\?"),
        ({"search": {"tasks.ratng.weight": {"choice": [0, 1]}}}, r"search\.tasks\.ratng\.weight: unknown key; did you mean"),
        ({"search": GOOD, "sarch": {}}, r"sarch: unknown key; there is"),
        ({"search": {"model.width": {"chioce": [8, 16]}}}, r"search\.model\.width\.chioce: unknown key; there is \['choice'"),
        ({"search": {"model.width": {"choice": [8, 16], "uniform": [1, 2]}}}, r"model\.width: one distribution of .* found \["),
        ({"search": {"model.width": {}}}, r"search\.model\.width: one distribution of .*found none"),
        ({"search": {"model.width": {"choice": [8]}}}, r"model\.width: choice: a single value .* put it under fixed"),
        ({"search": {"model.width": {"choice": [8, 16, 8]}}}, r"search\.model\.width: choice: a value occurs twice"),
        ({"search": {"model.dropout": {"uniform": [0.5, 0.1]}}}, r"search\.model\.dropout: uniform: two increasing ends"),
        ({"search": {"model.dropout": {"uniform": [0.1, 0.2, 0.3]}}}, r"search\.model\.dropout\.uniform: Tuple"),
        ({"search": {"model.dropout": {"log_uniform": [0, 0.5]}}}, r"log_uniform: both ends are above 0.*use uniform"),
        ({"search": {"model.width": {"int_uniform": [8.5, 16]}}}, r"search\.model\.width\.int_uniform\.0"),
        ({"search": {"model.dropout": {"uniform": [0.5, 1.0]}}}, r"search\.model\.dropout: 1\.0 is refused: .*less than 1"),
        ({"search": {"model.width": {"uniform": [8, 64]}}}, r"model\.width: .* is refused.*Whole numbers need int"),
        ({"search": {"balancing.kind": {"choice": ["static", "magic"]}}}, r"search\.balancing\.kind: 'magic' is refused"),
        ({"search": {"data.window": {"choice": [8, 16]}}}, r"data\.window: changes the prepared data.*of its own"),
        ({"search": GOOD, "fixed": {"data.window": 8}}, r"fixed\.data\.window: changes the prepared data"),
        ({"search": {"encoder.pooling": {"choice": ["mean", "cls"]}}}, r"encoder\.pooling: changes the prepared data"),
        ({"search": {"train.epochs": {"choice": [8, 16]}}}, r"search\.train\.epochs: says how .*put it under fixed"),
        ({"search": {"train.workers": {"choice": [1, 2]}}}, r"search\.train\.workers: is set by the job"),
        ({"search": {"balancing.record": {"choice": [True, False]}}}, r"balancing\.record: measures and trains nothing"),
        ({"search": {"seed": {"int_uniform": [0, 9]}}}, r"search\.seed: is not searched.*--finalists"),
        ({"search": {"tasks.rating.label": {"choice": ["rating", "like"]}}}, r"tasks\.rating\.label: is what the task means"),
        ({"search": {"model": {"choice": [{"width": 8}, {"width": 16}]}}}, r"search\.model: is a whole section"),
        ({"search": {"model.width": {"choice": [8, 16]}}, "fixed": {"model.width": 8}}, r"either fixed or searched"),
        ({"search": GOOD, "fixed": {"model.dropout": 2}}, r"fixed\.model\.dropout: 2 is refused: model\.dropout"),
        ({"search": GOOD, "fixed": {"model.nope": 2}}, r"fixed\.model\.nope: unknown key"),
        ({"search": GOOD, "points": [{"model.width": 8}]}, r"points\[0\]\.model\.width: is not searched"),
        ({"search": GOOD, "points": [{"train.learning_rate": -1}]}, r"points\[0\]: refused: train\.learning_rate"),
        ({"search": GOOD, "asha": {"reduction": 1}}, r"asha\.reduction: Input should be greater than 1"),
        ({"search": GOOD, "asha": {"rungs": 1}}, r"asha\.rungs: unknown key; there is \['first_rung', 'reduction'\]"),
        ("search: {a: {choice: [1, 2]}, a: {choice: [1, 2]}}", r"the key 'a' occurs twice"),
        ("- 1", r"expected a mapping at the top"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_at_load_with_the_file_the_key_and_the_cure(
    config: RunConfig, tmp_path: Path, raw: Any, says: str
) -> None:
    path = written(tmp_path, raw)
    with pytest.raises(ConfigError, match=says) as caught:
        load_space(path, config)
    assert str(path) in str(caught.value)


def test_every_mistake_among_the_keys_is_said_at_once(config: RunConfig, tmp_path: Path) -> None:
    raw = {"search": {"data.window": {"choice": [1, 2]}, "model.nope": {"choice": [1, 2]}, "name": {"choice": ["a", "b"]}}}
    with pytest.raises(ConfigError, match=r"3 wrong key\(s\)"):
        load_space(written(tmp_path, raw), config)


def test_a_missing_file_is_named(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_space("nowhere.yaml", config)


def test_a_value_that_other_searched_keys_can_make_valid_is_no_mistake_and_the_rest_are_refused_points(
    config: RunConfig, tmp_path: Path
) -> None:
    raw = {"search": {"model.width": {"choice": [9, 16]}, "model.heads": {"choice": [2, 3]}}}
    space = load_space(written(tmp_path, raw), config)  # 9 needs 3 heads, 16 needs 2
    points = draw(space, config, 10)
    assert [(p.values["model.width"], p.values["model.heads"]) for p in points if p.config is not None] == [(16, 2), (9, 3)]
    refused = [p for p in points if p.config is None]
    assert {(p.values["model.width"], p.values["model.heads"]) for p in refused} == {(9, 2), (16, 3)}
    assert "not a multiple of heads" in refused[0].refused
    del raw["search"]["model.heads"]
    with pytest.raises(ConfigError, match=r"search\.model\.width: 9 is refused: .*not a multiple of heads 2"):
        load_space(written(tmp_path, raw), config)


def test_the_configuration_is_trial_0_then_come_the_given_points(config: RunConfig) -> None:
    space = space_of(
        search={"model.width": {"choice": [8, 32]}, "train.learning_rate": {"log_uniform": [0.001, 0.1]}},
        fixed={"model.layers": 2},
        points=({"model.width": 8},),
    )
    points = draw(space, config, 4)
    assert points[0].values == {"model.width": 16, "train.learning_rate": 0.01}
    assert points[0].config == with_values(config, {"model.layers": 2})
    assert points[1].values == {"model.width": 8, "train.learning_rate": 0.01}
    assert all(p.config is not None and p.config.model.layers == 2 for p in points)


@pytest.mark.slow
def test_the_same_space_draws_the_same_points_and_more_trials_continue_them(config: RunConfig) -> None:
    search = {"model.width": {"choice": [8, 32]}, "train.learning_rate": {"log_uniform": [0.001, 0.1]}}
    few, many = (draw(space_of(search=search), config, n) for n in (9, 300))
    assert [p.values for p in few] == [p.values for p in many[:9]]
    assert [p.number for p in many] == list(range(300))
    other = draw(space_of(search=search, seed=1), config, 9)
    assert [p.values for p in few[1:]] != [p.values for p in other[1:]]


def test_a_space_of_few_points_is_tried_once(config: RunConfig) -> None:
    assert len(draw(space_of(search={"model.width": {"choice": [8, 16, 32]}}), config, 20)) == 3


@pytest.mark.parametrize(
    ("raw", "low", "middle", "high"),
    [
        ({"uniform": [1, 3]}, 1, 2, 3),
        ({"log_uniform": [0.01, 1]}, 0.01, 0.1, 1),
        ({"int_uniform": [1, 3]}, 1, 2, 3),
        ({"choice": ["a", "b", "c"]}, "a", "b", "c"),
    ],
)
def test_a_distribution_reaches_from_end_to_end_with_its_middle_in_the_middle(raw: Any, low: Any, middle: Any, high: Any) -> None:
    distribution = Distribution.model_validate(raw)
    assert [distribution.at(u) for u in (0.0, 0.5, 1 - 1e-12)] == [low, middle, high]


def test_draws_fill_the_range_evenly_in_the_logarithm(config: RunConfig) -> None:
    space = space_of(search={"train.learning_rate": {"log_uniform": [1e-4, 1e-1]}, "model.layers": {"int_uniform": [1, 4]}})
    points = draw(space, config, 201)[1:]
    rates = np.log10([p.values["train.learning_rate"] for p in points])
    assert np.histogram(rates, 3, (-4, -1))[0] == pytest.approx([200 / 3] * 3, abs=4)
    assert np.bincount([p.values["model.layers"] for p in points], minlength=5)[1:] == pytest.approx([50] * 4, abs=4)


def test_numbers_are_drawn_with_few_digits_and_never_outside_the_range() -> None:
    distribution = Distribution.model_validate({"uniform": [0.123456, 0.123457]})
    assert all(0.123456 <= distribution.at(u) <= 0.123457 for u in np.linspace(0, 0.999, 50))
    assert Distribution.model_validate({"uniform": [0, 1]}).at(1 / 3) == 0.3333


def test_a_value_is_set_at_its_key_and_nothing_else_changes(config: RunConfig) -> None:
    changed = with_values(config, {"tasks.rating.weight": 0.125, "train.clip_norm": 2})
    assert value_at(changed, "tasks.rating.weight") == 0.125 and changed.train.clip_norm == 2
    assert with_values(changed, {"tasks.rating.weight": 0.5, "train.clip_norm": None}) == config
    with pytest.raises(ConfigError, match=r"'learning_rate' holds a value"):
        with_values(config, {"train.learning_rate.deeper": 1})


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "tune").glob("*.yaml")))
def test_the_committed_spaces_suit_their_configurations(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    points = draw(load_space(CONFIGS / "tune" / f"{name}.yaml", config), config, 32)
    assert sum(p.config is not None for p in points) == 32


@pytest.mark.parametrize(
    "arguments", [["--minutes", "nan"], ["--minutes", "inf"], ["--minutes", "0"], ["--trials", "0"], ["--seeds", "-1"]]
)
def test_numbers_that_make_no_sense_are_refused_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--config", "none.yaml", "--space", "none.yaml", *arguments])
    assert stopped.value.code == 2 and f"argument {arguments[0]}: expected" in capsys.readouterr().err
