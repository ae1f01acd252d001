"""Reads a CSV, TSV, JSONL or Parquet file with one row a sample."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpkd.data.settings import TableSource
from dpkd.data.shards import MASK_EXTENSION
from dpkd.data.sources.records import Blob, Record, SourceContents
from dpkd.data.text import cell_name, cell_value, class_of_label, decode_text, split_lines
from dpkd.errors import UserError, did_you_mean, without_secrets
from dpkd.io import storage
from dpkd.io.errors import NO_FILE
from dpkd.io.record import parse_json

Row = dict[Any, Any]
"""Cells by column; no column is called `None`."""

MAX_EXPANSION = 100
MIN_TABLE_BYTES = 1 << 26
"""Limit of an unpacked Parquet file (the larger counts): a few kilobytes could unpack to a terabyte."""
ROWS_AT_ONCE = 256
_ERROR = "\0error"
"""Column with the error of a row that cannot be parsed."""


def find_in_table(source: TableSource) -> SourceContents:
    """All rows of the table; raises `UserError` if it cannot be read or lacks a column of the settings."""
    rows = _rows(source)
    _require_columns(source, rows)
    path = _plain_path(source)
    folder = path.rpartition("/")[0] if "/" in path else "."
    records: dict[str, Record] = {}
    bad: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        try:
            record = _record(row, source=source, folder=folder)
            earlier = records.get(record.name)
            if earlier is not None and earlier.image.url != record.image.url:  # names with masked secrets are equal
                record = replace(record, name=f"{record.name}~{storage.digest(record.image.url.encode())[:8]}")
            if record.name in records:
                raise ValueError("an earlier row has the same path")
            records[record.name] = record
        except ValueError as error:
            cell = row.get(source.path_column)
            image = f" ({cell.strip()})" if isinstance(cell, str) and cell.strip() else ""
            bad.append((f"{source.path} row {number}{image}", str(error)))
    return SourceContents(records=tuple(records[name] for name in sorted(records)), bad=tuple(bad))


def columns_of(source: TableSource) -> list[str]:
    """The names of the columns, sorted; raises `UserError` if the table cannot be read."""
    return sorted({column for row in _rows(source) for column in row if column != _ERROR})


def _record(row: Row, *, source: TableSource, folder: str) -> Record:
    """The sample of a row; raises `ValueError` with the reason if it cannot be used."""
    if error := row.get(_ERROR):
        raise ValueError(str(error))
    path, split = cell_name(row.get(source.path_column)), cell_name(row.get(source.split_column))
    if path is None:
        raise ValueError(f"column {source.path_column!r} is empty")
    if source.split_column and split is None:
        raise ValueError(f"column {source.split_column!r} is empty")
    mask = cell_name(row.get(source.mask_column))
    name, image = _file(folder, path)
    return Record(
        name=without_secrets(name),
        image=image,
        class_name=class_of_label(row.get(source.label_column)),
        labels=_labels(row, source) if source.multi_label else None,
        split=split,
        group=cell_name(row.get(source.group_column)),
        given={MASK_EXTENSION: _file(folder, mask)[1]} if mask else {},
        attributes={column: cell_value(row.get(column)) for column in source.attribute_columns},
    )


def _labels(row: Row, source: TableSource) -> dict[str, int] | None:
    """The labels of a row, as in `Record.labels`; raises `ValueError` for a cell that is no such label."""
    if source.labels_column:
        cell = cell_name(row.get(source.labels_column))
        names = [name.strip() for name in cell.split("|")] if cell else []
        labels = [class_of_label(name) for name in names]
        if None in labels:
            raise ValueError(f"column {source.labels_column!r} has no label between the bars of {cell!r}")
        return {str(name): 1 for name in labels} or None
    uncertain = {"unknown": -1, "positive": 1, "negative": 0}
    values = {None: -1, "1": 1, "true": 1, "0": 0, "false": 0, "-1": uncertain[source.uncertain]}
    cells = {column: cell_name(row.get(column)) for column in source.label_columns}
    texts = {column: None if cell is None else cell.lower() for column, cell in cells.items()}
    if wrong := [column for column, text in texts.items() if text not in values]:
        raise ValueError(f"column {wrong[0]!r} has {cells[wrong[0]]!r}: use 1, 0, -1 for uncertain, or an empty cell")
    known = {column: values[text] for column, text in texts.items()}
    return known if max(known.values()) >= 0 else None


def _file(folder: str, name: str) -> tuple[str, Blob]:
    """The name and the file; backslashes become slashes if no file of that name exists (tables from Windows)."""
    url = name if "://" in name or name.startswith("/") else storage.join(folder, name)
    path = storage.local_path(url)
    if path is None or storage.is_file(path):
        return name, Blob(url, size=-1 if path is None else path.stat().st_size)
    return _file(folder, name.replace("\\", "/")) if "\\" in name else (name, Blob(url))


def _require_columns(source: TableSource, rows: list[Row]) -> None:
    if not rows:
        raise UserError(f"data.source.path={source.path} has no rows: give a table with one row a sample")
    columns = {column for row in rows for column in row if column != _ERROR}
    wanted = [(key, column) for key, column in source.model_dump().items() if key.endswith("_column")]
    for many in ("attribute_columns", "label_columns"):
        wanted += [(f"{many}[{i}]", column) for i, column in enumerate(getattr(source, many))]
    for key, column in wanted:
        if column is not None and column not in columns:
            raise UserError(
                f"data.source.{key}={column!r} is not a column of {source.path}{did_you_mean(column, columns)}; "
                f"its columns are: {', '.join(sorted(columns))}"
            )
    if any(isinstance(row.get(source.path_column), dict | list) for row in rows):
        raise UserError(
            f"data.source.path_column={source.path_column!r} of {source.path} has images or lists, not paths: write "
            "the images to files or WebDataset tars, and their paths to the table"
        )


def _plain_path(source: TableSource) -> str:
    """The path without the query of a URL."""
    return source.path.partition("?")[0] if "://" in source.path else source.path


def _rows(source: TableSource) -> list[Row]:
    path, suffix = source.path, _plain_path(source).rpartition(".")[2].lower()
    if suffix not in _READERS:
        raise UserError(f"data.source.path={path} is not a table: give a .{', .'.join(_READERS)} file")
    try:
        data = storage.read_bytes(path)
    except NO_FILE as error:
        raise UserError(f"data.source.path={path} does not exist: give the table of the images") from error
    try:
        return list(_READERS[suffix](data))
    except (ValueError, OverflowError, csv.Error, pa.ArrowException, OSError) as error:  # pyarrow raises OSErrors too
        raise UserError(f"data.source.path={path} cannot be read as .{suffix}: {error}") from error


def _read_csv(data: bytes, *, delimiters: str) -> Iterator[Row]:
    text = io.StringIO(decode_text(data), newline="")
    delimiter = max(delimiters, key=text.readline().count)  # the first of them, unless the header has more of another
    text.seek(0)
    for row in csv.DictReader(text, restkey=_ERROR, delimiter=delimiter, strict=True):
        if _ERROR in row or None in row.values():
            row[_ERROR] = "the numbers of cells and columns differ"
        yield row


def _read_jsonl(data: bytes) -> Iterator[Row]:
    for line in split_lines(data):
        try:
            row = parse_json(line)
            yield row if isinstance(row, dict) else {_ERROR: "the line is not a JSON object"}
        except ValueError as error:
            yield {_ERROR: f"the line is not JSON: {error}"}


def _read_parquet(data: bytes) -> Iterator[Row]:
    left_bytes = max(MIN_TABLE_BYTES, MAX_EXPANSION * len(data))
    for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=ROWS_AT_ONCE):
        for column in batch.columns:
            left_bytes -= (column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).nbytes
        if left_bytes < 0:
            raise UserError(
                f"the table of {len(data):,} bytes unpacks to more than {MAX_EXPANSION} times its size, because it "
                "repeats values, such as images: remove columns"
            )
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[bytes], Iterator[Row]]] = {
    "csv": partial(_read_csv, delimiters=",;\t"),
    "tsv": partial(_read_csv, delimiters="\t"),
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
