"""The typed door to the native ops, `torch.ops.imaml_ext`: proximal steps here, whole networks in `ops.network`."""

from imaml_ext.ops import network as network
from imaml_ext.ops.prox import (
    Coefficient,
    as_coefficient,
    check_entries,
    compute_dtype,
    cpu_capability,
    prox_adam_step_,
    prox_gradient_,
    prox_momentum_step_,
    prox_penalty,
    prox_sgd_step_,
)

__all__ = [
    "Coefficient",
    "as_coefficient",
    "check_entries",
    "compute_dtype",
    "cpu_capability",
    "prox_adam_step_",
    "prox_gradient_",
    "prox_momentum_step_",
    "prox_penalty",
    "prox_sgd_step_",
]
