"""Batch scoring on a real cluster: a killed actor, a job that ended half way, another number of workers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.histories import History
from mtrec_ray.scoring import batch
from mtrec_ray.scoring.shards import Output, verify
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.sharded import ShardedIndex
from mtrec_ray.storage import StorageError
from tests.conftest import TinyRun

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def noting(folder: Path, dies_after_data_of: str | None) -> type:
    """An actor that notes every shard it scores, and kills its process between one's data and its entry, once."""
    noted, killed = str(folder / "noted"), folder / "killed"

    class Actor(batch._Actor):
        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            name = item["row"]["name"]
            with open(noted, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            if name == dies_after_data_of and not killed.exists():
                killed.touch()
                draft = Path(self.output.draft)
                draft.mkdir(parents=True, exist_ok=True)
                (draft / f"{name}.parquet").write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(item)

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
        "read", "histories", "states", "retrieve", "heads", "rows",
    }  # fmt: skip


def test_the_users_of_a_file_are_scored_and_the_unknown_among_them_counted(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"user_id": ["u3", "stranger", "u5", "u3", "u1"], "age": [1] * 5}), tmp_path / "users.parquet")
    whole = tmp_path / "whole"
    batch.score(tiny_run.config, tiny_run.data, str(tiny_run.bundle_root), str(whole))
    every = pq.read_table(whole).to_pandas()
    for unknown, users in (("popularity", ["stranger", "u1", "u3", "u5"]), ("skip", ["u1", "u3", "u5"])):
        raw = tiny_run.config.model_dump(mode="json")
        raw["scoring"] |= {"users": str(tmp_path / "users.parquet"), "unknown_users": unknown}
        out = tmp_path / unknown
        counts = batch.score(parse_config(raw), tiny_run.data, str(tiny_run.bundle_root), str(out))
        assert (counts["users"], counts["unknown"]) == (len(users), 1) and verify(str(out)) == counts
        found = pq.read_table(out).to_pandas()
        assert sorted(found.user_id.unique()) == users
        for user in ("u1", "u3", "u5"):
            mine, theirs = (t[t.user_id == user].reset_index(drop=True) for t in (found, every))
            assert mine.item_id.equals(theirs.item_id) and np.allclose(mine.score, theirs.score, rtol=1e-5)
    popular = tiny_run.predictor.recommend([History()], 5)[0]["items"]
    lists = pq.read_table(tmp_path / "popularity").to_pandas()
    assert lists[lists.user_id == "stranger"].item_id.tolist() == [i["item_id"] for i in popular]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user": ["u1"]}, r"has no column user_id; it has \['user'\]"),
        ({"user_id": pa.array(["u1", None])}, r"1 row\(s\) without user_id; the first is row 1 of row groups 0 to 0"),
        ({"user_id": pa.array([], pa.string())}, "has no rows"),
        (None, "users.parquet"),
    ],
)
def test_a_file_of_users_that_cannot_be_read_is_one_message(
    tiny_run: TinyRun, tmp_path: Path, table: dict[str, Any] | None, message: str
) -> None:
    if table is not None:
        pq.write_table(pa.table(table), tmp_path / "users.parquet")
    raw = tiny_run.config.model_dump(mode="json")
    raw["scoring"]["users"] = str(tmp_path / "users.parquet")
    with pytest.raises((batch.ScoringError, StorageError), match=message):
        batch.score(parse_config(raw), tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / "scores"))
    assert not (tmp_path / "scores").exists()


