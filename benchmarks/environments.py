"""Other systems' own environments, made on the first use below runs/bench/peers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.common import read_points

ROOT = Path("runs/bench/peers")
SCRIPTS = Path(__file__).parent / "peers"
TORCH, PANDAS = "torch==2.13.0", "pandas==2.3.3"
PACKAGES = {
    "rectools": [[TORCH, "rectools[torch]==0.19.0"]],
    "recbole": [
        [TORCH, "numpy==1.23.5", "scipy==1.10.1", "pandas==1.5.3", "scikit-learn==1.2.2", "colorlog==4.7.2", "colorama==0.4.4",
         "pyyaml", "tensorboard", "thop", "tabulate", "plotly", "texttable", "psutil", "tqdm", "setuptools<80"],
        ["--no-deps", "recbole==1.2.1"],  # it asks for a Ray of 2023
    ],
    "implicit": [["implicit==0.7.3", PANDAS]],
    "surprise": [["scikit-surprise==1.1.5", PANDAS]],
    "torch_rechub": [[TORCH, "torch-rechub==0.9.0", PANDAS]],
    "deepctr_torch": [[TORCH, "deepctr-torch==0.3.0", "requests==2.32.5", PANDAS]],
}  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def environment(name: str) -> str:
    """The interpreter of a peer's own environment."""
    folder = ROOT / name
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for packages in PACKAGES[name]:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            subprocess.run(command, check=True)
        done.touch()
    return str(python.absolute())


def run_script(name: str, command: list[str], folder: str | None = None) -> list[dict[str, Any]]:
    """What a script told (benchmarks/peers/common.py), run with one thread. Raises RuntimeError with its last words."""
    done = subprocess.run(command, env=os.environ | ONE_THREAD, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return read_points(done.stdout)
