"""The run configuration: frozen pydantic models and a strict YAML loader.

One YAML file describes one run. Unknown keys, wrong types and contradictions are refused at load with
the path of the key and what was expected; `key.path=value` on the command line overrides a value.
"""

from __future__ import annotations

import codecs
import keyword
import re
import string
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from mtrec_ray.base_config import Int
from mtrec_ray.base_config import Model as _Model
from mtrec_ray.expressions import Expression, ExpressionError
from mtrec_ray.feature_config import Features
from mtrec_ray.long_config import LongConfig
from mtrec_ray.schema import Protocol


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each key and the cure."""


RESERVED = {"user_id", "item_id", "timestamp", "present", "row", "weight", "split", "rank", "score", "title"}
"""Names of columns that events, windows and lists have anyway, and of expressions' one function."""
CATALOGUE_COLUMNS = {"item_id", "trained", "count", "recent_count", "title", "text"}


# --------------------------------------------------------------------------- data


class TableConfig(_Model):
    """Where a table lies and which of its columns are which."""

    path: str
    """File, directory or glob-free URI; a directory means every file of the format inside it, sorted. Names that end in
    .gz, .zst or .bz2 are read compressed; `day=2024-01-01` in the path is a column."""
    format: Literal["parquet", "csv", "jsonl", "recbole", "movielens"] = "parquet"
    """`jsonl`: one JSON object per line. `recbole`: an atomic file, tab-separated with `name:type` headers.
    `movielens`: one of the files that GroupLens packs, with the columns user_id, item_id, rating, timestamp; item_id,
    title, year, genres; user_id, gender, age, occupation, zip."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Name used here -> column in the file; `a.b` is the key b of the object a in JSON Lines. A name that is not listed is
    looked up as it is."""
    delimiter: str | None = None
    """CSV and atomic files only: one character; default a comma, or a tab."""
    header: tuple[str, ...] | None = None
    """CSV only: names of the columns of files that have no header."""
    encoding: str = "utf-8"
    """CSV only: such as latin-1."""

    @model_validator(mode="after")
    def _check(self) -> TableConfig:
        if self.delimiter is not None and (self.format not in ("csv", "recbole") or len(self.delimiter.encode()) != 1):
            raise ValueError("delimiter: one (ASCII) character, for formats csv and recbole")
        if (self.header is not None or self.encoding != "utf-8") and self.format != "csv":
            raise ValueError(f"header and encoding belong to format csv, not {self.format}")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding: {self.encoding!r} is unknown; such as utf-8, latin-1, utf-16") from None
        return self


class LabelConfig(_Model):
    """A label of an event: a numeric column of the log, or an expression over other labels."""

    expression: str | None = None
    """Such as `rating >= 4`. Missing inputs give a missing label."""
    kind: Literal["numeric", "binary"] = "numeric"
    min: float | None = None
    """Values below are quarantined."""
    max: float | None = None
    """Values above are quarantined."""
    values: tuple[float, ...] | None = None
    """The values that occur, when they are few: the history then embeds each value."""
    maturity_hours: float | None = Field(default=None, gt=0)
    """A target younger than this at the log's end has the label masked, since it may not have come yet, and labels derived
    from it too, in every split. The history shows it all the same: there it stands for what was observed."""

    @model_validator(mode="after")
    def _check(self) -> LabelConfig:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is above max")
        if self.expression is not None and not (self.min is None and self.max is None and self.values is None):
            raise ValueError("min, max and values belong to a column of the log, not to an expression")
        return self


class AttributeConfig(_Model):
    """A categorical attribute of a user, taken from a column of the users table."""

    column: str
    bins: tuple[float, ...] | None = None
    """Upper edges, exclusive: [25, 35, 50] gives <25, 25-34, 35-49 and 50+ for a whole-numbered column."""

    @model_validator(mode="after")
    def _check(self) -> AttributeConfig:
        if self.bins is not None and (not self.bins or any(a >= b for a, b in zip(self.bins, self.bins[1:], strict=False))):
            raise ValueError("bins are increasing edges such as [25, 35, 50]")
        return self


