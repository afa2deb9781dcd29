"""Mathematics must run without Ray: importing those rooms does not import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent / "mtrec_ray"
ROOMS = ["models", "tasks", "balancing", "retrieval", "evaluation", "training", "encoders", "multitask", "tuning", "pretraining"]
ADAPTERS = {
    "training/trainer.py", "evaluation/runner.py", "encoders/bulk.py", "pretraining/trainer.py", "tuning/search.py",
    "tuning/job.py",
}  # fmt: skip
SINGLE = [
    "config", "lock.py", "tracking.py", "features.py", "feature_fit.py", "diversity.py",
    "golden.py", "schema.py", "hashing.py", "expressions.py", "storage.py", "bundle.py", "histories.py", "predictor.py",
    "serving/history.py", "serving/api.py", "serving/store.py", "serving/sqlite_store.py", "serving/redis_store.py",
    "serving/settings.py", "serving/guard.py", "serving/export.py", "serving/items.py", "serving/impressions.py",
    "serving/stages.py", "serving/remembered.py", "serving/versions.py", "serving/work.py",
    "scoring/shards.py", "scoring/tables.py", "scoring/asked.py", "scoring/batch_size.py", "scoring/export.py",
    "data/partition.py", "data/windows.py", "data/sources", "data/validate.py", "data/catalogue.py", "data/shuffle.py",
    "data/ids.py", "data/lineage.py", "data/long.py", "data/maturity.py", "data/events.py", "data/fit.py", "data/build.py",
    "data/forget.py", "privacy.py",
]  # fmt: skip


def modules() -> list[str]:
    files = [p for room in ROOMS for p in sorted((ROOT / room).glob("*.py"))] + [ROOT / s for s in SINGLE]
    relative = [p.relative_to(ROOT) for p in files if str(p.relative_to(ROOT)) not in ADAPTERS]
    return ["mtrec_ray." + ".".join(r.with_suffix("").parts).removesuffix(".__init__") for r in relative]


@pytest.mark.slow
def test_the_rooms_without_ray_do_not_import_ray() -> None:
    program = "import sys\nfor m in sys.argv[1:]:\n    __import__(m)\n    assert 'ray' not in sys.modules, m"
    done = subprocess.run([sys.executable, "-c", program, *modules()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_adapters_are_really_adapters() -> None:
    """The list of exceptions above stays honest: each of them does import Ray, or the pipeline that does."""
    for name in ADAPTERS:
        text = (ROOT / name).read_text()
        assert any(f"{word} {what}" in text for word in ("import", "from") for what in ("ray", "mtrec_ray.pipeline")), name


@pytest.mark.parametrize("room", ["mtrec_ray", "serve_apps"])
def test_no_room_imports_the_jobs(room: str) -> None:
    for path in (ROOT.parent / room).rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("from jobs", "import jobs")), f"{path}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [("jobs.pipeline, mtrec_ray.pipeline", "sklearn matplotlib transformers ray.serve"), ("jobs.submit", "sklearn torch")],
)
def test_a_job_starts_without_what_it_may_never_need(modules: str, unwanted: str) -> None:
    """Every job, and every worker that it starts, would wait for it."""
    code = f"import sys, {modules}; print(sorted(set({unwanted.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"
