"""Where records come from: files, saved datasets, named datasets and lists in memory.

Every source becomes an iterator of ``(place, record)``. The place ("file:line" or "dataset[index]") goes
into error messages; the record is a mapping from column name to value. Files are read as a stream, so a
reader that stops early never looks at the rest.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import DataError
from ._say import option

Row = tuple[str, Mapping[str, Any]]

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[^/\\]+)?")
# Suffixes that people try. Naming them keeps a mistyped file from being looked up as a dataset on the hub.
_OTHER_SUFFIXES = frozenset(
    {
        ".txt",
        ".md",
        ".html",
        ".xml",
        ".yaml",
        ".yml",
        ".toml",
        ".xls",
        ".xlsx",
        ".arrow",
        ".pkl",
        ".gz",
        ".zip",
    }
)


def read_rows(source: object, split: str | None = None) -> Iterator[Row]:
    """Return the records of ``source``, each with its place.

    Args:
        source: A file, "-" (lines of JSON from standard input), a pattern of files, a folder written by
            ``datasets.save_to_disk``, the name of a dataset ("name" or "name:config"), several of these, a
            ``datasets`` object, or a list of dicts.
        split: Which split of a dataset to take. Needed only when it has several.

    Raises:
        DataError: If the source is missing, empty or malformed. Some of it shows only while iterating.
    """
    if isinstance(source, str | os.PathLike):
        return _rows_by_name(os.fsdecode(source), split, may_be_dataset=isinstance(source, str))
    if isinstance(source, list | tuple) and source and all(isinstance(s, str | os.PathLike) for s in source):
        return _joined(source, split)
    if isinstance(source, Mapping):
        return _memory_rows(_pick_split(source, split, "the dataset"), "dataset")
    if split is not None:
        raise DataError(
            f"{option('split', split)} was given, but a {type(source).__name__} has no splits; leave it out."
        )
    return _memory_rows(source, "dataset" if hasattr(source, "column_names") else "list")


def _joined(sources: Sequence[Any], split: str | None) -> Iterator[Row]:
    """The records of several sources, one after the other."""
    names = [os.fsdecode(source) for source in sources]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"the data source {repeated!r} is given twice; name each file once.")
    for source in sources:
        yield from read_rows(source, split)


def _rows_by_name(name: str, split: str | None, *, may_be_dataset: bool) -> Iterator[Row]:
    if not name:
        raise DataError("The data source is an empty string; give a file, a folder or the name of a dataset.")
    if name == "-":
        return _file_rows(Path("-"), _jsonl_rows)
    path = Path(name).expanduser()
    if path.is_dir():
        return _memory_rows(_load_folder(path, split), str(path))
    if not path.exists() and glob.has_magic(name):
        files = sorted(file for file in glob.iglob(str(path), recursive=True) if Path(file).is_file())  # noqa: PTH207
        if not files:
            raise DataError(f"{path}: no file is called so. Looked in {Path.cwd()}.")
        return _joined(files, split)
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    if not path.exists():
        file_like = not may_be_dataset or packed or suffix in {*_READERS, *_OTHER_SUFFIXES}
        if not file_like and _DATASET_NAME.fullmatch(name):
            return _memory_rows(_load_named(name, split), name)
        raise DataError(f"{path}: there is no such file. Looked in {Path.cwd()}.")
    if split is not None:
        raise DataError(f"{path}: {option('split', split)} was given, but a file has no splits; leave it out.")
    if suffix not in _READERS or (packed and suffix == ".parquet"):
        known = ", ".join(_READERS)
        raise DataError(
            f"{path}: cannot read a file with the suffix {suffix + '.gz' * packed!r}. Known suffixes: {known}; of text "
            "files also with .gz behind."
        )
    return _file_rows(path, _READERS[suffix])


def _file_rows(path: Path, reader: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    empty = True
    try:
        for row in reader(path):
            empty = False
            yield row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if empty:
        raise DataError(f"{path}:1: the file is empty: it holds no records.")


# --- text files -------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield ``(line number, line)``, decoding each line by itself so that a bad byte has an address."""
    offset = 0
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            skip = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
            try:
                line = raw[skip:].decode("utf-8")
            except UnicodeDecodeError as error:
                at = skip + error.start
                hint = " It looks like UTF-16." if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise DataError(
                    f"{path}:{number}: not valid UTF-8 at byte offset {offset + at} of the file "
                    f"(byte 0x{raw[at]:02x}).{hint} Save the file as UTF-8."
                ) from error
            yield number, line
            offset += len(raw)


def _opened(path: Path) -> AbstractContextManager[Iterable[bytes]]:
    if path == Path("-"):
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: malformed JSON at column {error.colno}: {error.msg}. "
                "Each line must be one complete JSON object."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: JSON that Python cannot hold: {error}.") from error
        yield _object(f"{path}:{number}", record)


def _object(place: str, record: object) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: expected a JSON object such as {{...}}, found {_json_kind(record)}.")
    return place, record