class ItemTextConfig(_Model):
    """How an item becomes text."""

    template: str
    """Such as `{title} ({year}). {genres}`; the names are columns of the items table."""
    title: str
    """The column shown as the item's title."""
    columns: tuple[str, ...] = ()
    """Further columns kept in the catalogue and shown to people."""

    @model_validator(mode="after")
    def _check(self) -> ItemTextConfig:
        try:
            fields = [(f, s, c) for _, f, s, c in string.Formatter().parse(self.template) if f is not None]
        except ValueError as error:
            raise ValueError(f"template {self.template!r}: {error}") from None
        for name, spec, conversion in fields:
            if not name.isidentifier() or spec or conversion:
                raise ValueError(f"template {self.template!r}: write fields as {{column}}, found {{{name}}}")
        taken = set(self.columns) & CATALOGUE_COLUMNS
        if taken:
            raise ValueError(f"columns {sorted(taken)} would stand in for the catalogue's own; name others")
        return self


class PseudonymConfig(_Model):
    """User ids are replaced by a keyed hash (BLAKE2b) before anything is written. The key is read from one of the two
    places, wherever preparation, jobs.forget or the ingress runs; it has 16 to 64 bytes and is never stored."""

    key_env: str | None = None
    """Name of an environment variable."""
    key_file: str | None = None
    """Path or URI of a file."""

    @model_validator(mode="after")
    def _check(self) -> PseudonymConfig:
        if (self.key_env is None) == (self.key_file is None):
            raise ValueError("name either key_env or key_file")
        return self


