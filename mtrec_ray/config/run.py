"""One run: encoder, model, tasks, training, evaluation, and its data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mtrec_ray.config.base import Int, Model
from mtrec_ray.config.data import DataConfig
from mtrec_ray.config.encoder import EncoderConfig
from mtrec_ray.config.model import ModelConfig
from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.config.tasks import RetrievalTask, TaskConfig
from mtrec_ray.config.train import GAIN, BalancingConfig, TrainConfig


class NoRetrievalError(ValueError):
    """Something that needs a retrieval task, asked of a run without one."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"tasks: {what} needs a task of kind retrieval, which chooses the candidates; add retrieval: {{kind: retrieval}} to "
            "tasks and train again"
        )


class RankingConfig(Model):
    candidates: Int = Field(default=200, ge=1)
    """K retrieved before scoring."""


class IndexConfig(Model):
    """How candidates are searched; see docs/retrieval.md."""

    kind: Literal["exact", "ivf"] = "exact"
    """`exact`: every item is looked at. `ivf`: the lists nearest to the query alone, for catalogues of hundreds of thousands."""
    precision: Literal["float32", "bf16", "int8"] = "float32"
    """`exact`: what a first look at all items reads; the best of it are scored again as they are. int8 for single queries on a CPU,
    bf16 for GPUs."""
    shards: Int = Field(default=1, ge=1)
    """Parts of the catalogue, each searched by a Ray actor of its own, for one that outgrows a process; their answers are merged
    exactly. Batch scoring and serving start the actors."""
    lists: Int | None = Field(default=None, ge=1)
    """`ivf`: lists that the catalogue is divided into. Default: 4 times the square root of the number of items."""
    recall: float = Field(default=0.98, gt=0, le=1)
    """`ivf`: so many lists are looked at that this share of the exact candidates is found for half of the sampled queries."""
    min_recall: float = Field(default=0.95, gt=0, le=1)
    """`ivf`, bf16, int8: no bundle is made when less is found for the other half."""
    queries: Int = Field(default=2000, ge=20)
    """`ivf`, bf16, int8: users of the valid part, at most, whose states are the sampled queries."""

    @model_validator(mode="after")
    def _check(self) -> IndexConfig:
        if self.kind == "ivf" and self.precision != "float32":
            raise ValueError("index.precision: the lists of ivf have eight bits already; leave it out, or take kind: exact")
        if self.kind == "ivf" and self.shards > 1:
            raise ValueError("index.shards: the parts of a catalogue are searched exactly; take kind: exact, or one shard")
        return self

    @property
    def is_plain(self) -> bool:
        """Nothing is missed, so there is nothing to measure."""
        return self.kind == "exact" and self.precision == "float32"


class ScoringConfig(Model):
    """Top lists in batch; see docs/scoring.md."""

    k: Int = Field(default=100, ge=1)
    """Items of a list."""
    users: str | None = None
    """Parquet file (or a directory of them) with a column user_id: lists for these alone. Default: every user of the store."""
    unknown_users: Literal["popularity", "skip"] = "popularity"
    """What users of that file get who have no history here; they are counted."""
    batch_users: Int | Literal["auto"] = 256
    """Users scored together. `auto`: each actor tries larger and larger batches, as far as memory goes and while they pay."""
    workers: Int = Field(default=1, ge=1)
    """Ray Data actors."""
    use_gpu: bool | Literal["auto"] = "auto"
    """A GPU for every actor. `auto`: where the cluster has as many."""
    precision: Literal["float32", "int8"] = "float32"
    """int8: the heads' and sharing layers' weights in eight bits, on CPUs: for memory, not for speed (docs/scoring.md)."""
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Only items with one of these values, for every attribute named (of data.item_features): {genre: [Comedy, Drama]}."""

    pairs: str | None = None
    """`--what pairs`: Parquet file (or a directory of them) with columns user_id and item_id."""
    histories: str | None = None
    """Parquet file (or a directory of them) of the history store's form: these histories are scored, and the store is not read."""

    @model_validator(mode="after")
    def _check_one_source(self) -> ScoringConfig:
        if self.users is not None and self.histories is not None:
            raise ValueError("scoring: users and histories are given; the histories name their own users, so take one away")
        if self.use_gpu is True and self.precision == "int8":
            raise ValueError("scoring.precision: int8 is for CPUs; take float32 with use_gpu")
        if self.batch_users != "auto" and self.batch_users < 1:
            raise ValueError("scoring.batch_users: a whole number from 1, or auto")
        return self


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


class PlacementConfig(Model):
    """Which nodes of a cluster work goes to, by their labels (cluster.yaml gives each kind of node a `role`); empty: any."""

    train: dict[str, str] = Field(default_factory=dict)
    """Workers of Ray Train."""
    batch: dict[str, str] = Field(default_factory=dict)
    """Tasks and actors of Ray Data: preparation, encoding, evaluation, scoring."""