def _json_kind(value: object) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of one JSON list, taking them one at a time so that each has its line."""
    text = "".join(line for _, line in _lines(path))
    position = _after_space(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise DataError(
            f"{path}:{1 + text.count(chr(10), 0, position)}: a .json file must hold one list of objects. "
            "For one object per line, name the file .jsonl."
        )
    position = _after_space(text, position + 1)
    line, counted = 1, 0
    decoder = json.JSONDecoder()
    try:
        while not text.startswith("]", position):
            line, counted = line + text.count("\n", counted, position), position
            record, end = decoder.raw_decode(text, position)
            yield _object(f"{path}:{line}", record)
            position = _after_comma(text, end)
        if _after_space(text, position + 1) != len(text):
            raise json.JSONDecodeError("something follows the list", text, _after_space(text, position + 1))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}.") from error
    except RecursionError as error:
        raise DataError(f"{path}:{line}: JSON that is nested too deeply.") from error


def _after_comma(text: str, position: int) -> int:
    """Step from the end of a list item to the next item or to the closing bracket."""
    position = _after_space(text, position)
    if text.startswith("]", position):
        return position
    if not text.startswith(",", position):
        raise json.JSONDecodeError("expected ',' or ']'", text, position)
    position = _after_space(text, position + 1)
    if text.startswith("]", position):
        raise json.JSONDecodeError("a comma before ']'", text, position)
    return position


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _csv_rows(path: Path, delimiter: str = ",") -> Iterator[Row]:
    # The limit is one number for the whole process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    # Strict, because a lenient reader takes the rest of the file into a field whose quote is never closed.
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}:{start}: malformed row: {error} (found at line {reader.line_num}). "
                'A field with quotes in it must be quoted, and its quotes doubled ("").'
            ) from error
        if fields is None:
            break
        if not fields:
            continue
        if header is None:
            header = _checked_header(fields, f"{path}:{start}")
            continue
        if len(fields) != len(header):
            raise DataError(f"{path}:{start}: {len(fields)} fields, but the header has {len(header)}: {header}.")
        yield f"{path}:{start}", dict(zip(header, fields, strict=True))


def _tsv_rows(path: Path) -> Iterator[Row]:
    return _csv_rows(path, delimiter="\t")


def _checked_header(header: list[str], place: str) -> list[str]:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{place}: the header names a column twice: {', '.join(map(repr, repeated))}.")
    return header


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"{path}[{index}]", _without_nulls(record)
                    index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}[{index}]: cannot be read as parquet: {error}.") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
}


# --- datasets ---------------------------------------------------------------------------------------------


def _load_folder(path: Path, split: str | None) -> object:
    import datasets

    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise DataError(
            f"{path}: this folder was not written by datasets.save_to_disk (it has no dataset_dict.json and "
            "no state.json). Name a file in it instead."
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the library raises, the folder is unusable
        raise DataError(f"{path}: the saved dataset cannot be loaded: {error}") from error
    if isinstance(loaded, Mapping):
        return _pick_split(loaded, split, str(path))
    if split is not None:
        raise DataError(f"{path}: {option('split', split)} was given, but this dataset has no splits; leave it out.")
    return loaded


def _load_named(name: str, split: str | None) -> object:
    import datasets

    dataset, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, config or None, split=split)
    except Exception as error:  # the library raises a dozen kinds, and all of them mean the same here
        raise DataError(
            f"{name}: there is no such file or folder here, and no dataset of that name could be loaded "
            f"({type(error).__name__}: {error}). If you meant a file, check its path. If you meant a "
            "dataset, check the name, the config (written name:config) and the split; when this machine is "
            "offline, download it elsewhere, write it with save_to_disk, and give that folder."
        ) from error
    return _pick_split(loaded, None, name) if isinstance(loaded, Mapping) else loaded


def _pick_split(splits: Mapping[Any, Any], split: str | None, name: str) -> object:
    """Return the named split, or the only one there is."""
    if not splits or any(isinstance(part, str) or not isinstance(part, Iterable) for part in splits.values()):
        raise DataError(f"{name}: expected a list of records or a mapping from split to records.")
    found = ", ".join(map(repr, splits))
    if split is None and len(splits) > 1:
        raise DataError(
            f"{name}: there are several splits: {found}. Choose one, e.g. {option('split', str(next(iter(splits))))}."
        )
    if split is not None and split not in splits:
        raise DataError(f"{name}: there is no split {split!r}. Found: {found}.")
    return next(iter(splits.values())) if split is None else splits[split]


def _memory_rows(source: object, name: str) -> Iterator[Row]:
    if not isinstance(source, Iterable):
        raise DataError(f"Cannot read records from a {type(source).__name__}; give a path or a list of dicts.")
    # A dataset formatted for torch or numpy would hand out tensors instead of text and numbers.
    records = source.with_format(None) if hasattr(source, "with_format") else source
    table = hasattr(source, "column_names")
    index = -1
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise DataError(f"{name}[{index}]: expected a dict, found a {type(record).__name__}.")
        yield f"{name}[{index}]", _without_nulls(record) if table else record
    if index < 0:
        raise DataError(f"{name}: it is empty: it holds no records.")


def _without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """A table's record without the nulls inside its values: there each object has the keys of all the others."""
    return {column: _pruned(value) if isinstance(value, dict | list) else value for column, value in record.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(part) for key, part in value.items() if part is not None}
    return [_pruned(part) for part in value] if isinstance(value, list) else value
