"""Task models: functions of many tasks at once, with flat parameters."""

from imaml_ext.batch import Data, TaskData
from imaml_ext.models.conv4 import Conv4
from imaml_ext.models.layout import ParameterLayout
from imaml_ext.models.loss import Criterion, LossFunction, TaskLoss
from imaml_ext.models.mlp import MLP
from imaml_ext.models.module import from_module
from imaml_ext.models.task_model import TaskModel

__all__ = [
    "MLP",
    "Conv4",
    "Criterion",
    "Data",
    "LossFunction",
    "ParameterLayout",
    "TaskData",
    "TaskLoss",
    "TaskModel",
    "from_module",
]
