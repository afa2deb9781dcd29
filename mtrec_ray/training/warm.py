"""Begin with what a bundle has learned: its weights, carried to the items, vocabularies and classes of today.

Rows that have a name (an item, a value, a class) go where that name is now, whatever their numbers were; names that are new begin
as in a fresh model, new items without a residual, as if they had been served from their text alone. Tasks, features and sharing
layers of another shape begin anew.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtrec_ray.models.features import FeatureEmbedding
from mtrec_ray.models.recommender import Recommender

log = logging.getLogger(__name__)

NEEDED = ("trunk.", "item_tower.")
"""Parameters without which there is nothing to begin with."""
Names = Sequence[Hashable] | None
"""What the rows of a dimension are; None: their numbers say it."""


class WarmStartError(ValueError):
    """A bundle whose weights do not fit this configuration."""


@dataclass
class Carried:
    """Names of parameters, by what became of them."""

    whole: list[str] = field(default_factory=list)
    by_name: dict[str, int] = field(default_factory=dict)
    """Rows that began anew, where rows have names."""
    fresh: list[str] = field(default_factory=list)

    def text(self) -> str:
        grown = ", ".join(f"{name}: {n} new rows" for name, n in self.by_name.items() if n)
        anew = f"; begun anew: {', '.join(self.fresh)}" if self.fresh else ""
        return f"{len(self.whole) + len(self.by_name)} parameters carried" + (f" ({grown})" if grown else "") + anew


def names_of(model: Recommender, item_ids: Sequence[str]) -> dict[str, tuple[Names, Names]]:
    """Parameter -> what its rows and columns are, for those where that depends on the data."""
    found: dict[str, tuple[Names, Names]] = {}
    trained = item_ids[: model.schema.n_train_items]
    if model.item_tower.residual.buckets is None:
        found["item_tower.residual.table.weight"] = (trained, None)
    for name, module in model.named_modules():
        if isinstance(module, FeatureEmbedding) and hasattr(module.spec, "values"):
            found[f"{name}.embedding.weight"] = (["missing", "unknown", *(("value", v) for v in module.spec.values)], None)
    for name, task in model.tasks.items():
        classes = getattr(task, "classes", None)
        if classes is not None:
            for part in ("head.weight", "head.bias", "bias"):
                found[f"tasks.{name}.{part}"] = (classes, None)
            found[f"tasks.{name}.wide.weight.weight"] = (trained, classes)
    return found


def carry(
    model: Recommender, item_ids: Sequence[str], state: Mapping[str, Tensor], old: Recommender, old_item_ids: Sequence[str]
) -> Carried:
    """Put the weights of `state` (of `old`) into `model`, in place.

    Raises WarmStartError where the trunk or the item tower has another shape.
    """
    told = Carried()
    here, there = names_of(model, item_ids), names_of(old, old_item_ids)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            before = state.get(name)
            if name.endswith("bucket_N2"):  # of hashes of the ids: it is not learned
                continue
            fits = before is not None and _fits(weight, before, here.get(name), there.get(name))
            if not fits and name.startswith(NEEDED):
                was = "none" if before is None else f"{tuple(before.shape)}"
                raise WarmStartError(
                    f"{name} has the shape {tuple(weight.shape)} here and {was} in the bundle: its weights cannot be carried over; "
                    "keep the section `model` as it was, or train without train.warm_start"
                )
            if not fits or before is None:
                told.fresh.append(name)
            elif name in here:
                told.by_name[name] = _by_name(weight, before, here[name], there[name], name.startswith("item_tower"))
            else:
                weight.copy_(before)
                told.whole.append(name)
    return told


def _fits(weight: Tensor, before: Tensor, here: tuple[Names, Names] | None, there: tuple[Names, Names] | None) -> bool:
    if (here is None) != (there is None) or weight.dim() != before.dim():
        return False
    named = [False, False] if here is None else [n is not None for n in here]
    return all((d < 2 and named[d]) or a == b for d, (a, b) in enumerate(zip(weight.shape, before.shape, strict=True)))


def _by_name(weight: Tensor, before: Tensor, here: tuple[Names, Names], there: tuple[Names, Names], zero: bool) -> int:
    """-> rows that have no name in the bundle. zero: they become zero."""
    (to_row, from_row), new = _places(here[0], there[0], weight.shape[0])
    if zero:
        weight[new] = 0.0
    if weight.dim() == 1:
        weight[to_row] = before[from_row]
        return len(new)
    (to_column, from_column), _ = _places(here[1], there[1], weight.shape[1])
    weight[to_row[:, None], to_column] = before[from_row[:, None], from_column]
    return len(new)


def _places(here: Names, there: Names, size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Rows of one name here and there, and rows that are only here."""
    if here is None or there is None:
        every = torch.arange(size)
        return (every, every), every[:0]
    old = {name: n for n, name in enumerate(there)}
    pairs = [(n, old[name]) for n, name in enumerate(here) if name in old]
    new = [n for n, name in enumerate(here) if name not in old]
    to, of = zip(*pairs, strict=True) if pairs else ((), ())
    return (torch.tensor(to, dtype=torch.int64), torch.tensor(of, dtype=torch.int64)), torch.tensor(new, dtype=torch.int64)
