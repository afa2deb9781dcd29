"""What a log is once it has been fitted: the transforms that prepare, batch and serve share.

A `LogSchema` is fitted on the training part, stored in the bundle, and turns what people send (strings,
labels by name) into what the model reads (integers, floats). It knows no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mtrec_ray.features import CategoricalSpec, FeatureSpec, InputSpec, KeptSpec, MultihotSpec, RequestSpec, TextSpec

Protocol = Literal["time", "leave_one_out", "user_holdout", "item_holdout", "random"]
"""How a log is divided into train, valid and test (docs/evaluation.md)."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ActionSpec(_Model):
    """How one action enters a history token: by its value's embedding, or standardised."""

    name: str
    values: tuple[float, ...] | None = None
    mean: float = 0.0
    std: float = 1.0


class LabelStats(_Model):
    """Training mean and standard deviation of a label (of those present)."""

    count: int
    mean: float
    std: float
    values: tuple[float, ...] | None = None
    """The values that the configuration lists."""


class AttributeSpec(_Model):
    """Classes of a user's attribute; -1 is missing."""

    name: str
    classes: tuple[str, ...]


class LogSchema(_Model):
    """Everything fitted on the training part of a log."""

    window: int
    same_time: Literal["group", "order"]
    exclude_seen: bool
    protocol: Protocol
    actions: tuple[ActionSpec, ...]
    labels: dict[str, LabelStats]
    context: tuple[FeatureSpec, ...] = ()
    """Features of events."""
    session_gap_minutes: float | None = None
    """A longer gap begins a session; None: events do not know their sessions."""
    attributes: tuple[AttributeSpec, ...] = ()
    item_features: tuple[CategoricalSpec | MultihotSpec, ...] = ()
    """Categories of items: vocabularies of the training catalogue."""
    sensitive: tuple[str, ...] = ()
    """Names whose values are shown to nobody."""
    pseudonym_key: str | None = None
    """Fingerprint of the key of user ids; None: ids are the log's own."""
    n_items: int
    n_train_items: int
    """The first n_train_items of the catalogue have a training event."""

    @property
    def history_features(self) -> tuple[InputSpec, ...]:
        """Features of past events."""
        return tuple(c for c in self.context if not isinstance(c, KeptSpec) and c.in_history)

    @property
    def event_texts(self) -> tuple[str, ...]:
        """Names of the features that are free texts."""
        return tuple(c.name for c in self.context if isinstance(c, TextSpec))

    @property
    def request_features(self) -> tuple[RequestSpec, ...]:
        """Features of the event to predict."""
        return tuple(c for c in self.context if not isinstance(c, KeptSpec | TextSpec) and c.in_request)

    @property
    def session_gap_ms(self) -> float | None:
        return None if self.session_gap_minutes is None else self.session_gap_minutes * 60_000


def fit_action(name: str, values: tuple[float, ...] | None, kind: str, stats: LabelStats) -> ActionSpec:
    if kind == "binary":
        return ActionSpec(name=name, values=(0.0, 1.0))
    return ActionSpec(name=name, values=values, mean=stats.mean, std=max(stats.std, 1e-6))


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """[25, 35, 50] -> ("<25", "25-34", "35-49", "50+")."""
    whole = all(float(e).is_integer() for e in edges)
    show = [str(int(e)) if whole else str(e) for e in edges]
    middle = [f"{show[i]}-{int(edges[i + 1]) - 1}" if whole else f"{show[i]}-{show[i + 1]}" for i in range(len(edges) - 1)]
    return (f"<{show[0]}", *middle, f"{show[-1]}+")
