"""`data`: the log's tables and how it becomes windows."""

from __future__ import annotations

import codecs
import keyword
import string
from typing import Literal

from pydantic import Field, model_validator

from mtrec_ray.config.base import Int, Model
from mtrec_ray.config.features import Features, ItemFeatureConfig
from mtrec_ray.config.long import LongConfig
from mtrec_ray.expressions import Expression, ExpressionError
from mtrec_ray.schema import Protocol

RESERVED = {"user_id", "item_id", "timestamp", "present", "row", "weight", "split", "rank", "score", "title"}
"""Names of columns that events, windows and lists have anyway, and of expressions' one function."""
CATALOGUE_COLUMNS = {"item_id", "trained", "count", "recent_count", "title", "text"}


class TableConfig(Model):
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


class LabelConfig(Model):
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


class AttributeConfig(Model):
    """A categorical attribute of a user, taken from a column of the users table."""

    column: str
    bins: tuple[float, ...] | None = None
    """Upper edges, exclusive: [25, 35, 50] gives <25, 25-34, 35-49 and 50+ for a whole-numbered column."""

    @model_validator(mode="after")
    def _check(self) -> AttributeConfig:
        if self.bins is not None and (not self.bins or any(a >= b for a, b in zip(self.bins, self.bins[1:], strict=False))):
            raise ValueError("bins are increasing edges such as [25, 35, 50]")
        return self


class ItemTextConfig(Model):
    """How an item becomes text."""

    template: str
    """Such as `{title} ({year}). {genres}`; the names are columns of the items table."""
    title: str
    """The column shown as the item's title."""
    columns: tuple[str, ...] = ()
    """Further columns kept in the catalogue and shown to people."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns that the template reads."""
        return tuple(f for _, f, _, _ in string.Formatter().parse(self.template) if f)

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


class PseudonymConfig(Model):
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


class DataConfig(Model):
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
    item_features: dict[str, ItemFeatureConfig] = Field(default_factory=dict)
    """Columns of the items table that are categories, for tasks of kind item_attribute and for interests (docs/tasks.md).
    The model does not read them."""
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
    """`random`: number of folds of events, by hash. One is test, the next one valid. `user_holdout` and `item_holdout`: into how
    many steps their circle of hashes is divided."""
    fold: Int = Field(default=0, ge=0)
    """`random`: the test fold, counted from 0. `user_holdout` and `item_holdout`: other users or items are held out; with a
    share for test of 1 / folds, no two folds test the same ones."""
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
                checked_expression(label.expression, plain, f"labels.{name}.expression")
        if self.long is not None:
            self.long.check(self.labels, tuple(self.context))
        for name in self.actions:
            if name not in self.labels:
                raise ValueError(f"actions: {name!r} is not among labels {sorted(self.labels)}")
        if self.history is not None:
            checked_expression(self.history, set(self.labels), "history")
        if not 0 < self.time_split[0] < self.time_split[1] < 1:
            raise ValueError("time_split: two increasing shares between 0 and 1, such as [0.8, 0.9]")
        if min(self.holdout) <= 0 or sum(self.holdout) >= 1:
            raise ValueError("holdout: two shares above 0 that leave something to train on, such as [0.1, 0.1]")
        if self.fold >= self.folds:
            raise ValueError(f"fold: {self.fold} is not one of {self.folds} folds, which count from 0")
        if self.attributes and self.users is None:
            raise ValueError("attributes: a users table is needed")
        for name in self.item_features:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"item_features: {name!r} cannot be a name; map the column to another by items.columns")
            if name in self.attributes:
                raise ValueError(f"item_features.{name}: an attribute of users has this name; name one of them otherwise")
        if self.item_features and self.items is None:
            raise ValueError("item_features: an items table is needed")
        text = set() if self.text is None else set(self.text.fields)
        known = {
            "user_id",
            *plain,
            *self.labels,
            *self.context,
            *self.attributes,
            *(a.column for a in self.attributes.values()),
            *text,
            *self.item_features,
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
        # which events are history tells of them too
        chosen = sorted(Expression(self.history).names) if self.history is not None else []
        for name in (*features, *self.action_names, *chosen, *(self.long.columns if self.long is not None else ())):
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


def is_binary(label: LabelConfig) -> bool:
    """Whether every value is 0 or 1: checked when the log is read, or sure by the expression's form."""
    return label.kind == "binary" if label.expression is None else Expression(label.expression).is_truth


def checked_expression(text: str, names: set[str], key: str) -> Expression:
    try:
        expression = Expression(text)
    except ExpressionError as error:
        raise ValueError(f"{key}: {error}") from None
    unknown = expression.names - names
    if unknown:
        raise ValueError(f"{key}: {text!r} uses {sorted(unknown)}, known are {sorted(names)}")
    return expression
