"""Write every user's top list, or prove those that are there.

python -m jobs.score --config jobs/configs/ml100k.yaml --out runs/ml100k [key=value ...]
python -m jobs.score --verify runs/ml100k

A killed run goes on with the shards that are missing. `--verify` reads every shard again: checksums, counts, ranks, no user twice.
"""

from __future__ import annotations

import sys

from jobs.command import USER_ERRORS, main, plain
from mtrec_ray import storage
from mtrec_ray.scoring.shards import verify


def prove(run: str) -> int:
    """Exit code 0 when the top lists of a run are what their manifest says, else 2 with what is wrong."""
    try:
        counts = verify(storage.join(storage.absolute(run), "scores"))
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    users, rows, fallbacks = (counts[key] for key in ("users", "rows", "fallbacks"))
    print(f"verified: {users} users, {rows} rows, {fallbacks} users by the popularity list, {counts['bytes']} bytes")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--verify":
        sys.exit(prove(sys.argv[2]))
    sys.exit(main(("score",), "Write every user's top list; --verify RUN proves those that are there."))
