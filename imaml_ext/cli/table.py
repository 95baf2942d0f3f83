"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """The lines of a table; `right`: the columns that are aligned to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [">" if column in right else "<" for column in range(len(head))]
    return "\n".join("  ".join(map("{:{}{}}".format, line, aligned, widths)).rstrip() for line in lines)
