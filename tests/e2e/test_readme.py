"""README's commands as they stand there, on a tiny log under the names of the large one."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.unit.test_pretraining import write_checkpoint

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]
ELSEWHERE = ("jobs.fetch", "jobs.serve", "jobs.submit")
"""What fetches, serves for ever, or wants a cluster and a bucket: the demo, the tutorial and the cluster's test run it."""
FEWER = {"jobs.tune": ["--trials", "2"]}
CODES = {"jobs.tasks": (0, 3)}
"""Two epochs of a tiny log may well break a gate."""


def commands() -> list[list[str]]:
    """Every `python -m jobs.NAME` of README's blocks, without what follows a #."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[2:] for words in lines if words[:2] == ["python", "-m"] and words[2] not in ELSEWHERE]


def write_runs(folder: Path) -> None:
    tiny.write_log(folder, users=40)
    raw = tiny.raw_config(folder)
    raw["train"] |= {"epochs": 2, "workers": 0}
    raw["data"]["partitions"] = 1  # one actor has it all
    raw["tasks"] = {name: raw["tasks"][name] for name in ("retrieval", "rating", "click")}
    raw["evaluation"] |= {"baselines": ["popularity"]}
    raw["pretrain"] = {"model": str(write_checkpoint(folder / "bert")), "block": 16, "batch_blocks": 4, "workers": 1}
    space = {"search": {"train.learning_rate": {"log_uniform": [0.001, 0.01]}}, "asha": {"first_rung": 1, "reduction": 2}}
    for name, content in (("shop.yaml", raw), ("jobs/configs/ml100k.yaml", raw), ("jobs/configs/tune/ml100k.yaml", space)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(content))


def test_every_command_of_the_readme_runs(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = []
    for module, *arguments in commands():
        if module == "jobs.compare":  # of two runs that somebody has made
            for name in arguments[:2]:
                shutil.copytree("runs/ml100k", name)
        monkeypatch.setattr(sys, "argv", [module, *arguments, *FEWER.get(module, [])])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert ended.value.code in CODES.get(module, (0,)), (module, arguments, capsys.readouterr().err[-2000:])
        ran.append(module)
    assert ran == ["jobs.pipeline", "jobs.tasks", "jobs.tune", "jobs.pretrain", "jobs.compare", "jobs.nightly"]
    for made in ("ml100k/metrics.json", "ml100k/report.html", "ml100k/bundle", "ml100k-tune/best.yaml", "ml100k-tune/tune.html",
                 "nights/nightly.json"):  # fmt: skip
        assert Path("runs", made).exists(), made
    assert list(Path("runs").rglob("tasks.html")) and list(Path("runs").rglob("tasks.json"))