class DataConfig(_Model):
    """The log, and how it becomes windows."""

    interactions: TableConfig
    items: TableConfig | None = None
    users: TableConfig | None = None
    time_unit: Literal["s", "ms", "us", "ns", "iso"] = "ms"
    """Unit of the log's timestamps, or `iso` for ISO 8601 texts; inside, time is int64 milliseconds UTC."""
    labels: dict[str, LabelConfig]
    long: LongConfig | None = None
    """The log is long: an impression, a click and a rating are rows of their own. Default: wide, labels are columns."""
    actions: tuple[str, ...] = ()
    """Labels that the history shows the trunk. Default: all that are not expressions."""
    context: Features = Field(default_factory=dict)
    """Features: columns of the event (device, price, tags, position, ...) and how each is read; see docs/features.md. A list
    of names stands for categorical ones."""
    session_gap_minutes: float | None = Field(default=None, gt=0)
    """A longer gap between two events of a history begins a session, and events then know their place in it. Null is off."""
    attributes: dict[str, AttributeConfig] = Field(default_factory=dict)
    """Attributes of users, for profile tasks."""
    text: ItemTextConfig | None = None
    """How items become text. Without it items are ids only."""
    history: str | None = None
    """Expression: which events are history. Default: any action present and not zero."""
    same_time: Literal["group", "order"] = "group"
    """`group`: a target sees only strictly earlier times; `order`: ties see earlier rows of the log."""
    exclude_seen: bool = False
    """Never recommend an item of the user's history; one setting for evaluation, batch and online."""
    protocol: Protocol = "time"
    """How train, valid and test are divided; see docs/evaluation.md."""
    time_split: tuple[float, float] = (0.8, 0.9)
    """`time` only: shares of events before the valid cut and before the test cut."""
    holdout: tuple[float, float] = (0.1, 0.1)
    """`user_holdout` and `item_holdout`: shares of users or items, by hash, for valid and for test."""
    folds: Int = Field(default=10, ge=3)
    """`random`: number of folds of events, by hash. One is test, the next one valid."""
    fold: Int = Field(default=0, ge=0)
    """`random`: the test fold, counted from 0."""
    window: Int = Field(default=100, ge=2, le=4096)
    """L, the history positions of a window, the start token included."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The job stops before publishing when a larger share of the rows is quarantined."""
    unknown_items: Literal["quarantine", "keep"] = "quarantine"
    """Events on items that the items table lacks."""
    unknown_users: Literal["quarantine", "keep"] = "keep"
    """Events of users that the users table lacks; kept, they train everything but profiles."""
    recent_days: float = Field(default=30.0, gt=0)
    """Length of the recent-popularity window before the last training event."""
    pseudonyms: PseudonymConfig | None = None
    """User ids become pseudonyms; callers of the service keep sending their own ids."""
    sensitive: tuple[str, ...] = ()
    """Columns, labels, context columns or attributes whose values never reach logs, messages, quarantine, reports or
    the names of metrics."""
    partitions: Int | None = Field(default=None, ge=1)
    """User partitions (files). Default: from the number of rows and the cluster."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        plain = {n for n, label in self.labels.items() if label.expression is None}
        if not self.labels:
            raise ValueError("labels: at least one is needed, such as click: {kind: binary}")
        for name in (*self.labels, *self.context, *self.attributes):
            if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
                raise ValueError(f"{name!r} cannot be the name of a label, context column or attribute; map it to another name")
        twice = set(self.labels) & set(self.context)
        if twice:
            raise ValueError(f"context: {sorted(twice)} are labels already")
        for name, label in self.labels.items():
            if label.expression is not None:
                _expression(label.expression, plain, f"labels.{name}.expression")
        if self.long is not None:
            self.long.check(self.labels, tuple(self.context))
        for name in self.actions:
            if name not in self.labels:
                raise ValueError(f"actions: {name!r} is not among labels {sorted(self.labels)}")
        if self.history is not None:
            _expression(self.history, set(self.labels), "history")
        if not 0 < self.time_split[0] < self.time_split[1] < 1:
            raise ValueError("time_split: two increasing shares between 0 and 1, such as [0.8, 0.9]")
        if min(self.holdout) <= 0 or sum(self.holdout) >= 1:
            raise ValueError("holdout: two shares above 0 that leave something to train on, such as [0.1, 0.1]")
        if self.fold >= self.folds:
            raise ValueError(f"fold: {self.fold} is not one of {self.folds} folds, which count from 0")
        if self.attributes and self.users is None:
            raise ValueError("attributes: a users table is needed")
        text = set() if self.text is None else {f for _, f, _, _ in string.Formatter().parse(self.text.template) if f}
        known = {
            "user_id",
            *plain,
            *self.labels,
            *self.context,
            *self.attributes,
            *(a.column for a in self.attributes.values()),
            *text,
        }
        mapped = {column for table in (self.interactions, self.items, self.users) if table for column in table.columns.values()}
        strange = set(self.sensitive) - known - mapped
        if strange:
            raise ValueError(f"sensitive: {sorted(strange)} are no columns, labels or attributes of this configuration")
        if self.text is not None and self.items is None:
            raise ValueError("text: an items table is needed")
        overlap = {a.column for a in self.attributes.values()} | set(self.attributes)
        columns = self.interactions.columns
        features = [n for n, feature in self.context.items() if feature.kind != "kept"]
        for name in (*features, *self.action_names, *(self.long.columns if self.long is not None else ())):
            shown = self.labels.get(name)
            reads = {name, columns.get(name, name)}
            if shown is not None and shown.expression is not None:
                inner = Expression(shown.expression).names
                reads |= inner | {columns.get(n, n) for n in inner}
            if reads & overlap:
                raise ValueError(
                    f"{name!r} is a profile attribute and may not be an input feature: the model would read its target"
                )
        return self

    @property
    def action_names(self) -> tuple[str, ...]:
        """Labels shown in the history, in a fixed order."""
        return self.actions or tuple(n for n, label in self.labels.items() if label.expression is None)

    @property
    def sensitive_names(self) -> frozenset[str]:
        """Names of sensitive columns under all their names, and of what is made of them alone."""
        names = set(self.sensitive)
        for table in (self.interactions, self.items, self.users):
            if table is not None:
                names |= {column for name, column in table.columns.items() if name in names}
                names |= {name for name, column in table.columns.items() if column in names}
        names |= {name for name, attribute in self.attributes.items() if attribute.column in names}
        for name, label in self.labels.items():
            if label.expression is not None and Expression(label.expression).names & names:
                names.add(name)
        return frozenset(names)

    @property
    def history_expression(self) -> str:
        """The expression that decides whether an event is history."""
        if self.history is not None:
            return self.history
        return " or ".join(f"{n} != 0" for n in self.action_names)


def _is_binary(label: LabelConfig) -> bool:
    """Whether every value is 0 or 1: checked when the log is read, or sure by the expression's form."""
    return label.kind == "binary" if label.expression is None else Expression(label.expression).is_truth