def test_states_profiles_and_similar_items_are_those_of_the_predictor(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ITEMS", 8)  # three shards of 21 items
    bundle, data, predictor = str(tiny_run.bundle_root), tiny_run.data, tiny_run.predictor
    store = PreparedHistories(data.root)
    found = {}
    for what in ("states", "profiles", "similar"):
        counts = batch.score(tiny_run.config, data, bundle, str(tmp_path / what), what=what)
        assert verify(str(tmp_path / what)) == counts
        found[what] = pq.read_table(tmp_path / what).to_pandas()
        assert counts["items" if what == "similar" else "users"] == (21 if what == "similar" else len(store.user_ids()))
    assert list(found["states"].columns) == ["user_id", "state"] and sorted(found["states"].user_id) == list(store.user_ids())
    for user in list(store.user_ids())[:6]:
        history = store.get(user)
        assert history is not None
        state = predictor.encode_state(predictor.encode_histories([history]).batch)[0].numpy()
        mine = found["states"][found["states"].user_id == user].state.iloc[0]
        assert np.allclose(mine, state, atol=1e-5)
        rows = found["profiles"][found["profiles"].user_id == user]
        told = {(r.attribute, r.value): r.probability for r in rows.itertuples()}
        expected = {(a, v): p for a, values in predictor.profile(history)["profile"].items() for v, p in values.items()}
        assert told.keys() == expected.keys() and all(abs(told[key] - expected[key]) < 1e-5 for key in told)
    assert len(list((tmp_path / "similar").glob("part-*.parquet"))) == 3
    for item in ("i0", "i7", "new"):
        rows = found["similar"][found["similar"].item_id == item]
        expected_items = predictor.similar(item, tiny_run.config.scoring.k)
        assert rows.similar_item_id.tolist() == [i["item_id"] for i in expected_items]
        assert np.allclose(rows.score, [i["score"] for i in expected_items], atol=1e-5)


def test_an_output_that_the_run_does_not_have_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    raw = tiny_run.config.model_dump(mode="json")
    raw["tasks"] = {n: t for n, t in raw["tasks"].items() if t["kind"] != "profile"}
    with pytest.raises(batch.ScoringError, match="no task of kind profile"):
        batch.score(parse_config(raw), tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / "profiles"), what="profiles")
    assert not list(tmp_path.iterdir())


def scoring(run: TinyRun, **settings: Any) -> RunConfig:
    raw = run.config.model_dump(mode="json")
    raw["scoring"] |= settings
    return parse_config(raw)


def test_pairs_of_a_file_are_split_scored_and_reused(ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path) -> None:
    users, items = ["u3", "u1", "u3", "stranger", "u1", "u1"], ["i4", "i2", "nothing", "i1", "i0", "i0"]
    uri = str(tmp_path / "pairs.parquet")
    pq.write_table(pa.table({"user_id": users, "item_id": items}), uri, row_group_size=2)
    config, out = scoring(tiny_run, pairs=uri), str(tmp_path / "out")
    counts = batch.score(config, tiny_run.data, str(tiny_run.bundle_root), out, what="pairs")
    assert verify(out) == counts
    assert {n: counts[n] for n in ("users", "unknown", "doubled", "unknown_items", "rows")} == {
        "users": 3, "unknown": 1, "doubled": 1, "unknown_items": 1, "rows": 5,
    }  # fmt: skip
    rows = pq.read_table(out).to_pylist()
    history = PreparedHistories(tiny_run.data.root).get("u1")
    assert history is not None
    expected = tiny_run.predictor.score_items(history, ["i0", "i2"])["items"]
    assert [r["score"] for r in rows if r["user_id"] == "u1"] == pytest.approx([e["score"] for e in expected], rel=1e-5)
    before = Path(out, "_manifest.json").stat().st_mtime_ns
    assert batch.score(config, tiny_run.data, str(tiny_run.bundle_root), out, what="pairs") == counts
    assert Path(out, "_manifest.json").stat().st_mtime_ns == before
    pq.write_table(pa.table({"user_id": users[:2], "item_id": items[:2]}), uri)  # other pairs are another output
    assert batch.score(config, tiny_run.data, str(tiny_run.bundle_root), out, what="pairs")["rows"] == 2
    pq.write_table(pa.table({"user_id": ["u1", None], "item_id": ["i1", "i1"]}), uri)
    with pytest.raises(batch.ScoringError, match=r"scoring.pairs: .*1 row\(s\) without user_id; the first is row 1"):
        batch.score(config, tiny_run.data, str(tiny_run.bundle_root), out, what="pairs")
    assert verify(out)["rows"] == 2  # what was there stays


