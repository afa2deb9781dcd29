"""Exact top-100 of every user over the whole catalogue, one thread: `python -m benchmarks.exact_topk`.

200,000 users × 100,000 items × 64 numbers. Beside the index of the predictor stand a plain torch product with `topk` at its best
block of users, `implicit`'s batch `recommend` on the same vectors, and the matrix product alone (at its best block of users and
items) as what the machine could do. All take turns, a block of users after the other, and each side's seconds are summed.
The seen filter is measured with what a user of MovieLens has seen in the middle, 65 items.

Value: users per second over implicit's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.report import finish
from mtrec_ray.retrieval.exact import ExactIndex

WIDTH, K, SEEN = 64, 100, 65
BLOCKS = (16, 32, 64, 128, 256)
PRODUCTS = ((64, 100_000), (128, 2048), (256, 1024), (512, 1024))
"""Users × items of the product alone."""
LIMIT = 0.10

Side = Callable[[NDArray[np.int64]], Any]


def peer_of(user_UD: NDArray[np.float32], item_ND: NDArray[np.float32]) -> Side:
    """implicit's own model with these factors."""
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(factors=WIDTH, num_threads=1)
    model.user_factors, model.item_factors = user_UD, item_ND
    return lambda users: model.recommend(users, None, N=K, filter_already_liked_items=False)


def plain(user: torch.Tensor, item: torch.Tensor, block: int) -> Side:
    def side(users: NDArray[np.int64]) -> None:
        for part in torch.split(torch.from_numpy(users), block):
            torch.topk(user[part] @ item.T, K, dim=1)

    return side


def product(user: torch.Tensor, item: torch.Tensor, block: int, items: int) -> Side:
    def side(users: NDArray[np.int64]) -> None:
        for part in torch.split(torch.from_numpy(users), block):
            query = user[part]
            for piece in torch.split(item, items):
                query @ piece.T

    return side


def per_second(side: Side, users: NDArray[np.int64]) -> float:
    started = time.perf_counter()
    side(users)
    return len(users) / (time.perf_counter() - started)


def measure(users: int, items: int, block: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    user_UD, item_ND = (rng.standard_normal((n, WIDTH), dtype=np.float32) for n in (users, items))
    user, item = torch.from_numpy(user_UD), torch.from_numpy(item_ND)
    index, nothing = ExactIndex(item), [np.zeros(0, np.int64)] * block
    seen = [np.sort(rng.choice(items, SEEN, replace=False)) for _ in range(block)]
    probe = np.arange(512)
    blocks = {b: per_second(plain(user, item, b), probe) for b in BLOCKS}
    products = {(b, n): per_second(product(user, item, b, n), probe) for b, n in PRODUCTS}
    best, shape = max(blocks, key=lambda b: blocks[b]), max(products, key=lambda p: products[p])
    sides: dict[str, Side] = {
        "here": lambda u: index.search(user[torch.from_numpy(u)], K, nothing[: len(u)]),
        "here, seen filter": lambda u: index.search(user[torch.from_numpy(u)], K, seen[: len(u)]),
        "implicit": peer_of(user_UD, item_ND),
        "torch product and topk": plain(user, item, best),
        "product alone": product(user, item, *shape),
    }
    check(sides, probe)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for begin in range(0, users, block):
        ids = np.arange(begin, min(begin + block, users))
        for name, side in sides.items():
            taken[name].append(len(ids) / per_second(side, ids))
        print(f"{ids[-1] + 1} of {users} users", file=sys.stderr, flush=True)
    speed = {name: users / sum(seconds) for name, seconds in taken.items()}
    each = {n: [a / b for a, b in zip(taken[n], taken["here"], strict=True)] for n in taken}
    return {
        "users": users, "items": items, "width": WIDTH, "k": K, "block": block, "users_per_second": speed,
        "torch_block": best, "torch_blocks": {str(b): v for b, v in blocks.items()},
        "product_shape": shape, "product_gflops": speed["product alone"] * items * WIDTH * 2 / 1e9,
        "share_of_the_product": speed["here"] / speed["product alone"],
        "over_torch": speed["here"] / speed["torch product and topk"], "ratio": speed["here"] / speed["implicit"],
        "ratio_of_blocks": [float(np.quantile(each["implicit"], q)) for q in (0.0, 0.5, 1.0)],
        "filter_cost": 1 - speed["here, seen filter"] / speed["here"], "seen": SEEN,
    }  # fmt: skip


def check(sides: dict[str, Side], users: NDArray[np.int64]) -> None:
    """Raises AssertionError unless implicit finds the same items, but for those that are nearer than rounding."""
    mine, theirs = sides["here"](users)[0].numpy(), sides["implicit"](users)[0]
    same = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(mine, theirs, strict=True)])
    assert same > 0.9999, same


def main() -> int:
    parser = argparse.ArgumentParser(description="Exact top-k of every user, one thread.")
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--block", type=int, default=4096, help="users of a turn")
    args = parser.parse_args()
    with threadpool_limits(1):
        found = measure(args.users, args.items, args.block)
    print(json.dumps(found["users_per_second"]))
    ok = found["ratio"] >= 1 and found["over_torch"] > 1 and found["filter_cost"] < LIMIT
    target = f">= 1.0, faster than torch, seen filter < {LIMIT:.0%}"
    return finish("exact_topk", found["ratio"], "users per second over implicit's", target, ok, found)


if __name__ == "__main__":
    sys.exit(main())
