"""Pictures in .parquet files, as the data sets of Hugging Face have them.

Columns: `image` {bytes, path}, the content of a picture file, and `label`, an integer or text. The names of integer
labels are in the metadata under "huggingface".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imaml_ext.data.listing import SPLIT_NAMES
from imaml_ext.data.optional import optional
from imaml_ext.data.packing import Item, Pictures, packed_pictures
from imaml_ext.errors import DataError
from imaml_ext.pictures import Reading, StoredPicture

_PLACES = (".", "data", "default")


def find(folder: Path) -> list[Path]:
    """Lists the .parquet files of a folder, or of data/ or default/ in it; empty where there are none."""
    for place in _PLACES:
        files = sorted([*(folder / place).glob("*.parquet"), *(folder / place).glob("*/*.parquet")])
        if files:
            return files
    return []


def split_of(path: Path) -> str | None:
    """Returns the split that a file is of, train-00000-of-00013.parquet or train/0000.parquet; None where of none."""
    for name in (path.stem.partition("-")[0], path.parent.name):
        if name in SPLIT_NAMES:
            return SPLIT_NAMES[name]
    return None


def load(folder: Path, files: Sequence[Path], reading: Reading, *, cache: Path, skip_damaged: bool = False) -> Pictures:
    """Reads the pictures of files once, and packs them.

    Raises:
        DataError: pyarrow is missing, a file is damaged or has other columns, or as `packed_pictures`.
    """
    opened = [_open(path) for path in files]
    total = sum(file.metadata.num_rows for file in opened)

    def items() -> Iterator[Item]:
        for path, file in zip(files, opened, strict=True):
            yield from _items(folder, path, file)

    return packed_pictures(folder, files, items, reading, cache=cache, total=total, skip_damaged=skip_damaged)


def labels_of(files: Iterable[Path]) -> set[str]:
    """Returns the classes that the pictures of files are of."""
    labels: set[str] = set()
    for path in files:
        file = _open(path)
        name_of = _names(file)
        labels.update(name_of(v) for v in file.read(columns=["label"]).column("label").unique().to_pylist())
    return labels


def _open(path: Path) -> Any:
    parquet = optional("pyarrow.parquet", extra="parquet", what=f"{path.name}")
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has many kinds
        raise DataError(f"{path} is damaged or not a .parquet file ({error})") from error
    columns = file.schema_arrow.names
    if not {"image", "label"} <= set(columns):
        raise DataError(f"{path} must have the columns image and label, it has {', '.join(columns) or 'none'}")
    return file


def _items(folder: Path, path: Path, file: Any) -> Iterator[Item]:
    name_of, row = _names(file), 0
    try:
        for batch in file.iter_batches(batch_size=256, columns=["image", "label"]):
            for image, label in zip(batch.column("image").to_pylist(), batch.column("label").to_pylist(), strict=True):
                content = image.get("bytes") if isinstance(image, dict) else image
                where = f"{path.relative_to(folder)}:{row}"
                if not isinstance(content, bytes):
                    raise DataError(f"{where}: image must hold the bytes of a picture, got {type(content).__name__}")
                yield Item(name_of(label), StoredPicture(content, where))
                row += 1
    except OSError as error:
        raise DataError(f"{path} is damaged ({error})") from error


def _names(file: Any) -> Any:
    """Returns the function that gives a label its name."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, ValueError, TypeError):
        return str
    return lambda label: str(names[label]) if isinstance(label, int) and 0 <= label < len(names) else str(label)