class TrackingConfig(Model):
    """Where runs are noted, beside TensorBoard and metrics.json, which are always written."""

    mlflow: str | None = None
    """MLflow's tracking URI, such as http://HOST:5000 or a directory; needs the extra `tracking`."""
    experiment: str = "mtrec_ray"


class RunConfig(Model):
    """One run: data, encoder, model, tasks, training, evaluation."""

    name: str
    seed: Int = Field(default=0, ge=0)
    data: DataConfig
    encoder: EncoderConfig | None = None
    pretrain: PretrainConfig = PretrainConfig()
    model: ModelConfig = ModelConfig()
    tasks: dict[str, TaskConfig]
    balancing: BalancingConfig = BalancingConfig()
    train: TrainConfig = TrainConfig()
    ranking: RankingConfig = RankingConfig()
    index: IndexConfig = IndexConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scoring: ScoringConfig = ScoringConfig()
    placement: PlacementConfig = PlacementConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        retrieval = [n for n, t in self.tasks.items() if t.kind == "retrieval"]
        if not self.tasks:
            raise ValueError("tasks: at least one is needed, such as retrieval: {kind: retrieval}")
        if len(retrieval) > 1:
            raise ValueError(f"tasks: at most one task of kind retrieval (it chooses the candidates), found {retrieval}")
        similarity = [n for n, t in self.tasks.items() if t.kind == "similarity"]
        if len(similarity) > 1:
            raise ValueError(f"tasks: at most one task of kind similarity, found {similarity}")
        for name, task in self.tasks.items():
            key = f"tasks.{name}"
            if not name.isidentifier() or name in {"user_id", "item_id", "rank", "score", "title"}:
                raise ValueError(f"{key}: task names are letters, digits and underscores, and not a column of the output")
            task.check(key, self.data, self.tasks)
        if self.encoder is not None and self.data.text is None:
            raise ValueError("encoder: data.text is missing, so there is no text to encode")
        texts = sorted(n for n, feature in self.data.context.items() if feature.kind == "text")
        if texts and self.encoder is None:
            raise ValueError(
                f"data.context: {texts} are texts, and there is no encoder to read them; add encoder, or take them out"
            )
        if texts and self.encoder is not None and self.encoder.tuning is not None:
            raise ValueError(
                f"encoder.tuning: the texts of events ({texts}) are encoded once, by the encoder as it came; take either away"
            )
        if self.train.warm_start is not None and self.encoder is not None and self.encoder.tuning is not None:
            raise ValueError(
                "train.warm_start: with encoder.tuning the TextEncoder begins with encoder.model; name the last run's trained "
                "directory there (train/*/encoder), or take warm_start or tuning away"
            )
        if self.encoder is not None and self.encoder.use_gpu and self.encoder.precision == "int8":
            raise ValueError("encoder.precision: int8 is for CPUs; with encoder.use_gpu take bf16 or auto")
        if self.encoder is not None and self.encoder.tuning is not None:
            if self.encoder.precision == "int8":
                raise ValueError("encoder.precision: int8 weights have no gradients; leave it out, or take encoder.tuning away")
            if self.encoder.long_texts == "chunks":
                raise ValueError("encoder.long_texts: chunks is for a frozen encoder; take cut, or take encoder.tuning away")
        if self.train.monitor == GAIN and not self.train.reference:
            raise ValueError("train.monitor: gain needs train.reference, such as {retrieval/ndcg@10: 0.12, rating/rmse: 0.97}")
        measured = dict.fromkeys(self.train.reference, "train.reference")
        if self.train.monitor != GAIN:
            measured[self.train.monitor] = "train.monitor"
        for name, key in measured.items():
            task_name, _, metric = name.partition("/")
            if task_name not in self.tasks or not metric:
                raise ValueError(
                    f"{key}: {name!r} is not task/metric with a task of {sorted(self.tasks)}; name what chooses the best "
                    "checkpoint, such as rating/rmse"
                )
        for name, value in self.train.reference.items():
            if value == 0:
                raise ValueError(f"train.reference.{name}: a relative gain over 0 is no number; name another metric")
        return self

    @property
    def retrieval_task(self) -> str | None:
        """None: a run that is trained and judged on other tasks alone, and serves no lists."""
        return next((n for n, t in self.tasks.items() if t.kind == "retrieval"), None)

    def require_retrieval(self, what: str) -> None:
        """Raises NoRetrievalError where there is no retrieval task. what: what needs one."""
        if self.retrieval_task is None:
            raise NoRetrievalError(what)

    @property
    def positive_expression(self) -> str:
        """Which targets are positives; without a retrieval task the events that are history."""
        task = next((t for t in self.tasks.values() if isinstance(t, RetrievalTask)), None)
        return (task and task.positive) or self.data.history_expression
