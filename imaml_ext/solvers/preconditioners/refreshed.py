"""A preconditioner that is made once for several solves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from imaml_ext.ops import Coefficient
from imaml_ext.settings import COUNT
from imaml_ext.solvers.preconditioners.nystrom import Nystrom
from imaml_ext.solvers.preconditioners.preconditioner import MadePreconditioner, Preconditioner


@dataclass(eq=False)
class _Kept:
    """What was made last, for vectors of which kind, and how many solves have used it."""

    made: MadePreconditioner | None = None
    kind: tuple[object, ...] = ()
    solves: int = 0

    def __deepcopy__(self, memo: object) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


@dataclass(frozen=True)
class Refreshed(Preconditioner):
    """Keeps a made preconditioner for `every` solves, each with its own shift, then makes it again.

    A preconditioner of an earlier matrix changes how many products a solve takes, never what it solves. Vectors of
    another shape, dtype or device make it again at once. The state belongs to this object: copies, and a training that
    is resumed, begin without it.
    """

    preconditioner: Preconditioner = field(default_factory=Nystrom)  # What is made.
    every: Annotated[int, COUNT] = 10  # Solves that one serves; in IMAML, one per meta-step.
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False, compare=False, metadata={"recorded": False})

    def make(self, operator: Any, like: Tensor, shift: Coefficient = 0.0) -> MadePreconditioner:
        kept, kind = self._kept, (like.shape, like.dtype, like.device)
        if kept.made is None or kept.kind != kind or kept.solves >= self.every:
            made = self.preconditioner.make(operator, like, shift)
            kept.made, kept.kind, kept.solves = made, kind, 1
            return made
        kept.solves += 1
        return kept.made.for_shift(shift)
