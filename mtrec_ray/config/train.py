"""`train` and `balancing`: the loop and the weights of the tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mtrec_ray.config.base import Int, Model

GAIN = "gain"
"""`train.monitor` for the mean relative gain over `train.reference`."""


class BalancingConfig(Model):
    """How the weights λ of L = Σ λᵢ Lᵢ are found; see docs/balancing.md."""

    kind: Literal[
        "static", "uncertainty", "dwa", "famo", "mgda", "pcgrad", "cagrad", "aligned_mtl", "imtl_g", "upgrad", "nash_mtl"
    ] = "static"
    """`static`: λ as given, the plain sum. From losses: `uncertainty`, `dwa`, `famo`. From the gradients' Gramian at the
    state: the others."""
    update_every: Int = Field(default=1, ge=1)
    """Gramian kinds: steps between two solutions; λ stays in between."""
    record: bool = False
    """Report the norms and pairwise cosines of the tasks' gradients at the state, per epoch."""
    record_every: Int = Field(default=10, ge=1)
    """`record`: steps between two measurements, where the balancer needs no Gramian itself."""
    dwa_temperature: float = Field(default=2.0, gt=0)
    famo_learning_rate: float = Field(default=0.025, gt=0)
    """Of Adam on the logits of the weights."""
    famo_decay: float = Field(default=0.001, ge=0)
    """Pull of the logits towards equal weights."""
    cagrad_c: float = Field(default=0.5, ge=0)
    """How far the update may lie from the mean gradient, as a share of its length."""


def _workers(value: Any) -> Any:
    low, high = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (low, high))
    if not whole or not 0 <= low <= high or low == 0 < high:
        raise ValueError("Input should be a number of workers such as 2, or [min, max] such as [1, 4]")
    return value


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]
"""A number of workers, or the least and the most of an elastic run."""


class TrainConfig(Model):
    """The training loop."""

    epochs: Int = Field(default=30, ge=1)
    """An upper bound; early stopping may end sooner."""
    batch_windows: Int = Field(default=32, ge=1)
    """Windows of a global batch, whatever the number of workers."""
    accumulate: Int = Field(default=1, ge=1)
    """Micro-batches that a global batch is computed in, to save memory."""
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of an exponential moving average of the weights; it is what is evaluated and kept. 0 is off."""
    feed: Literal["cached", "stream"] = "cached"
    """`cached`: windows memory-mapped on every node, exact resume at any step. `stream`: windows as Ray Data reads them,
    resume at the start of the epoch. See docs/training.md."""
    stream_buffer: Int = Field(default=4096, ge=1)
    """`stream` only: windows that each worker shuffles together."""
    workers: Workers = 2
    """DDP workers of Ray Train, or [min, max] for as many as the cluster has room for; 0 runs in the driver's process."""
    warm_start: str | None = None
    """Run or bundle, directory or URI, whose weights training begins with (docs/nightly.md); null: from scratch."""
    threads: Int = Field(default=1, ge=1)
    """torch threads of a worker."""
    use_gpu: bool = False
    """One GPU per worker, over NCCL, with batches in pinned memory."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the matrix products; weights and losses stay float32. `auto`: bf16 from width 256 on
    a GPU that has it, else float32."""
    compile: bool = False
    """`torch.compile` the trunk: needs a C++ compiler, and pays in long runs."""
    monitor: str = "retrieval/ndcg@10"
    """`task/metric` on valid that selects the best checkpoint, or `gain`: the mean relative gain over `reference`."""
    reference: dict[str, float] = Field(default_factory=dict)
    """`task/metric` on valid -> value to compare with, such as those of single-task models; every epoch then reports the mean
    relative gain over them."""
    patience: Int = Field(default=10, ge=1)
    """Epochs without improvement before training stops."""
    evaluate_every: Int = Field(default=1, ge=1)
    """Epochs between evaluations on valid."""
    max_failures: Int = Field(default=1, ge=0)
    """Restarts by Ray Train, each from the last checkpoint."""
    checkpoint_every: Int | None = Field(default=1000, ge=1)
    """Steps between checkpoints within an epoch; there is one at every epoch's end anyway, and null leaves it at that."""

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]
