"""The training step on a GPU: `python -m benchmarks.gpu_step [--device cuda]`.

The loop's own optimiser step with five tasks (retrieval, rating, two binary ones, a profile) on batches that lie on the device,
windows full. Per variant: median seconds of a step, history tokens (windows x positions) and targets per second, model FLOPs
of a step (matrix products of forward and backward, counted by torch's FlopCounterMode in one float32 step), their utilisation
= FLOPs per second ÷ the bfloat16 rate of an 8192³ product measured in the same run, peak memory, the kernels that take longest.
Value: utilisation of the best large variant. `--device cpu` runs it at small sizes, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import finish
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.models.batch import GAP_BUCKETS, Batch, HistoryBatch, TargetBatch
from mtrec_ray.schema import ActionSpec, AttributeSpec, LabelStats, LogSchema
from mtrec_ray.training.step import Losses, build_losses, build_optimizer, train_step, working_precision
from mtrec_ray.training.worker import build_model

DATASHEET = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s by the vendor's datasheet (SXM)."""
WARM_UP, ROUNDS, BATCHES = 3, 5, 4


@dataclass(frozen=True)
class Size:
    """Of model and batch."""

    width: int
    layers: int
    heads: int
    feed_forward: int
    window: int
    windows: int
    items: int
    negatives: int | None


SMALL = Size(64, 2, 2, 256, 100, 32, 2_000, None)
"""That of ML-100K."""
LARGE = Size(512, 8, 8, 2048, 200, 256, 50_000, 4096)
TINY = Size(16, 1, 2, 32, 10, 4, 50, 20)


def config_of(size: Size, trunk: str, precision: str, compiled: bool = False, balancing: str = "static") -> RunConfig:
    retrieval: dict[str, Any] = {"kind": "retrieval"}
    if size.negatives:
        retrieval |= {"loss": "sampled_softmax", "negatives": size.negatives}
    return parse_config({
        "name": "gpu",
        "data": {
            "interactions": {"path": "unused"}, "users": {"path": "unused"}, "window": size.window, "same_time": "order",
            "labels": {"rating": {}, "like": {"kind": "binary"}, "buy": {"kind": "binary"}},
            "actions": ["rating"], "attributes": {"group": {"column": "group"}},
        },
        "model": {"trunk": trunk, "width": size.width, "layers": size.layers, "heads": size.heads,
                  "feed_forward": size.feed_forward},
        "tasks": {
            "retrieval": retrieval, "rating": {"kind": "regression", "label": "rating", "weight": 0.3},
            "like": {"kind": "binary", "label": "like", "weight": 0.1}, "buy": {"kind": "binary", "label": "buy", "weight": 0.1},
            "group": {"kind": "profile", "attribute": "group", "weight": 0.01},
        },
        "balancing": {"kind": balancing},
        "train": {"workers": 0, "precision": precision, "compile": compiled},
    })  # fmt: skip


def schema_of(size: Size) -> LogSchema:
    half, rating = LabelStats(count=1, mean=0.5, std=0.5), LabelStats(count=1, mean=3.0, std=1.4)
    return LogSchema(window=size.window, same_time="order", exclude_seen=False, protocol="time",
                     labels={"rating": rating, "like": half, "buy": half},
                     actions=(ActionSpec(name="rating", mean=3.0, std=1.4),),
                     attributes=(AttributeSpec(name="group", classes=("a", "b", "c", "d")),),
                     n_items=size.items, n_train_items=size.items)  # fmt: skip


def batch_of(size: Size, step: int) -> Batch:
    """Full windows; every event is a target."""
    generator = torch.Generator().manual_seed(step)
    B, S = size.windows, size.window - 1

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    item_BS = (size.items * uniform(B, S) ** 3).long()
    rating_BS = (1 + 5 * uniform(B, S)).floor()
    history = HistoryBatch(item_BS, torch.full((B,), S), (GAP_BUCKETS * uniform(B, S)).long(),
                           torch.arange(S).mul(60_000).expand(B, S).contiguous(), {"rating": rating_BS})  # fmt: skip
    labels = {"rating": rating_BS.flatten(), "like": (rating_BS >= 4).float().flatten(), "buy": (uniform(B * S) < 0.05).float()}
    targets = TargetBatch(torch.arange(B).repeat_interleave(S), torch.arange(S).repeat(B), item_BS.flatten(),
                          torch.ones(B * S, dtype=torch.bool), labels, {})  # fmt: skip
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(history, targets, {"group": (4 * uniform(B)).long()}, torch.ones(B), none, none, step)


def build(config: RunConfig, size: Size, device: torch.device) -> tuple[Losses, torch.optim.Optimizer]:
    """As the loop builds them (training/loop.py)."""
    losses = build_losses(config, build_model(config, schema_of(size), None).train()).to(device)
    if config.train.compile:
        losses.model.trunk.compile(dynamic=True)
    return losses, build_optimizer(losses, config.train)


