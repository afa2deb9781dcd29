"""The run configuration: frozen pydantic models and a strict YAML loader.

One YAML file describes one run. Unknown keys, wrong types and contradictions are refused at load with
the path of the key and what was expected; `key.path=value` on the command line overrides a value.
"""

from mtrec_ray.config.data import AttributeConfig, DataConfig, ItemTextConfig, LabelConfig, PseudonymConfig, TableConfig
from mtrec_ray.config.encoder import EncoderConfig, TuningConfig
from mtrec_ray.config.load import ConfigError, load_config, parse_config
from mtrec_ray.config.model import ModelConfig
from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.config.run import (
    EvaluationConfig,
    IndexConfig,
    NoRetrievalError,
    PlacementConfig,
    RankingConfig,
    RunConfig,
    ScoringConfig,
    TrackingConfig,
)
from mtrec_ray.config.tasks import (
    BaseTask,
    BinaryTask,
    ItemAttributeTask,
    MulticlassTask,
    MultilabelTask,
    ProfileTask,
    RegressionTask,
    RetrievalTask,
    SimilarityTask,
    TaskConfig,
)
from mtrec_ray.config.train import GAIN, BalancingConfig, TrainConfig

__all__ = [
    "GAIN",
    "AttributeConfig",
    "BalancingConfig",
    "BaseTask",
    "BinaryTask",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "IndexConfig",
    "ItemAttributeTask",
    "ItemTextConfig",
    "LabelConfig",
    "ModelConfig",
    "MulticlassTask",
    "MultilabelTask",
    "NoRetrievalError",
    "PlacementConfig",
    "PretrainConfig",
    "ProfileTask",
    "PseudonymConfig",
    "RankingConfig",
    "RegressionTask",
    "RetrievalTask",
    "RunConfig",
    "ScoringConfig",
    "SimilarityTask",
    "TableConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuningConfig",
    "load_config",
    "parse_config",
]
