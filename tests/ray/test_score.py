"""Batch scoring on a real cluster: a killed actor, a job that ended half way, another number of workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.scoring import batch
from mtrec_ray.scoring.shards import Output, verify
from tests.conftest import TinyRun

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def noting(folder: Path, dies_after_data_of: str | None) -> type:
    """An actor that notes every shard it scores, and kills its process between one's data and its entry, once."""
    noted, killed = str(folder / "noted"), folder / "killed"

    class Actor(batch._Actor):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            name = batch.shard_name(row["part"])
            with open(noted, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            if name == dies_after_data_of and not killed.exists():
                killed.touch()
                draft = Path(self.output.draft)
                draft.mkdir(parents=True, exist_ok=True)
                (draft / f"{name}.parquet").write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(row)

    return Actor


def with_workers(run: TinyRun, workers: int) -> RunConfig:
    raw = run.config.model_dump(mode="json")
    raw["scoring"]["workers"] = workers
    return parse_config(raw)


def test_killed_actors_and_jobs_cost_a_shard_and_change_nothing(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, data = str(tiny_run.bundle_root), tiny_run.data
    plain, out = str(tmp_path / "plain"), tmp_path / "killed_ones"
    expected = batch.score(tiny_run.config, data, bundle, plain)
    monkeypatch.setattr(batch, "_Actor", noting(tmp_path, "part-00001"))

    def ends(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the actor dies in a shard, and the job before it publishes
        patch.setattr(Output, "publish", ends)
        with pytest.raises(KeyboardInterrupt):
            batch.score(tiny_run.config, data, bundle, str(out))
    assert (tmp_path / "killed").exists() and sorted(set((tmp_path / "noted").read_text().split())) == [
        "part-00000", "part-00001", "part-00002",
    ]  # fmt: skip
    assert not list(out.glob("*.parquet")) and not (out / "_manifest.json").exists()
    entries = sorted((out / "_draft").rglob("_done/*.json"))
    assert len(entries) == 3
    entries[2].unlink()
    (tmp_path / "noted").unlink()
    counts = batch.score(with_workers(tiny_run, 2), data, bundle, str(out))
    assert (tmp_path / "noted").read_text() == "part-00002\n"  # what counted was not done again
    assert {k: v for k, v in counts.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    assert pq.read_table(out).equals(pq.read_table(plain))
    assert verify(str(out))["users"] == expected["users"] and set(counts["seconds"]) == {
        "read", "histories", "states", "retrieve", "heads",
    }  # fmt: skip
