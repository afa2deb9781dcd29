"""Training that begins with a bundle's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import ConfigError, RunConfig
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.warm import WarmStartError, carry
from mtrec_ray.training.worker import build_model, load_schema, tell_items, training_fingerprint, warm_start
from tests import tiny
from tests.conftest import TinyRun


def fresh(config: RunConfig, data: storage.Directory) -> tuple[Any, list[str]]:
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    model = build_model(config, load_schema(data.prefix), None)
    tell_items(model, catalogue)
    return model, catalogue["item_id"].to_pylist()


def test_the_same_data_get_the_same_weights(tiny_run: TinyRun) -> None:
    model, ids = fresh(tiny_run.config.model_copy(update={"seed": 9}), tiny_run.data)
    old = tiny_run.predictor
    told = carry(model, ids, old.model.state_dict(), old.model, old.item_ids)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, old.model.state_dict()[name]), name
    assert told.fresh == [] and not any(told.by_name.values())
    assert set(told.whole) | set(told.by_name) == set(model.state_dict())


def other_data(tmp_path: Path, **model: Any) -> tuple[RunConfig, storage.Directory]:
    """Data of which items, values and classes have other numbers than in the tiny run's."""
    tiny.write_log(tmp_path, users=30, items=26, seed=3)
    text = (tmp_path / "items.csv").read_text().replace("i7,", "aa7,")
    (tmp_path / "items.csv").write_text(text)
    for file in (tmp_path / "log").glob("*.csv"):
        file.write_text(
            file.read_text().replace(",i7,", ",aa7,").replace("phone", "zzz").replace("web", "phone").replace("zzz", "aaa")
        )
    users = (tmp_path / "users.csv").read_text().splitlines()
    (tmp_path / "users.csv").write_text("\n".join([*users, "stranger,another,20"]))
    config = tiny.make_config(tmp_path, lambda raw: raw["model"].update(model))
    return config, tiny.prepare_locally(config, tmp_path / "data")


def test_what_has_a_name_goes_where_the_name_is_now(tiny_run: TinyRun, tmp_path: Path) -> None:
    config, data = other_data(tmp_path)
    model, ids = fresh(config, data)
    old = tiny_run.predictor
    anew = {n: v.clone() for n, v in model.state_dict().items()}
    told = carry(model, ids, old.model.state_dict(), old.model, old.item_ids)
    state, before = model.state_dict(), old.model.state_dict()
    trained, known = model.schema.n_train_items, old.schema.n_train_items
    table, was = state["item_tower.residual.table.weight"], before["item_tower.residual.table.weight"]
    assert ids[:trained] != old.item_ids[:known]
    for row, item in enumerate(ids[:trained]):
        place = old.position.get(item, -1)
        expected = was[place] if 0 <= place < known else torch.zeros_like(table[row])
        assert torch.equal(table[row], expected), item
    [here] = [c for c in model.schema.context if c.name == "device"]
    [there] = [c for c in old.schema.context if c.name == "device"]
    assert here.values != there.values
    name = "tokens.context.device.embedding.weight"
    for row, value in enumerate(here.values, start=2):
        expected = before[name][2 + there.values.index(value)] if value in there.values else anew[name][row]
        assert torch.equal(state[name][row], expected), value
    wide = "tasks.taste.wide.weight.weight"
    item = next(i for i in ids[:trained] if 0 <= old.position.get(i, -1) < known)
    classes, knew = model.tasks["taste"].classes, old.model.tasks["taste"].classes
    for column, value in enumerate(classes):
        if value in knew:
            assert state[wide][ids.index(item), column] == before[wide][old.position[item], knew.index(value)]
            assert state["tasks.taste.bias"][column] == before["tasks.taste.bias"][knew.index(value)]
    assert told.by_name["item_tower.residual.table.weight"] == sum(not 0 <= old.position.get(i, -1) < known for i in ids[:trained])
    assert "new rows" in told.text()


@pytest.mark.slow
def test_another_trunk_is_refused_and_a_new_task_begins_anew(tiny_run: TinyRun, tmp_path: Path) -> None:
    old = tiny_run.predictor
    config, data = other_data(tmp_path, width=24, sharing_width=16)
    model, ids = fresh(config, data)
    with pytest.raises(WarmStartError, match=r"has the shape .* in the bundle.*keep the section `model`"):
        carry(model, ids, old.model.state_dict(), old.model, old.item_ids)
    tasks = tiny.make_config(tmp_path, lambda raw: raw["tasks"].update(like={"kind": "binary", "label": "like"}))
    data = tiny.prepare_locally(tasks, tmp_path / "more")
    model, ids = fresh(tasks, data)
    told = carry(model, ids, old.model.state_dict(), old.model, old.item_ids)
    assert told.fresh == ["tasks.like.head.weight", "tasks.like.head.bias"] and "begun anew: tasks.like" in told.text()


def test_hashed_residuals_are_carried_as_they_are(tmp_path: Path) -> None:
    config, data = other_data(tmp_path, id_buckets=7)
    old, ids = fresh(config, data)
    model, _ = fresh(config.model_copy(update={"seed": 5}), data)
    buckets = model.item_tower.residual.bucket_N2.clone()
    carry(model, ids, old.state_dict(), old, ids)
    assert torch.equal(model.item_tower.residual.table.weight, old.item_tower.residual.table.weight)
    assert torch.equal(model.item_tower.residual.bucket_N2, buckets)


def test_a_run_that_begins_warm_begins_there_and_has_an_identity_of_its_own(tiny_run: TinyRun, tmp_path: Path) -> None:
    def of(uri: str | None) -> RunConfig:
        return tiny_run.config.model_copy(update={"train": tiny_run.config.train.model_copy(update={"warm_start": uri})})

    model, _ = fresh(of(None), tiny_run.data)
    warm_start(model, of(tiny_run.bundle_root), storage.read_table(tiny_run.data.path("catalogue.parquet")))
    old: Predictor = bundle.load(tiny_run.bundle_root)
    assert all(torch.equal(v, old.model.state_dict()[n]) for n, v in model.state_dict().items())
    cold, begun = (training_fingerprint(of(uri), tiny_run.data, None) for uri in (None, tiny_run.bundle_root))
    assert cold == training_fingerprint(tiny_run.config, tiny_run.data, None) != begun
    assert training_fingerprint(of(str(tiny_run.folder)), tiny_run.data, None) == begun  # what it is, not where
    with pytest.raises(storage.StorageError, match="nowhere"):
        training_fingerprint(of(str(tmp_path / "nowhere")), tiny_run.data, None)


def test_a_text_encoder_that_is_trained_too_names_its_own_beginning(tiny_folder: Path) -> None:
    def tuned(raw: dict[str, Any]) -> None:
        tiny.with_item_texts(tiny_folder)(raw)
        raw["encoder"]["tuning"] = {}
        raw["train"]["warm_start"] = "runs/other"

    with pytest.raises(ConfigError, match=r"train\.warm_start: with encoder\.tuning"):
        tiny.make_config(tiny_folder, tuned)
