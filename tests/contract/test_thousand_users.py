"""The contract of DESIGN §1.6 on 1,000 users, with the exact index and with the approximate one on all callers.

HTTP, which is what takes time here, answers every fifth of them; all of them with MTREC_ALL_USERS=1.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.ivf import IvfIndex, build_ivf
from mtrec_ray.scoring.batch import score
from mtrec_ray.serving.history import HistoryStore
from mtrec_ray.training.worker import load_schema
from tests import tiny
from tests.contract.test_same_answers import assert_same

pytestmark = [pytest.mark.ray, pytest.mark.slow]
USERS, ITEMS, K = 1000, 500, 10
EVERY = 1 if os.environ.get("MTREC_ALL_USERS") == "1" else 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig, Predictor]:
    folder = tmp_path_factory.mktemp("thousand")
    tiny.write_log(folder, users=USERS, items=ITEMS, visits=6, seed=1)

    def change(raw: dict[str, Any]) -> None:
        raw["data"]["exclude_seen"] = True
        raw["tasks"]["rating"]["final_weight"] = 0.3
        raw["train"] |= {"epochs": 1, "batch_windows": 64}
        raw["ranking"] = {"candidates": 60}
        raw["scoring"] = {"k": K, "workers": 2}

    config = tiny.make_config(folder, change)
    data = tiny.prepare_locally(config, folder / "data")
    return folder, config, tiny.write_bundle(config, data, tiny.train_locally(config, data), folder / "plain")


@pytest.fixture(scope="module", params=["exact", "ivf"])
def run(request: pytest.FixtureRequest, trained: tuple[Path, RunConfig, Predictor]) -> tuple[Path, RunConfig, Predictor]:
    """A run of its own with either index."""
    folder, config, predictor = trained
    mine = folder / request.param
    mine.mkdir()
    (mine / "data").symlink_to(folder / "data")
    data, directory = storage.Directory(str(mine / "data")), storage.Directory(str(mine / "bundle"))
    store = HistoryStore(data.root)
    histories = [h for u in store.user_ids()[:300] if (h := store.get(u))]
    with torch.no_grad():
        query = predictor.model.retrieval.query(predictor.encode_state(predictor.encode_histories(histories).batch))
    index = build_ivf(predictor.item_vec_ND, query, 60, lists=12) if request.param == "ivf" else None
    prefix = directory.begin("1" * 64)
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    fingerprint = bundle.write(prefix, config, load_schema(data.prefix), catalogue, predictor.model, None, index)
    storage.write_json(storage.join(prefix, "metrics.json"), {})
    directory.publish("1" * 64, kind="bundle", fingerprint=fingerprint, data=data.manifest["inputs"])
    return mine, config, bundle.load(directory.root)


@pytest.fixture(scope="module")
def client(ray_cluster: Any, run: tuple[Path, RunConfig, Predictor]) -> Iterator[httpx.Client]:
    from ray import serve

    from serve_apps.recommend import Args, build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {n: {"ray_actor_options": {"num_cpus": 0.1}} for n in ("Ingress", "StateEncoder", "Retrieval", "Heads")}
    serve.run(build(Args(run=str(run[0]), options=options)), name="thousand", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as c:
        yield c
    serve.shutdown()


def test_predictor_batch_and_http_agree_for_a_thousand_users(
    ray_cluster: Any, client: httpx.Client, run: tuple[Path, RunConfig, Predictor]
) -> None:
    folder, config, predictor = run
    assert isinstance(predictor.index, IvfIndex) == (folder.name == "ivf")
    store = HistoryStore(str(folder / "data"))
    users = list(store.user_ids())
    assert len(users) == USERS
    counts = score(config, storage.Directory(str(folder / "data")), str(folder / "bundle"), str(folder / "scores"))
    assert counts["users"] == USERS
    batch: dict[str, list[dict[str, Any]]] = {u: [] for u in users}
    for row in pq.read_table(folder / "scores").to_pylist():
        batch[row["user_id"]].append(row)
    asked = users[::EVERY]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda u: client.post("/recommend", json={"user_id": u, "k": K}).json(), asked)
        answers = dict(zip(asked, found, strict=True))
    for part in np.array_split(np.array(users), 10):
        histories = [store.get(u) for u in part.tolist()]
        here = predictor.recommend([h for h in histories if h is not None], K)
        for user, mine in zip(part.tolist(), here, strict=True):
            assert len(mine["items"]) == K
            assert_same(mine["items"], batch[user])
            if user in answers:
                assert answers[user]["bundle"] == predictor.fingerprint
                assert_same(answers[user]["items"], batch[user])
