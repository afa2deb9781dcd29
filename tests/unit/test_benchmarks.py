"""What the measurements take for the same and for another."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import multitask_vs_single, profiles


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
