"""Configuration of long logs: one row for everything that happened, told apart by a type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mtrec_ray.config.base import Model

if TYPE_CHECKING:
    from mtrec_ray.config.data import LabelConfig


class LongConfig(Model):
    """How the rows of a long log become events with labels; see docs/logs.md."""

    type: str = "event_type"
    """Column of the log that says what a row is."""
    value: str | None = None
    """Column with a number, for numeric labels."""
    request: str | None = None
    """Column with the id of the request that showed the item. With it, an action belongs to the impression of the same
    user, item and request; without it, to the latest impression of the same user and item. Either way, to none after it."""
    impression: str | None = None
    """The type of rows that are impressions. null: there are none, and every row is an event of its own."""
    labels: dict[str, str]
    """Label -> type of the rows that give it. A binary label is 1 where such a row belongs to the impression, else 0; a
    numeric one is the value of the latest such row, else missing."""
    attribution_hours: float | None = Field(default=None, gt=0)
    """An action belongs to no impression that is older than this."""
    unmatched: Literal["keep", "quarantine"] = "keep"
    """An action without an impression: an event of its own, with its own label and no other, or a bad row."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the log that are read beside ids, time and context."""
        return tuple(n for n in (self.type, self.value, self.request) if n is not None)

    @property
    def types(self) -> tuple[str, ...]:
        """Types that rows may have, in a fixed order."""
        first = () if self.impression is None else (self.impression,)
        return tuple(dict.fromkeys((*first, *self.labels.values())))

    def check(self, labels: Mapping[str, LabelConfig], context: tuple[str, ...]) -> None:
        """Raises ValueError where this section and the labels of the log contradict each other."""
        plain = {n for n, label in labels.items() if label.expression is None}
        if set(self.labels) != plain:
            raise ValueError(
                f"long.labels: a type for each of the labels {sorted(plain)} that are no expressions, found {sorted(self.labels)}"
            )
        if self.impression in self.labels.values():
            raise ValueError(f"long.labels: rows of type {self.impression!r} are impressions and cannot give a label")
        numeric = sorted(n for n in plain if labels[n].kind == "numeric")
        if numeric and self.value is None:
            raise ValueError(f"long.value: the column with the numbers of {numeric} is needed; say kind: binary if they have none")
        if self.impression is None and (self.request is not None or self.attribution_hours is not None):
            raise ValueError("long.impression: without it nothing is matched; leave out request and attribution_hours, or name it")
        if self.impression is not None and self.request is None and self.attribution_hours is None:
            raise ValueError("long.attribution_hours: needed where there is no request to match actions by, such as 24")
        taken = {shown_column(n) for n in labels} & (set(labels) | set(context))
        if taken:
            raise ValueError(f"long.labels: {sorted(taken)} would stand in for columns of the same name; name them otherwise")


def shown_column(label: str) -> str:
    """Name of the column of events that holds a label as the history shows it."""
    return f"shown_{label}"
