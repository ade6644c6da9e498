"""Rows of a published file, whatever it is written in: CSV, JSON, JSON lines, Parquet, YAML, text.

No column is interpreted here. Rows are read one after the other where the format allows it.
"""

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import yaml

from safemoe_jax.errors import UserError

Row = dict[str, Any]

_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


def read_rows(path: Path) -> Iterator[Row]:
    """Yields a file's rows.

    - .csv: a row a line, by the header's names
    - .json: a list of objects, or of texts, or `{"instructions": [...]}` of either
    - .jsonl: an object a line
    - .parquet
    - .prompt: PyRIT's YAML, whose rows are `seeds`
    - .txt: a text a line

    Each may be compressed (.gz, .xz). Texts become rows with the one column `prompt`; every row has
    `file` besides, the file's name without its suffixes. What should be an object and is none, as a
    damaged line of .jsonl, is a row without columns: who reads the rows counts it.

    Raises:
      UserError: where the suffix is another, or the file is not what its suffix says.
    """
    suffixes = path.suffixes
    opened = _COMPRESSED.get(suffixes[-1] if suffixes else "", open)
    kind = (suffixes[:-1] if opened is not open else suffixes)[-1:]
    reader = _READERS.get("".join(kind))
    if reader is None:
        raise UserError(
            f"{path} is in no known format; its name must end with one of {', '.join(_READERS)}"
        )
    name = path.name.removesuffix("".join(suffixes))
    try:
        with opened(path, "rb") as file:
            for row in reader(file):
                if isinstance(row, str):
                    row = {"prompt": row}
                yield {**(row if isinstance(row, dict) else {}), "file": name}
    # Messages of the parsers may quote the text, so only the error's name is passed on.
    except (
        *(ValueError, TypeError, KeyError, RecursionError, EOFError, OSError),
        *(csv.Error, lzma.LZMAError, yaml.YAMLError, pyarrow.ArrowException),
    ) as error:
        raise UserError(
            f"{path} cannot be read as {kind[0]} ({type(error).__name__}); give the file as it was "
            "published"
        ) from error


def _csv(file: BinaryIO) -> Iterator[Row]:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, strict=True)


def _json(file: BinaryIO) -> Iterator[Row | str]:
    value = json.load(file)
    return iter(value["instructions"] if isinstance(value, dict) else value)


def _jsonl(file: BinaryIO) -> Iterator[Row]:
    for line in file:
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = {}
            yield value if isinstance(value, dict) else {}


def _parquet(file: BinaryIO) -> Iterator[Row]:
    table = pyarrow.parquet.ParquetFile(file)
    return (row for batch in table.iter_batches() for row in batch.to_pylist())


def _seeds(file: BinaryIO) -> Iterator[Row]:
    return iter(yaml.load(file, yaml.CSafeLoader)["seeds"])


def _text(file: BinaryIO) -> Iterator[str]:
    with io.TextIOWrapper(file, encoding="utf-8") as lines:
        yield from (line.strip() for line in lines if line.strip())


_READERS: dict[str, Callable[[BinaryIO], Iterator[Row | str]]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".prompt": _seeds,
    ".txt": _text,
}
