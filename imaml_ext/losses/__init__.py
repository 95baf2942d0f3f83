"""Losses of many tasks at once, with their gradients and curvature."""

from imaml_ext.losses.criteria import Criterion
from imaml_ext.losses.curvature import CurvatureOperator, GaussNewtonOperator, HessianOperator
from imaml_ext.losses.loss import FunctionLoss, Loss, LossFunction, LossGradient, as_loss
from imaml_ext.losses.task_loss import TaskLoss

__all__ = [
    "Criterion",
    "CurvatureOperator",
    "FunctionLoss",
    "GaussNewtonOperator",
    "HessianOperator",
    "Loss",
    "LossFunction",
    "LossGradient",
    "TaskLoss",
    "as_loss",
]
