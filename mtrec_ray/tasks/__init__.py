"""Kinds of tasks. A new kind is one file and one case in `build_task`."""

from __future__ import annotations

from mtrec_ray.config import BinaryTask, ModelConfig, ProfileTask, RegressionTask, RetrievalTask, SimilarityTask, TaskConfig
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask, Task
from mtrec_ray.tasks.binary import Binary
from mtrec_ray.tasks.profile import Profile
from mtrec_ray.tasks.regression import Regression
from mtrec_ray.tasks.retrieval import Retrieval, build_retrieval
from mtrec_ray.tasks.similarity import Similarity, build_similarity

__all__ = ["Binary", "Forward", "PointwiseTask", "Profile", "Regression", "Retrieval", "Similarity", "Task", "build_task"]


def build_task(name: str, config: TaskConfig, schema: LogSchema, model: ModelConfig) -> Task:
    """The module of a configured task."""
    match config:
        case RetrievalTask():
            return build_retrieval(name, config, schema, model.width)
        case RegressionTask():
            return Regression(name, config.label, schema.labels[config.label], model.sharing_width)
        case BinaryTask():
            return Binary(name, config.label, model.sharing_width)
        case SimilarityTask():
            return build_similarity(name, config, schema, model.width)
        case ProfileTask():
            classes = next(a.classes for a in schema.attributes if a.name == config.attribute)
            return Profile(name, config.attribute, classes, model.width)
