"""The configuration: one frozen pydantic tree, a file per idea. Imports no ML library; `frpo.recipe` reads it
from YAML.

Every field has a docstring, which `frpo config` prints beside its value. What one field alone can tell is
checked here; what needs the disk or the cluster is checked in `frpo.preflight`.
"""

from frpo.config.audit import AuditConfig, UtilityConfig
from frpo.config.cards import LARGEST_RANK
from frpo.config.cluster import ClusterConfig, find_cluster
from frpo.config.data import DataConfig, DatasetConfig
from frpo.config.estimators import EstimatorConfig, FrpoEstimator, GrpoEstimator, RlooEstimator
from frpo.config.finetuning import (
    OWN_PROMPTS,
    BaseConfig,
    DownstreamConfig,
    DownstreamRl,
    DownstreamSft,
    FinetuneConfig,
)
from frpo.config.model import LoraConfig, ModelConfig
from frpo.config.rewards import (
    Combine,
    FunctionReward,
    JudgeReward,
    ModelReward,
    RewardConfig,
    ServeReward,
    UrlReward,
)
from frpo.config.run import (
    AttackConfig,
    CertifyConfig,
    CheckpointConfig,
    Config,
    EvaluateConfig,
    HarnessConfig,
)
from frpo.config.section import ConfigError, Missing, Section
from frpo.config.training import (
    ArmConfig,
    GateConfig,
    LearnerConfig,
    ObjectiveConfig,
    RolloutConfig,
    RunLearner,
    TrainConfig,
    Workers,
)

__all__ = [
    "LARGEST_RANK",
    "OWN_PROMPTS",
    "ArmConfig",
    "AttackConfig",
    "AuditConfig",
    "BaseConfig",
    "CertifyConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Combine",
    "Config",
    "ConfigError",
    "DataConfig",
    "DatasetConfig",
    "DownstreamConfig",
    "DownstreamRl",
    "DownstreamSft",
    "EstimatorConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "FrpoEstimator",
    "FunctionReward",
    "GateConfig",
    "GrpoEstimator",
    "HarnessConfig",
    "JudgeReward",
    "LearnerConfig",
    "LoraConfig",
    "Missing",
    "ModelConfig",
    "ModelReward",
    "ObjectiveConfig",
    "RewardConfig",
    "RlooEstimator",
    "RolloutConfig",
    "RunLearner",
    "Section",
    "ServeReward",
    "TrainConfig",
    "UrlReward",
    "UtilityConfig",
    "Workers",
    "find_cluster",
]  # fmt: skip
