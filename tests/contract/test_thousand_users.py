"""The contract of DESIGN §1.6 on 1,000 users, with the exact index and with the approximate one on all callers.

The stages of the service run in this process here; over HTTP, in processes of its own, it is in test_same_answers.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.ivf import IvfIndex, build_ivf
from mtrec_ray.scoring.batch import score
from mtrec_ray.serving.api import RecommendRequest
from mtrec_ray.serving.deployments import Heads, Here, Retrieval, StateEncoder
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.ingress import Ingress
from mtrec_ray.serving.settings import ServingSettings
from mtrec_ray.training.worker import load_schema
from tests import tiny
from tests.contract.test_same_answers import assert_same

pytestmark = [pytest.mark.ray, pytest.mark.slow]
USERS, ITEMS, K = 1000, 500, 10


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
    store = PreparedHistories(data.root)
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


@pytest.fixture
def ingress(run: tuple[Path, RunConfig, Predictor]) -> Any:
    """The ingress with its three stages, without Serve between them."""
    root, data = str(run[0] / "bundle"), str(run[0] / "data")
    stages = [Here(d.func_or_class(root)) for d in (StateEncoder, Retrieval, Heads)]
    return Ingress.func_or_class.__mro__[1](root, data, *stages, settings=ServingSettings(deadline_ms=60_000))


def test_predictor_batch_and_http_agree_for_a_thousand_users(
    ray_cluster: Any, ingress: Any, run: tuple[Path, RunConfig, Predictor]
) -> None:
    folder, config, predictor = run
    assert isinstance(predictor.index, IvfIndex) == (folder.name == "ivf")
    store = PreparedHistories(str(folder / "data"))
    users = list(store.user_ids())
    assert len(users) == USERS
    counts = score(config, storage.Directory(str(folder / "data")), str(folder / "bundle"), str(folder / "scores"))
    assert counts["users"] == USERS
    batch: dict[str, list[dict[str, Any]]] = {u: [] for u in users}
    for row in pq.read_table(folder / "scores").to_pylist():
        batch[row["user_id"]].append(row)

    async def ask() -> dict[str, Any]:
        return {u: await ingress.recommend(RecommendRequest(user_id=u, k=K)) for u in users}

    online = asyncio.run(ask())
    for part in np.array_split(np.array(users), 10):
        histories = [store.get(u) for u in part.tolist()]
        here = predictor.recommend([h for h in histories if h is not None], K)
        for user, mine in zip(part.tolist(), here, strict=True):
            assert len(mine["items"]) == K
            assert_same(mine["items"], batch[user])
            assert online[user]["bundle"] == predictor.fingerprint
            assert_same(online[user]["items"], batch[user])
