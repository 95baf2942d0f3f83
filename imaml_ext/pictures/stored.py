"""Picture files inside other files."""

from __future__ import annotations

import io
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredPicture:
    """The content of a picture file that lies in another file; it is opened and named as a path is."""

    content: bytes
    name: str

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.name
