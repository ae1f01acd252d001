"""A CSV, TSV, JSONL or Parquet file with one row a sample."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpkd.data.settings import TableSource
from dpkd.data.sources.records import Blob, Record, SourceContents, nearest
from dpkd.data.sources.text import cell_name, cell_text, cell_value, class_of_label, decode_text, split_lines
from dpkd.errors import UserError, without_secrets
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.untrusted import parse_json

Row = dict[str, Any]

MAX_EXPANSION = 100
MIN_TABLE_BYTES = 1 << 26
"""A Parquet file may unpack to so many times its size, or these bytes; one of a few kilobytes could to a terabyte."""
ROWS_AT_ONCE = 256


def find_in_table(source: TableSource) -> SourceContents:
    """All rows of the table; raises `UserError` where it cannot be read or lacks a column that the settings name."""
    rows = _read(source.path)
    _require_columns(source, rows)
    place = _without_query(source.path)
    folder = place.rpartition("/")[0] if "/" in place else "."
    records: dict[str, Record] = {}
    bad: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        path = row.get(source.path_column)
        item = f"{source.path} row {number}" + (f" ({path.strip()})" if isinstance(path, str) and path.strip() else "")
        try:
            record = _record(row, source=source, folder=folder)
            earlier = records.get(record.name)
            if earlier is not None and earlier.image.url != record.image.url:  # what tells them apart is masked
                record = replace(record, name=f"{record.name}~{storage.digest(record.image.url.encode())[:8]}")
            if record.name in records:
                raise ValueError("an earlier row has the same path")
            records[record.name] = record
        except ValueError as error:
            bad.append((item, str(error)))
    return SourceContents(records=tuple(records[name] for name in sorted(records)), bad=tuple(bad))


def _record(row: Row, *, source: TableSource, folder: str) -> Record:
    if error := row.get(_ERROR):
        raise ValueError(str(error))
    name = cell_text(row.get(source.path_column))
    if name is None:
        raise ValueError(f"column {source.path_column!r} is empty")
    name = _as_here(folder, name)
    mask = cell_text(row.get(source.mask_column)) if source.mask_column else None
    split = cell_name(row.get(source.split_column)) if source.split_column else None
    if source.split_column and split is None:
        raise ValueError(f"column {source.split_column!r} is empty")
    return Record(
        name=without_secrets(name),
        image=_blob(folder, name),
        class_name=class_of_label(row.get(source.label_column)) if source.label_column else None,
        split=split,
        group=cell_name(row.get(source.group_column)) if source.group_column else None,
        mask=_blob(folder, _as_here(folder, mask)) if mask else None,
        attributes={column: cell_value(row.get(column)) for column in source.attribute_columns},
    )


def _url(folder: str, name: str) -> str:
    return name if "://" in name or name.startswith("/") else storage.join(folder, name)


def _as_here(folder: str, name: str) -> str:
    """The path with slashes where a table made on Windows has backslashes, and no such file is here."""
    path = storage.local_path(_url(folder, name))
    return name.replace("\\", "/") if path is not None and "\\" in name and not storage.is_file(path) else name


def _blob(folder: str, name: str) -> Blob:
    url = _url(folder, name)
    path = storage.local_path(url)
    return Blob(url, size=path.stat().st_size if path is not None and storage.is_file(path) else -1)


def _without_query(url: str) -> str:
    return url.partition("?")[0] if "://" in url else url


def _require_columns(source: TableSource, rows: list[Row]) -> None:
    wanted = {
        "path_column": source.path_column,
        "label_column": source.label_column,
        "split_column": source.split_column,
        "group_column": source.group_column,
        "mask_column": source.mask_column,
        **{f"attribute_columns[{i}]": column for i, column in enumerate(source.attribute_columns)},
    }
    if not rows:
        raise UserError(f"data.source.path={source.path} has no rows: give a table with one row a sample")
    columns = {column for row in rows for column in row if column != _ERROR}
    for key, column in wanted.items():
        if column is not None and column not in columns:
            raise UserError(
                f"data.source.{key}={column!r} is no column of {source.path}{nearest(column, columns)}; "
                f"it has: {', '.join(sorted(columns))}"
            )
    if any(isinstance(row.get(source.path_column), dict | list) for row in rows):
        raise UserError(
            f"data.source.path_column={source.path_column!r} of {source.path} holds images or lists, not paths: write "
            "the images into files or WebDataset tars, and their paths into the table"
        )


_ERROR = "\0error"
"""Column of rows that could not be parsed."""


def _read(path: str) -> list[Row]:
    suffix = _without_query(path).rpartition(".")[2].lower()
    if suffix not in _READERS:
        raise UserError(
            f"data.source.path={path} is none of {', '.join('.' + s for s in _READERS)}: give one of these tables"
        )
    try:
        data = storage.read_bytes(path)
    except NO_FILE as error:
        raise UserError(f"data.source.path={path} does not exist: give the table that lists the images") from error
    try:
        return list(_READERS[suffix](data))
    except (ValueError, OverflowError, csv.Error, pa.ArrowException, OSError) as error:  # pyarrow's own are OSErrors
        raise UserError(f"data.source.path={path} cannot be read as .{suffix}: {error}") from error


def _read_csv(data: bytes, delimiter: str = ",") -> Iterator[Row]:
    for row in csv.DictReader(io.StringIO(decode_text(data), newline=""), delimiter=delimiter, strict=True):
        if None in row or None in row.values():
            yield {
                **{column: value for column, value in row.items() if column is not None},
                _ERROR: "cells and columns differ in number",
            }
        else:
            yield dict(row)


def _read_tsv(data: bytes) -> Iterator[Row]:
    return _read_csv(data, delimiter="\t")


def _read_jsonl(data: bytes) -> Iterator[Row]:
    for line in split_lines(data):
        try:
            row = parse_json(line)
        except ValueError as error:
            yield {_ERROR: f"the line is not JSON: {error}"}
            continue
        yield row if isinstance(row, dict) else {_ERROR: "the line is not a JSON object"}


def _read_parquet(data: bytes) -> Iterator[Row]:
    left_bytes = max(MIN_TABLE_BYTES, MAX_EXPANSION * len(data))
    for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=ROWS_AT_ONCE):
        left_bytes -= sum(map(_unpacked_bytes, batch.columns))
        if left_bytes < 0:
            raise UserError(
                f"the table of {len(data):,} bytes holds more than {MAX_EXPANSION} times that: it repeats few values "
                "very often, such as images; leave columns out"
            )
        yield from batch.to_pylist()


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _unpacked_bytes(column: pa.Array) -> int:
    """Bytes of a column's values, each counted as often as it occurs."""
    if not pa.types.is_dictionary(column.type) or not _is_text(column.type.value_type):
        return int(column.nbytes)
    length_N = pc.binary_length(column.dictionary).take(column.indices)
    return int(column.nbytes + (pc.sum(length_N.cast(pa.int64())).as_py() or 0))


_READERS: dict[str, Callable[[bytes], Iterator[Row]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