def test_histories_of_a_file_with_batches_by_trial(ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path) -> None:
    store = PreparedHistories(tiny_run.data.root)
    table = pa.concat_tables([pq.read_table(p) for p in sorted(Path(tiny_run.data.path("store")).glob("*.parquet"))]).select(
        ["user_id", "history_item_id", "history_time", "history_action_click", "history_action_rating"]
    )
    pq.write_table(table, tmp_path / "histories.parquet")
    config = scoring(tiny_run, histories=str(tmp_path / "histories.parquet"), batch_users="auto")
    counts = batch.score(config, tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / "out"))
    assert counts["users"] == len(store.user_ids()) == len(table) and verify(str(tmp_path / "out")) == counts
    rows = pq.read_table(tmp_path / "out").to_pylist()
    for user in ("u1", "u2"):
        history = store.get(user)
        assert history is not None
        plain = History(history.item_ids, history.times, history.actions)
        expected = tiny_run.predictor.recommend([plain], 5)[0]["items"]
        assert [r["item_id"] for r in rows if r["user_id"] == user] == [i["item_id"] for i in expected]
    twice = pa.concat_tables([table, table.slice(0, 1)])
    pq.write_table(twice, tmp_path / "histories.parquet")
    with pytest.raises(batch.ScoringError, match="a user_id stands in more than one row"):
        batch.score(config, tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / "out"))


def test_a_catalogue_in_parts_gives_the_same_lists(ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path) -> None:
    raw = tiny_run.config.model_dump(mode="json") | {"index": {"shards": 2}}
    found = {}
    for name, config in (("whole", tiny_run.config), ("parts", parse_config(raw))):
        batch.score(config, tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / name))
        found[name] = pq.read_table(tmp_path / name).to_pylist()
    assert [(r["user_id"], r["item_id"], r["rank"]) for r in found["parts"]] == [
        (r["user_id"], r["item_id"], r["rank"]) for r in found["whole"]
    ]
    index = ShardedIndex(str(tiny_run.bundle_root), 21, 3)
    query = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32))
    exclude, allowed = [np.array([0, 8, 20])] * 4, np.arange(21) % 4 != 1
    exact = tiny_run.predictor.exact.search(query, 21, exclude, allowed)
    for a, b in zip(index.search(query, 21, exclude, allowed), exact, strict=True):
        torch.testing.assert_close(a, b)
    index.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 22}, "scoring.k: 22 items of a list, and the catalogue has 21 to give"),
        ({"where": {"genre": ["odd"]}}, "scoring.where: 'genre' is no attribute of items"),
        ({"pairs": "x.parquet"}, "scoring.pairs: .* is what --what pairs reads"),
        ({"use_gpu": True}, "scoring.use_gpu with 1 workers, but the cluster has 0 GPUs"),
        ({"workers": 64}, "scoring.workers is 64"),
        ({"users": "nowhere.parquet"}, "scoring.users: nowhere.parquet: not found"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_written(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "workers" in settings:
        monkeypatch.setattr(batch, "shards_of_store", lambda data: [batch._shard(f"part-{n}") for n in range(64)])
    with pytest.raises((ValueError, RuntimeError), match=message):
        batch.score(scoring(tiny_run, **settings), tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_place_with_other_files_and_a_full_disk_publish_nothing(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "part-00000.parquet").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"out: not empty, and 'part-00000.parquet' \(1 such files\) is of no output of this kind"):
        batch.score(tiny_run.config, tiny_run.data, str(tiny_run.bundle_root), str(out))
    assert (out / "part-00000.parquet").read_bytes() == b"somebody's"

    class Full(batch._Actor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)

            def full(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            pq.ParquetWriter = full  # in the actor's process alone

    monkeypatch.setattr(batch, "_Actor", Full)
    with pytest.raises(StorageError, match=r"_part-0000\d-\w+\.parquet: cannot be written: .*No space left on device"):
        batch.score(tiny_run.config, tiny_run.data, str(tiny_run.bundle_root), str(tmp_path / "full"))
    assert not list((tmp_path / "full").rglob("*.parquet")) and not list((tmp_path / "full").rglob("*.json"))
