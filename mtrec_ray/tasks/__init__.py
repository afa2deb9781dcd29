"""Kinds of tasks. A new kind is one file with a `KIND`, and its name in `KINDS` (docs/tasks.md)."""

from __future__ import annotations

from collections.abc import Mapping

from mtrec_ray.config import BaseTask, ModelConfig
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks import binary, item_attribute, multiclass, multilabel, profile, regression, retrieval, similarity
from mtrec_ray.tasks.base import Forward, ItemTask, PointwiseTask, Task, UserTask
from mtrec_ray.tasks.binary import Binary
from mtrec_ray.tasks.judge import Judge, Kind
from mtrec_ray.tasks.profile import Profile
from mtrec_ray.tasks.regression import Regression
from mtrec_ray.tasks.retrieval import Retrieval
from mtrec_ray.tasks.similarity import Similarity

__all__ = [
    "KINDS", "Binary", "Forward", "ItemTask", "Judge", "Kind", "PointwiseTask", "Profile", "Regression", "Retrieval",
    "Similarity", "Task", "UserTask", "build_task", "judges_of", "register",
]  # fmt: skip

KINDS: dict[str, Kind] = {k.KIND.name: k.KIND for k in (
    retrieval, regression, binary, multiclass, multilabel, similarity, profile, item_attribute,
)}  # fmt: skip


def register(kind: Kind) -> None:
    """Add a kind that lives elsewhere; before a configuration that names it is read. Raises ValueError for a taken name."""
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"there is a kind {kind.name!r} of tasks already")


def build_task(name: str, config: BaseTask, schema: LogSchema, model: ModelConfig) -> Task:
    """The module of a configured task."""
    return KINDS[config.kind].task.build(name, config, schema, model)


def judges_of(tasks: Mapping[str, BaseTask]) -> dict[str, Judge]:
    """Task -> its judge."""
    return {name: KINDS[config.kind].judge(name, config) for name, config in tasks.items()}