def count_flops(size: Size, trunk: str, device: torch.device) -> float:
    """FLOPs of the matrix products of a step's forward and backward pass."""
    config = config_of(size, trunk, "float32")
    losses, optimizer = build(config, size, device)
    with FlopCounterMode(display=False) as counter:
        train_step(losses, optimizer, [batch_of(size, 0).to(device)])
    return float(counter.get_total_flops())


def matmul_rate(device: torch.device) -> float:
    """bfloat16 FLOP/s of a large product."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [_seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * n**3 / median(seconds[2:])


def measure(size: Size, trunk: str, precision: str, compiled: bool, tf32: bool, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step, and what it was made of."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    config = config_of(size, trunk, precision, compiled)
    losses, optimizer = build(config, size, device)
    working = working_precision(config, device)
    batches = [batch_of(size, i).to(device) for i in range(BATCHES)]
    began = time.perf_counter()
    for i in range(WARM_UP):
        train_step(losses, optimizer, [batches[i % BATCHES]], None, working)
    _wait(device)
    warm = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [
        _seconds(lambda b=batch: train_step(losses, optimizer, [b], None, working), device)  # type: ignore[misc]
        for _ in range(ROUNDS) for batch in batches
    ]  # fmt: skip
    step = median(seconds)
    return {
        "warm_up_seconds": warm, "seconds_per_step": step, "raw": seconds,
        "tokens_per_second": size.windows * size.window / step, "targets_per_second": size.windows * (size.window - 1) / step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "kernels": kernels(losses, optimizer, batches[0], working, device),
    }  # fmt: skip


def kernels(
    losses: Losses, optimizer: torch.optim.Optimizer, batch: Batch, working: torch.dtype, device: torch.device
) -> list[tuple[str, float]] | None:
    """(kernel, share of the device's time) of the ten that take longest in a step."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train_step(losses, optimizer, [batch], None, working)
        _wait(device)
    found = sorted(((e.key, e.self_device_time_total) for e in profile.key_averages()), key=lambda e: -e[1])
    whole = sum(t for _, t in found) or 1.0
    return [(name[:100], t / whole) for name, t in found[:10]] + [("device busy seconds", whole / 1e6)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(work: Any, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def variants(device: torch.device) -> list[tuple[str, Size, str, str, bool, bool]]:
    """(name, size, trunk, precision, compiled, TF32), compilation last since it takes longest."""
    small, large = (SMALL, LARGE) if device.type == "cuda" else (TINY, TINY)
    full = Size(**(vars(large) | {"negatives": None, "windows": max(1, large.windows // 4)}))
    found = [(f"small {t} {p}", small, t, p, False, True) for t in ("hstu", "sasrec", "ligr") for p in ("float32", "bf16")]
    found += [("large sasrec float32 without TF32", large, "sasrec", "float32", False, False)]
    found += [(f"large {t} {p}", large, t, p, False, True) for t in ("sasrec", "hstu", "ligr") for p in ("float32", "bf16")]
    found += [("large sasrec bf16 full softmax", full, "sasrec", "bf16", False, True)]
    found += [(f"large {t} bf16 compiled", large, t, "bf16", True, True) for t in ("sasrec", "hstu")]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="The training step on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", help="also write what was measured here, after every variant")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu runs it at small sizes", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((rate for card, rate in DATASHEET.items() if card in name), None)
    detail: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "matmul_bf16_flops": matmul_rate(device),
        "datasheet": peak,
    }
    flops: dict[tuple[Size, str], float] = {}
    detail["variants"] = rows = {}
    for variant, size, trunk, precision, compiled, tf32 in variants(device):
        try:
            if (size, trunk) not in flops:
                flops[size, trunk] = count_flops(size, trunk, device)
            row = measure(size, trunk, precision, compiled, tf32, device)
            step = row["seconds_per_step"]
            rate = flops[size, trunk] / step
            row |= {"size": vars(size), "flops_per_step": flops[size, trunk], "flops_per_second": rate,
                    "utilisation": rate / detail["matmul_bf16_flops"], "of_datasheet": rate / peak if peak else None}  # fmt: skip
            print(f"{variant:40} {1e3 * step:9.2f} ms {row['tokens_per_second']:12,.0f} tokens/s "
                  f"{row['utilisation']:7.1%} {row['peak_gib'] or 0:6.1f} GiB", flush=True)  # fmt: skip
        except Exception as error:  # one variant that fails must not cost the others
            row = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{variant:40} {row['error'][:300]}", flush=True)
        rows[variant] = row
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                json.dump(detail, file)
    best = max((r["utilisation"] for n, r in rows.items() if n.startswith("large") and "error" not in r), default=0.0)
    if device.type != "cuda":
        return 0 if not any("error" in r for r in rows.values()) else 1
    target = "no variant fails"
    return finish("gpu_step", best, "model FLOPs utilisation", target, not any("error" in r for r in rows.values()), detail)


if __name__ == "__main__":
    sys.exit(main())
