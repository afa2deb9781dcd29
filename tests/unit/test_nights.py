"""What is written down of nights: names, what each is compared with, what stays, where a rollback leads. No Ray, no training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtrec_ray import bundle, nightly, storage
from mtrec_ray.nightly import Night, Nights, Settings, roll_back
from mtrec_ray.pipeline import Run
from tests import tiny

Ended = Callable[[Nights, str, str], Night]


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> Ended:
    """A night of some data gets a verdict, and a bundle."""
    monkeypatch.setattr(nightly, "_promote", lambda nights, run: None)

    def ended(nights: Nights, data: str, verdict: str) -> Night:
        night = nights.of(data)
        storage.write_json(storage.join(nights.folder(night.name), "bundle", "manifest.json"), {})
        nights.serving = night.name if verdict == "live" else nights.serving
        return nightly._ended(nights, night, verdict)

    return ended


def back(root: Path, folder: Path) -> str:
    tiny.write_log(folder)
    return roll_back(tiny.make_config(folder), str(root)).name


def test_a_name_is_given_once(tmp_path: Path, end: Ended) -> None:
    nights = Nights(str(tmp_path))
    first, second = end(nights, "a", "live"), end(nights, "b", "held back")
    third = end(nights, "a", "live")  # b's file was removed, and all was prepared anew
    assert third.name == f"{first.name}-2" and third.before == first.name and len({first.name, second.name, third.name}) == 3
    assert nights.of("a") is third and nights.of("a", again=True).name == f"{first.name}-3"
    assert nights.of("a", again=True).name == f"{first.name}-3"  # it is not over: it goes on
    assert [n.name for n in Nights(str(tmp_path)).nights] == [n.name for n in nights.nights]


def test_a_night_that_is_not_over_is_compared_with_what_serves_now(tmp_path: Path, end: Ended) -> None:
    root = tmp_path / "out"
    nights = Nights(str(root))
    first, second = end(nights, "a", "live"), end(nights, "b", "live")
    assert end(nights, "c", "held back").before == second.name
    assert back(root, tmp_path / "log") == first.name
    nights = Nights(str(root))
    assert nights.of("c").before == first.name and Nights(str(root)).nights[-1].before == first.name
    assert nights.nights[1].verdict == "rolled back" and nights.nights[1].before == first.name


def test_after_a_rollout_that_was_stopped_a_rollback_leads_to_what_served(tmp_path: Path, end: Ended) -> None:
    root = tmp_path / "out"
    nights = Nights(str(root))
    end(nights, "a", "live")
    second, third = end(nights, "b", "live"), end(nights, "c", "rolling out")
    assert back(root, tmp_path / "log") == second.name
    nights = Nights(str(root))
    assert nights.serving == second.name and [n.verdict for n in nights.nights] == ["live", "live", "rolled back"]
    assert nights.of("c").name == third.name  # and stays so by itself


def test_nights_that_were_held_back_do_not_stay_for_ever(tmp_path: Path, end: Ended) -> None:
    nights = Nights(str(tmp_path))
    end(nights, "0", "held back")
    nightly._forget_old(nights, 1)
    assert Path(nights.folder(nights.nights[0].name)).exists()
    served = [end(nights, data, "live").name for data in ("a", "b")]
    held: list[Any] = [end(nights, str(n), "held back").name for n in range(1, 5)]
    nightly._forget_old(nights, 2)
    assert {p.name for p in (tmp_path / "nights").iterdir()} == {*served, *held[-2:]}


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["its own", "another", "its own elsewhere"])
def test_what_serves_is_judged_with_the_texts_as_it_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    config, data, _, old = tiny.write_shop(tmp_path)
    root, place = tmp_path / "out", tmp_path / ("encoder" if encoder == "its own" else "encoder2")
    if encoder == "another":
        tiny.write_encoder(place, seed=1)
    elif encoder == "its own elsewhere":
        shutil.copytree(tmp_path / "encoder", place)
    today = config.model_copy(update={"encoder": config.encoder.model_copy(update={"model": str(place)})})  # type: ignore[union-attr]
    tiny.encode_locally(today, data, root / "text")
    shutil.copytree(tmp_path / "data", root / "data")
    shutil.copytree(tmp_path / "bundle", root / "nights" / "first" / "bundle")
    storage.Directory(root / "nights" / "first" / "train").publish("t" * 64, training={"best_epoch": 1})
    monkeypatch.setattr(Run, "_evaluate", lambda self: True)
    run = nightly.carried(today, Nights(str(root)), Night("second", "d", before="first"))
    found = bundle.load(storage.join(run.bundle.root, run._bundle_inputs()[:16]))
    torch.testing.assert_close(found.item_vec_ND, old.item_vec_ND)
    assert storage.exists(run.trained.path("text.safetensors")) == (encoder == "another")
    assert {**(found.text_encoder or {}), "model": ""} == {**(old.text_encoder or {}), "model": ""}


def test_a_gate_of_no_task_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    settings = Settings(gates=("click/auc", "week|klick/auc"))
    with pytest.raises(ValueError, match=r"--gate week\|klick/auc: there is no task 'klick'; known are .*'click'"):
        nightly._check_gates(tiny.make_config(tmp_path), Nights(str(tmp_path / "out")), Night("n", "d"), settings)
