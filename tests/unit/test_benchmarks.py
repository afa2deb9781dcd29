"""What the measurements take for the same and for another."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import multitask_vs_single, profiles, text_value


def test_profiles_told_by_another_configuration_or_of_other_data_are_not_taken_up() -> None:
    def made(inputs: str) -> Any:
        return SimpleNamespace(manifest={"inputs": inputs})

    config = profiles.config_of(0)
    other = config.model_copy(update={"model": config.model.model_copy(update={"width": 8})})
    cases = [(config, "a", "t"), (other, "a", "t"), (config, "b", "t"), (config, "a", "u")]
    names = {profiles.told_in(0, c, made(data), made(text)) for c, data, text in cases}
    assert len(names) == 4 and profiles.told_in(0, config, made("a"), made("t")) in names


def test_every_user_is_a_test_user_of_one_hashing_and_never_its_valid_user() -> None:
    folds = [profiles.folds_of(hashing) for hashing in range(5)]
    assert sorted(f for test, _ in folds for f in test) == list(range(10))
    assert all(valid not in test for test, valid in folds)


@pytest.mark.parametrize("arguments", [["--trials", "0"], ["--trials", "9"], ["--epochs", "0"]])
def test_a_comparison_without_trials_or_epochs_is_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["multitask_vs_single", "--prepared", "--run", "nowhere", *arguments])
    with pytest.raises(SystemExit) as stopped:
        multitask_vs_single.main()
    assert stopped.value.code == 2


def told(valid: float, test: float) -> dict[str, Any]:
    return {"item_holdout": {"valid": {"retrieval": [valid]}, "test": {"retrieval": [test]}, "n": 7.0}}


def test_the_text_variant_is_chosen_on_valid_alone() -> None:
    table = {"none": told(0.9, 0.9), "metadata": told(0.1, 0.1), "frozen": told(0.3, 0.2), "lora": told(0.2, 0.5)}
    found = text_value.judged(table)
    assert found == {"best_on_valid": "frozen", "recall@20": {"frozen": 0.2, "metadata": 0.1}, "n": 7.0, "ratio": 2.0}
    assert np.isnan(text_value.judged({"metadata": told(0.1, 0.1), "frozen": {}})["ratio"])


@pytest.mark.parametrize("data", list(text_value.DATA))
@pytest.mark.parametrize("protocol", text_value.PROTOCOLS)
def test_variants_differ_in_their_text_alone(data: str, protocol: str) -> None:
    names = text_value.variants_of(data)
    benches = {n: text_value.cell_of(n, data, protocol, 1, 0.5)[0] for n in names}
    plain = benches["frozen"].config.model_dump(exclude={"encoder"})
    assert all(b.config.model_dump(exclude={"encoder"}) == plain for b in benches.values())
    assert len({b.out for b in benches.values()}) == len(benches) and benches["none"].text is None
    assert benches["lora"].config.encoder.tuning.kind == "lora"  # type: ignore[union-attr]
    assert set(plain["tasks"]) == set(text_value.metrics_of(data, protocol))


def test_seeds_hold_out_other_items_and_share_vectors_that_learn_nothing() -> None:
    roots = {n: [text_value.text_root("ml100k", "item_holdout", s, n) for s in (0, 1)] for n in ("frozen", "contrastive")}
    assert roots["frozen"][0] == roots["frozen"][1] and roots["contrastive"][0] != roots["contrastive"][1]
    folds = [text_value.base_config("ml100k", "item_holdout", s)["data"]["fold"] for s in text_value.SEEDS]
    assert len({(f + step) % 10 for f in folds for step in (0, 1)}) == 6  # neither test nor valid of one is in another
    assert text_value.base_config("ml100k", "leave_one_out", 1)["data"]["fold"] == 0
