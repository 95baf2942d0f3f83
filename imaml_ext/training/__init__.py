"""Training and evaluation: configurations, Algorithm 1, run directories and their reports."""

from __future__ import annotations

import importlib
from typing import Any

from imaml_ext.errors import ConfigError
from imaml_ext.training.config import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    InnerConfig,
    MetaConfig,
    ModelConfig,
    OuterConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from imaml_ext.training.presets import PRESETS, Preset

_LAZY = {  # these need torch, or the pictures' library
    "train": "trainer",
    "Interrupted": "signals",
    "Experiment": "experiment",
    "build": "experiment",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "RunError": "run_directory",
    "CheckpointError": "checkpoint",
}

__all__ = [
    "PRESETS",
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "InnerConfig",
    "MetaConfig",
    "ModelConfig",
    "OuterConfig",
    "Preset",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
