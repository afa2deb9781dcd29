"""Labels of targets that are too young at the log's end are masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrec_ray import storage
from mtrec_ray.config import ConfigError, DataConfig
from mtrec_ray.data.maturity import HOUR_MS, mask_immature, maturity_hours
from mtrec_ray.training.worker import load_schema
from tests import tiny

NAN = float("nan")


def config(**labels: Any) -> DataConfig:
    return DataConfig.model_validate({"interactions": {"path": "log"}, "labels": labels})


def test_the_label_of_a_target_younger_than_its_maturity_is_missing() -> None:
    data = config(click={"kind": "binary"}, buy={"kind": "binary", "maturity_hours": 24})
    time = np.array([0, 1, 2, 26]) * HOUR_MS  # the second event is exactly 24 hours old at hour 25
    labels = {"click": np.array([1.0, 0.0, 1.0, 0.0]), "buy": np.array([0.0, 1.0, 1.0, NAN])}
    masked = mask_immature(labels, time, data, 25 * HOUR_MS)
    np.testing.assert_array_equal(masked["buy"], [0, 1, NAN, NAN])
    assert masked["click"] is labels["click"]
    assert labels["buy"][2] == 1  # what the history shows


def test_a_derived_label_matures_with_the_slowest_that_it_reads() -> None:
    data = config(
        click={"maturity_hours": 1}, buy={"maturity_hours": 24}, rating={},
        either={"expression": "click > 0 or buy > 0"}, rated={"expression": "present(rating)"},
        slow={"expression": "click > 0", "maturity_hours": 48},
    )  # fmt: skip
    assert maturity_hours(data) == {"click": 1, "buy": 24, "either": 24, "slow": 48}
    labels = {n: np.ones(1) for n in data.labels}
    masked = mask_immature(labels, np.array([0]), data, 10 * HOUR_MS)
    assert {n for n, v in masked.items() if np.isnan(v[0])} == {"buy", "either", "slow"}


@pytest.mark.parametrize("hours", [0, -1])
def test_maturity_is_a_time_above_zero(tmp_path: Path, hours: int) -> None:
    with pytest.raises(ConfigError, match=r"data.labels.click.maturity_hours: Input should be greater than 0"):
        tiny.make_config(tmp_path, lambda raw: raw["data"]["labels"]["click"].update(maturity_hours=hours))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["time", "random"])
def test_prepare_masks_immature_labels_of_targets_alone_and_counts_them(tmp_path: Path, protocol: str) -> None:
    tiny.write_log(tmp_path)

    def change(raw: dict[str, Any]) -> None:
        raw["data"] |= {"protocol": protocol, "history": "present(rating)"}

    def mature(raw: dict[str, Any]) -> None:
        change(raw)
        raw["data"]["labels"]["rating"]["maturity_hours"] = 100

    plain = tiny.prepare_locally(tiny.make_config(tmp_path, change), tmp_path / "plain")
    data = tiny.prepare_locally(tiny.make_config(tmp_path, mature), tmp_path / "data")
    end = max(storage.read_table(plain.path("events"))["timestamp"].to_pylist())
    masked, counted, positives = 0, 0, 0
    for split in ("train", "valid", "test"):
        before, after = (storage.read_table(d.path(f"windows/{split}")) for d in (plain, data))
        for name in before.column_names:
            a, b = (np.array([v for row in t[name].to_pylist() for v in (row if isinstance(row, list) else [row])])
                    for t in (before, after))  # fmt: skip
            if name in ("label_rating", "label_like"):
                time = np.concatenate([np.array(row) for row in before["target_time"].to_pylist()])
                young = time > end - 100 * HOUR_MS
                np.testing.assert_array_equal(b, np.where(young, NAN, a))
                masked += int((young & ~np.isnan(a)).sum()) if name == "label_rating" else 0
                counted += int((~np.isnan(b)).sum()) if name == "label_rating" and split == "train" else 0
            elif name == "target_positive":
                positives += int(b.sum())
                assert (b <= a).all()
            else:
                np.testing.assert_array_equal(a, b, err_msg=name)  # the history is the same
    rows = data.manifest["rows"]
    assert masked > 0 and rows["immature_rating"] == rows["immature_like"] == masked
    assert "immature_click" not in rows and not any(key.startswith("immature") for key in plain.manifest["rows"])
    assert load_schema(data.prefix).labels["rating"].count == counted
    assert positives > 0 and (protocol == "time" or counted < load_schema(plain.prefix).labels["rating"].count)
