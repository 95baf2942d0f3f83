"""Task models: functions of many tasks at once, with flat parameters."""

from typing import TYPE_CHECKING

from imaml_ext._renamed import old_names
from imaml_ext.models.conv4 import Conv4
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.mlp import MLP
from imaml_ext.models.module import from_module
from imaml_ext.models.task_model import TaskModel

__all__ = [
    "MLP",
    "Conv4",
    "ParameterLayout",
    "TaskModel",
    "from_module",
]

if not TYPE_CHECKING:  # a type checker would believe that every name exists
    __getattr__ = old_names(
        __name__,
        {
            **{name: f"imaml_ext.losses.{name}" for name in ("Criterion", "LossFunction", "TaskLoss")},
            **{name: f"imaml_ext.batch.{name}" for name in ("Data", "TaskData")},
        },
    )
