"""One run: encoder, model, tasks, training, evaluation, and its data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mtrec_ray.config.base import Int, Model
from mtrec_ray.config.data import DataConfig, checked_expression, is_binary


class EncoderConfig(Model):
    """The TextEncoder: a transformer from Hugging Face."""

    model: str
    """A local directory, `package:NAME/DIR` (a directory inside an installed package) or a hub name."""
    pooling: Literal["mean", "last", "cls"] = "mean"
    max_tokens: Int = Field(default=128, ge=4)
    batch_size: Int = Field(default=64, ge=1)
    workers: Int = Field(default=1, ge=1)
    """Ray Data actors."""


class ModelConfig(Model):
    """The trunk, the item tower and the sharing layers."""

    width: Int = Field(default=64, ge=4)
    """D."""
    layers: Int = Field(default=2, ge=1)
    heads: Int = Field(default=2, ge=1)
    feed_forward: Int = Field(default=256, ge=4)
    dropout: float = Field(default=0.3, ge=0, lt=1)
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of items whose id residual is dropped in a step, so that text alone must serve."""
    id_buckets: Int | None = Field(default=None, ge=2)
    """Rows of the table of id residuals, shared by hash of the item's id, for catalogues of many millions. Default: a row
    for every training item."""
    sharing_width: Int = Field(default=64, ge=1)
    """Width of the shared bottom."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads {self.heads}")
        return self


class _Task(Model):
    weight: float = Field(default=1.0, ge=0)
    """Static λ, and the start of learned weights."""
    final_weight: float | None = None
    """w in the final score Σ w·g. Default: 1 for retrieval, 0 for all others."""


class RetrievalTask(_Task):
    kind: Literal["retrieval"]
    positive: str | None = None
    """Expression over labels: which targets are positives. Default: the events that are history."""


class RegressionTask(_Task):
    kind: Literal["regression"]
    label: str


class BinaryTask(_Task):
    kind: Literal["binary"]
    label: str


class SimilarityTask(_Task):
    kind: Literal["similarity"]
    within_positions: Int = Field(default=3, ge=1)
    """A pair is a training positive and one of the last this many history events that it sees ..."""
    within_hours: float = Field(default=24.0, gt=0)
    """... and at most this many hours."""
    share: float = Field(default=0.25, gt=0, le=1)
    """Share of the targets that contribute a pair in an epoch."""
    temperature: float = Field(default=0.1, gt=0)


class ProfileTask(_Task):
    kind: Literal["profile"]
    attribute: str


TaskConfig = Annotated[RetrievalTask | RegressionTask | BinaryTask | SimilarityTask | ProfileTask, Field(discriminator="kind")]


class BalancingConfig(Model):
    kind: Literal["static", "uncertainty"] = "static"
    """`static`: λ as given. `uncertainty`: learned log-variances (Kendall et al. 2018, arXiv 1705.07115)."""


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
    threads: Int = Field(default=1, ge=1)
    """torch threads of a worker."""
    use_gpu: bool = False
    monitor: str = "retrieval/ndcg@10"
    """`task/metric` on valid that selects the best checkpoint."""
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


class RankingConfig(Model):
    candidates: Int = Field(default=200, ge=1)
    """K retrieved before scoring."""


class ScoringConfig(Model):
    k: Int = Field(default=100, ge=1)
    batch_users: Int = Field(default=256, ge=1)
    workers: Int = Field(default=1, ge=1)


class EvaluationConfig(Model):
    """How the run is judged; see docs/evaluation.md."""

    baselines: tuple[Literal["popularity", "popularity_recent", "itemknn", "ease", "ials", "bpr", "tasks"], ...] = (
        "popularity",
        "popularity_recent",
        "itemknn",
        "ease",
        "tasks",
    )
    """Each is tuned on valid. `tasks` stands for those of all other tasks: means, gradient boosting, majority, a linear
    model on the bag of items, item vectors. `ials` and `bpr` need the extra `baselines`."""
    bootstrap: Int = Field(default=1000, ge=0)
    """Resamples of users behind every interval; 0 gives none."""
    seed: Int = Field(default=0, ge=0)
    """Seed of the resamples; the same in two runs that are to be compared."""
    batch_windows: Int = Field(default=256, ge=1)
    profile_folds_test: tuple[int, ...] = (0, 1)
    profile_fold_valid: int = 2

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        folds = (*self.profile_folds_test, self.profile_fold_valid)
        if len(set(folds)) != len(folds) or not all(0 <= f < 10 for f in folds):
            raise ValueError("profile folds are distinct numbers from 0 to 9")
        return self


class RunConfig(Model):
    """One run: data, encoder, model, tasks, training, evaluation."""

    name: str
    seed: Int = Field(default=0, ge=0)
    data: DataConfig
    encoder: EncoderConfig | None = None
    model: ModelConfig = ModelConfig()
    tasks: dict[str, TaskConfig]
    balancing: BalancingConfig = BalancingConfig()
    train: TrainConfig = TrainConfig()
    ranking: RankingConfig = RankingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scoring: ScoringConfig = ScoringConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        labels = self.data.labels
        retrieval = [n for n, t in self.tasks.items() if t.kind == "retrieval"]
        if len(retrieval) != 1:
            raise ValueError(f"tasks: exactly one task of kind retrieval is needed (it selects the candidates), found {retrieval}")
        similarity = [n for n, t in self.tasks.items() if t.kind == "similarity"]
        if len(similarity) > 1:
            raise ValueError(f"tasks: at most one task of kind similarity, found {similarity}")
        for name, task in self.tasks.items():
            key = f"tasks.{name}"
            if not name.isidentifier() or name in {"user_id", "item_id", "rank", "score", "title"}:
                raise ValueError(f"{key}: task names are letters, digits and underscores, and not a column of the output")
            if isinstance(task, RegressionTask | BinaryTask) and task.label not in labels:
                raise ValueError(f"{key}.label: {task.label!r} is not among data.labels {sorted(labels)}")
            if isinstance(task, BinaryTask) and not is_binary(labels[task.label]):
                raise ValueError(f"{key}.label: {task.label!r} is numeric; say kind: binary or derive it by a comparison")
            if isinstance(task, ProfileTask) and task.attribute not in self.data.attributes:
                raise ValueError(f"{key}.attribute: {task.attribute!r} is not among data.attributes {sorted(self.data.attributes)}")
            if isinstance(task, RetrievalTask) and task.positive is not None:
                checked_expression(task.positive, set(labels), f"{key}.positive")
        if self.encoder is not None and self.data.text is None:
            raise ValueError("encoder: data.text is missing, so there is no text to encode")
        monitored, _, metric = self.train.monitor.partition("/")
        if monitored not in self.tasks or not metric:
            raise ValueError(f"train.monitor: {self.train.monitor!r} is not task/metric with a task of {sorted(self.tasks)}")
        return self

    @property
    def retrieval_task(self) -> str:
        return next(n for n, t in self.tasks.items() if t.kind == "retrieval")

    @property
    def positive_expression(self) -> str:
        task = self.tasks[self.retrieval_task]
        assert isinstance(task, RetrievalTask)
        return task.positive or self.data.history_expression
