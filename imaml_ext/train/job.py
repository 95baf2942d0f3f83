"""Finds the processes of this job: this one alone, or the ranks that torchrun has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imaml_ext.train.ranks import Ranks

_current: Ranks | None = None


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Gives the ranks of this job for as long as the context is open; within it, `joined()` gives the same again.

    Raises:
        RunError: torchrun's other processes cannot be reached, or one of them has ended.
        ReportedElsewhere: the same, and another rank says why.
    """
    global _current
    if _current is not None:
        yield _current
    elif not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield Ranks()
    else:
        from imaml_ext.train.process_group import ProcessGroup

        with ProcessGroup.joined() as _current:
            try:
                yield _current
            finally:
                _current = None
