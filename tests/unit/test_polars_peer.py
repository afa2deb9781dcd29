"""Three implementations of windows agree on a dirty generated log: mtrec_ray, the Polars program, plain Python."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("polars", reason="needs the extra bench")

from benchmarks import polars_prepare
from benchmarks.generate import generate
from benchmarks.reference_windows import clean, difference, read_rows, read_windows, user_windows
from benchmarks.world import Parameters
from mtrec_ray import storage
from mtrec_ray.config import load_config
from mtrec_ray.training.worker import load_schema
from tests import tiny

WINDOW = 20


@dataclass
class Both:
    """A log, and what the two programs made of it."""

    log: Path
    ours: storage.Directory
    polars: Path
    found: dict[str, Any]
    users: list[str]

    def our_windows(self) -> dict[str, Any]:
        items = storage.read_table(self.ours.path("catalogue.parquet"))["item_id"].to_pylist()
        devices = ["unknown", *load_schema(self.ours.prefix).context[0].values]
        return read_windows(Path(self.ours.path("windows")), self.users, items, devices)

    def polars_windows(self) -> dict[str, Any]:
        items = pq.read_table(self.polars / "catalogue.parquet")["item_id"].to_pylist()
        return read_windows(
            self.polars / "windows", self.users, items, json.loads((self.polars / "schema.json").read_text())["device"]
        )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("peer")
    generate(Parameters(20_000, seed=3, users=120, days=10, dirty=0.03), folder / "log", files=3)
    config = load_config(folder / "log" / "run.yaml", [f"data.window={WINDOW}", "data.partitions=3"])
    ours = tiny.prepare_locally(config, folder / "ours")
    found = polars_prepare.prepare(folder / "log", folder / "polars", WINDOW)
    users = pq.read_table(folder / "log" / "users.parquet")["user_id"].to_pylist()
    return Both(folder / "log", ours, folder / "polars", found, users)


@pytest.mark.slow
def test_every_window_of_polars_is_the_one_that_mtrec_ray_prepares(both: Both) -> None:
    ours = both.our_windows()
    assert sum(len(w["train"]) for w in ours.values()) > len(both.users)  # some users have several
    assert any(window["seen_item"] for w in ours.values() for window in w["test"])
    assert difference(ours, both.polars_windows()) is None


@pytest.mark.slow
def test_every_window_is_the_one_that_plain_python_cuts(both: Both) -> None:
    known = set(pq.read_table(both.log / "items.parquet")["item_id"].to_pylist())
    cuts = (both.found["cuts"][0], both.found["cuts"][1])
    rows = read_rows(both.log / "log", both.users)
    expected = {user: user_windows(clean(r, known), cuts, WINDOW) for user, r in rows.items()}
    assert difference(both.polars_windows(), expected) is None
    assert difference(both.our_windows(), expected) is None


def test_a_changed_window_is_found(both: Both) -> None:
    ours, changed = both.our_windows(), both.our_windows()
    next(w for w in changed.values() if w["train"])["train"][0]["target_pos"][0] += 1
    assert "target_pos" in str(difference(changed, ours))


def test_cuts_catalogue_and_quarantine_agree(both: Both) -> None:
    manifest = both.ours.manifest
    assert both.found["cuts"] == manifest["cuts"]
    assert both.found["events"] == manifest["rows"]["events"] == 20_000
    assert both.found["reasons"] == manifest["rows"]["reasons"]
    columns = ["item_id", "trained", "count", "recent_count", "title", "text", "category"]
    ours = storage.read_table(both.ours.path("catalogue.parquet"), columns)
    assert pq.read_table(both.polars / "catalogue.parquet", columns=columns).to_pylist() == ours.to_pylist()


def test_stores_agree(both: Both) -> None:
    def rows(path: str) -> dict[str, Any]:
        return {str(r.pop("user_id")): repr(sorted(r.items())) for r in storage.read_table(path).to_pylist()}

    assert rows(str(both.polars / "store.parquet")) == rows(both.ours.path("store"))
