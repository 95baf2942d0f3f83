"""The one exception of the data layer."""

from __future__ import annotations


class DataError(RuntimeError):
    """Data that is missing, damaged or not of the expected format; the message is one sentence that says which and
    what to do."""