def _expression(text: str, names: set[str], key: str) -> Expression:
    try:
        expression = Expression(text)
    except ExpressionError as error:
        raise ValueError(f"{key}: {error}") from None
    unknown = expression.names - names
    if unknown:
        raise ValueError(f"{key}: {text!r} uses {sorted(unknown)}, known are {sorted(names)}")
    return expression


# --------------------------------------------------------------------------- encoder, model, tasks


class EncoderConfig(_Model):
    """The TextEncoder: a transformer from Hugging Face."""

    model: str
    """A local directory, `package:NAME/DIR` (a directory inside an installed package) or a hub name."""
    pooling: Literal["mean", "last", "cls"] = "mean"
    max_tokens: Int = Field(default=128, ge=4)
    batch_size: Int = Field(default=64, ge=1)
    workers: Int = Field(default=1, ge=1)
    """Ray Data actors."""


class ModelConfig(_Model):
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


class _Task(_Model):
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


class BalancingConfig(_Model):
    kind: Literal["static", "uncertainty"] = "static"
    """`static`: λ as given. `uncertainty`: learned log-variances (Kendall et al. 2018, arXiv 1705.07115)."""


# --------------------------------------------------------------------------- training, serving


def _workers(value: Any) -> Any:
    low, high = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (low, high))
    if not whole or not 0 <= low <= high or low == 0 < high:
        raise ValueError("Input should be a number of workers such as 2, or [min, max] such as [1, 4]")
    return value


Workers = Annotated[int | tuple[int, int], BeforeValidator(_workers)]
"""A number of workers, or the least and the most of an elastic run."""


class TrainConfig(_Model):
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


class RankingConfig(_Model):
    candidates: Int = Field(default=200, ge=1)
    """K retrieved before scoring."""


class ScoringConfig(_Model):
    k: Int = Field(default=100, ge=1)
    batch_users: Int = Field(default=256, ge=1)
    workers: Int = Field(default=1, ge=1)


class EvaluationConfig(_Model):
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


class RunConfig(_Model):
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
            if isinstance(task, BinaryTask) and not _is_binary(labels[task.label]):
                raise ValueError(f"{key}.label: {task.label!r} is numeric; say kind: binary or derive it by a comparison")
            if isinstance(task, ProfileTask) and task.attribute not in self.data.attributes:
                raise ValueError(f"{key}.attribute: {task.attribute!r} is not among data.attributes {sorted(self.data.attributes)}")
            if isinstance(task, RetrievalTask) and task.positive is not None:
                _expression(task.positive, set(labels), f"{key}.positive")
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


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file into a `RunConfig`.

    overrides: `tasks.rating.weight=0.5`; the value is read as YAML.
    Raises ConfigError with one line for each wrong key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_config(raw: dict[str, Any], source: str = "config") -> RunConfig:
    """Validate a mapping; `source` names it in messages."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [f"{source}: {len(error.errors())} wrong key(s)"]
        for e in error.errors():
            loc = [str(p) for p in e["loc"]]
            if len(loc) > 2 and loc[0] == "tasks":
                del loc[2]  # pydantic names the kind of a task in the path
            if len(loc) > 3 and loc[:2] == ["data", "context"]:
                del loc[3]  # and that of a feature
            message = e["msg"].removeprefix("Value error, ")
            if e["type"] == "extra_forbidden":
                lines.append(f"  {'.'.join(loc)}: unknown key")
            elif e["type"] == "value_error" and isinstance(e["input"], dict):
                dot = bool(re.match(r"[\w.]+: ", message)) or not loc  # a part's own check may begin with the key
                lines.append("  " + ".".join(loc) + (("." if loc else "") if dot else ": ") + message)
            else:
                found = "" if isinstance(e["input"], dict) else f" (found {e['input']!r})"
                lines.append(f"  {'.'.join(loc)}: {message}{found}")
        raise ConfigError("\n".join(lines)) from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r}: expected key.path=value")
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a mapping")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value") from None
