"""Run configuration: the settings with their defaults, presets, and loading from YAML."""

from proper.config.data import DataConfig, TaskConfig, TaskSpec
from proper.config.loading import load_config, load_run_config, make_config, with_chat
from proper.config.presets import PRESETS
from proper.config.privacy import PrivacyConfig
from proper.config.schema import (
    ComputeConfig,
    Config,
    EvaluationConfig,
    SplitConfig,
    seconds_of,
)
from proper.config.section import Section
from proper.config.stages import (
    ConstraintConfig,
    GroupsConfig,
    LastLayers,
    OptimizerConfig,
    PopulationConfig,
    TargetModules,
    TiersConfig,
    UsersConfig,
)
from proper.config.updates import DriftConfig, UpdateConfig

__all__ = [
    "ComputeConfig",
    "Config",
    "ConstraintConfig",
    "DataConfig",
    "DriftConfig",
    "EvaluationConfig",
    "GroupsConfig",
    "LastLayers",
    "OptimizerConfig",
    "PRESETS",
    "PopulationConfig",
    "PrivacyConfig",
    "Section",
    "SplitConfig",
    "TargetModules",
    "TaskConfig",
    "TaskSpec",
    "TiersConfig",
    "UpdateConfig",
    "UsersConfig",
    "load_config",
    "load_run_config",
    "make_config",
    "seconds_of",
    "with_chat",
]
