"""Readers of JSON Lines, CSV, TSV, Parquet and Arrow files, row by row, with errors that name file, row and remedy.

A row is a dict. Rows are counted from 1, without blank lines. Text files are UTF-8.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_BYTES = 16 * 2**20  # of Parquet rows in memory at once; as Python objects they take several times as much
BATCH_ROWS = 256
ROWS_FOR_COLUMNS = 100  # rows read to find the columns of a JSON Lines file, since rows may differ in their keys
SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = [".jsonl", ".json", *SEPARATORS]
SWALLOWED_LINES = {",": 3, "\t": 2}  # lines of one record that all look like records: a quote that was never closed
NOT_TEXT = {  # first bytes of files that are no UTF-8 text, and what they are
    b"PAR1": "a Parquet file; remedy: the suffix .parquet",
    b"\x1f\x8b": "compressed by gzip; remedy: one more suffix, .gz",
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; remedy: unpack it, or export CSV from the spreadsheet",
    b"\xff\xfe": "in UTF-16 or UTF-32; remedy: save it as UTF-8",
    b"\xfe\xff": "in UTF-16; remedy: save it as UTF-8",
    b"\x00\x00\xfe\xff": "in UTF-32; remedy: save it as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; remedy: git lfs pull",
    b"<": "a web page or XML; remedy: download the file itself",
}
Bad = Callable[[str], None]  # called with the message of a row that cannot be read; the row is skipped

csv.field_size_limit(2**31 - 1)  # Python's own limit is 131,072 characters a cell


@dataclass(frozen=True)
class TextTable:
    """A JSON Lines, CSV or TSV file. records: yields (line number, unparsed row); convert: parses it to a dict."""

    path: Path
    columns: list[str]
    records: Callable[[Bad], Iterator[tuple[int, object]]]
    convert: Callable[[object], dict]

    @cached_property
    def num_rows(self) -> int:
        """The number of rows, counted by reading the whole file."""
        return sum(1 for _ in self.records(_ignore))

    def rows(
        self, numbers: np.ndarray | None = None, columns: list[str] | None = None, bad: Bad | None = None
    ) -> Iterator[tuple[int, dict]]:
        """(row number from 1, row). numbers: these rows only, sorted, counted from 0; others are not parsed.

        columns: those that are needed; a text file yields the others too. bad: called with the message of every
        row that cannot be read; without it the first such row is a ValueError.
        """
        bad = bad or _raise
        wanted = None if numbers is None else iter(_checked(self.path, numbers).tolist())
        target = None if wanted is None else next(wanted, -1)
        if target == -1:
            return
        number = 0
        for number, (line, record) in enumerate(self.records(bad), start=1):
            if target is not None and number != target + 1:
                continue
            try:
                row = self.convert(record)
            except ValueError as error:
                bad(f"{self.path}, row {number} (line {line}): {error}")
            else:
                yield number, row
            if wanted is not None and (target := next(wanted, -1)) == -1:
                return
        if target is not None:
            raise ValueError(f"{self.path} has {number} rows, but row {target + 1} is asked for")


@dataclass(frozen=True)
class ParquetTable:
    """A memory-mapped Parquet file; `rows` holds one batch of about BATCH_BYTES, also of a huge row group."""

    path: Path
    columns: list[str]
    num_rows: int

    def rows(
        self, numbers: np.ndarray | None = None, columns: list[str] | None = None, bad: Bad | None = None
    ) -> Iterator[tuple[int, dict]]:
        """(row number from 1, row); see TextTable.rows. Only `columns` are read, all if None."""
        if numbers is not None and len(_checked(self.path, numbers)) and numbers[-1] >= self.num_rows:
            raise ValueError(f"{self.path} has {self.num_rows} rows, but row {numbers[-1] + 1} is asked for")
        with _parquet(self.path) as file:
            first = 0
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if numbers is None or np.searchsorted(numbers, first) < np.searchsorted(numbers, last):
                    yield from self._group_rows(file, group, first, numbers, columns)
                first = last

    def _group_rows(self, file, group, first, numbers, columns) -> Iterator[tuple[int, dict]]:
        """Rows of one row group, whose first row is the file's row `first`, counted from 0."""
        size = file.metadata.row_group(group)
        batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * size.num_rows // max(1, size.total_byte_size)))
        try:
            for batch in file.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False):
                chosen = np.arange(first, first + batch.num_rows)
                if numbers is not None:
                    chosen = numbers[slice(*np.searchsorted(numbers, [first, first + batch.num_rows]))]
                rows = batch if numbers is None else batch.take(pa.array(chosen - first, type=pa.int64()))
                yield from zip((chosen + 1).tolist(), rows.to_pylist())
                first += batch.num_rows
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}, after row {first}: not UTF-8 ({error}); remedy: write it again") from None
        except (pa.ArrowException, OSError) as error:
            message = f"{self.path}, after row {first}: damaged ({_line(error)}); remedy: fetch it again"
            raise ValueError(message) from None


@dataclass(frozen=True)
class ArrowTable:
    """A memory-mapped Arrow stream, as `datasets` saves it."""

    path: Path
    columns: list[str]
    content: pa.Table

    @property
    def num_rows(self) -> int:
        return self.content.num_rows

    def rows(
        self, numbers: np.ndarray | None = None, columns: list[str] | None = None, bad: Bad | None = None
    ) -> Iterator[tuple[int, dict]]:
        """(row number from 1, row); see TextTable.rows. Only `columns` are read, all if None."""
        chosen = np.arange(self.num_rows) if numbers is None else _checked(self.path, numbers)
        if len(chosen) and chosen[-1] >= self.num_rows:
            raise ValueError(f"{self.path} has {self.num_rows} rows, but row {chosen[-1] + 1} is asked for")
        content = self.content.select(columns) if columns else self.content
        for start in range(0, len(chosen), BATCH_ROWS):
            some = chosen[start : start + BATCH_ROWS]
            yield from zip((some + 1).tolist(), content.take(pa.array(some, type=pa.int64())).to_pylist())


Table = TextTable | ParquetTable | ArrowTable


def open_table(path: Path, names: list[str] | None = None) -> Table:
    """The table of a file with suffix .jsonl, .json, .csv, .tsv (each also with .gz), .parquet or .arrow.

    A .json file has one object per line; .csv and .tsv begin with a header. names: the columns of a .csv or .tsv file
    without one. The columns of JSON Lines are those of the first 100 rows. ValueError for a file that is missing,
    empty, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {found}; remedy: the path of a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; remedy: a file with rows")
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.suffix == ".parquet":
        return _open_parquet(path)
    if path.suffix == ".arrow":
        return _open_arrow(path)
    if suffix in TEXT_SUFFIXES:
        _check_first_bytes(path)
        return _open_separated(path, SEPARATORS[suffix], names) if suffix in SEPARATORS else _open_json(path)
    known = ", ".join([*TEXT_SUFFIXES, "the same with .gz", ".parquet", ".arrow"])
    raise ValueError(f"{path}: unknown suffix '{path.suffix}'; remedy: a file of one of the kinds {known}")


def require_columns(table: Table, columns: Iterable[str]) -> None:
    """ValueError that names the first column that the table lacks, and those that it has."""
    for column in columns:
        if column not in table.columns:
            raise ValueError(
                f"{table.path} has no column '{column}', only: {', '.join(map(_name, table.columns))}; remedy: "
                + (_separator_hint(table) or "name the column so (in CSV and TSV, in a header line)")
            )


def _separator_hint(table: Table) -> str:
    """What to do if the header line of a CSV or TSV file is split by another separator than the file's suffix says."""
    header, suffix = table.columns[0], next((name for name in SEPARATORS if name in table.path.suffixes), None)
    if suffix is None or len(table.columns) > 1:
        return ""
    if header.startswith("sep="):
        return "remove the first line, which is for spreadsheets only, and separate by commas"
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars"), (",", "commas")):
        if separator in header:
            return f"its cells are separated by {name}, but {suffix} means {'commas' if suffix == '.csv' else 'tabs'}"
    return ""


def _check_first_bytes(path: Path) -> None:
    """ValueError if a file begins like one of another kind or encoding, or has only carriage returns as line ends."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(2**16)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip ({error}); remedy: fetch it again") from None
    for signature, what in NOT_TEXT.items():
        if start.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(signature):
            raise ValueError(f"{path} is {what}")
    if start[:2].count(0) == 1:
        raise ValueError(f"{path} is in UTF-16; remedy: save it as UTF-8")
    if b"\r" in start and b"\n" not in start:
        raise ValueError(f"{path} ends its lines with carriage returns alone; remedy: save it with line feeds")


# JSON Lines -------------------------------------------------------------------------------------


def _open_json(path: Path) -> TextTable:
    """A file with one object per line, or with one array of objects, which is read as a whole."""
    first = next((text.lstrip()[:1] for _, text in _lines(path, _ignore) if text.strip()), "")
    return _open_array(path) if first == "[" else _open_json_lines(path)


def _open_array(path: Path) -> TextTable:
    try:
        rows = _parse("".join(text for _, text in _lines(path, _raise)), "one array of objects, or one object per line")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not an object but {excerpt(row)}; remedy: an array of objects")
    columns = list(dict.fromkeys(column for row in rows[:ROWS_FOR_COLUMNS] for column in row))
    if not columns:
        raise ValueError(f"{path} holds no rows with columns; remedy: a file with rows")
    return TextTable(path, columns, lambda bad: enumerate(rows, start=1), dict)


def _open_json_lines(path: Path) -> TextTable:
    table = TextTable(path, [], lambda bad: _json_records(path, bad), _parse_object)
    problems: list[str] = []
    for number, row in table.rows(bad=problems.append):
        if number > 1 and not table.columns and problems:
            break  # a first row that is no object: the file is of another kind, such as a JSON array
        table.columns.extend(column for column in row if column not in table.columns)
        if number >= ROWS_FOR_COLUMNS:
            break
    if not table.columns:
        raise ValueError(problems[0] if problems else f"{path} holds no rows with columns; remedy: a file with rows")
    return table


def _json_records(path: Path, bad: Bad) -> Iterator[tuple[int, str]]:
    return ((line, text) for line, text in _lines(path, bad) if not text.isspace())


def _parse_object(text: str) -> dict:
    row = _parse(text.strip(), "one JSON object per line")
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {excerpt(text.strip())}; remedy: one JSON object per line")
    if row and all(isinstance(value, dict) for value in row.values()):
        raise ValueError(
            f"an object of columns, as pandas' to_json writes by default: {excerpt(text.strip())}; "
            'remedy: to_json(path, orient="records", lines=True)'
        )
    return row


def _parse(text: str, remedy: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_without_doubled_keys)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"invalid JSON ({error.msg}, character {error.pos + 1}): {excerpt(text)}; remedy: {remedy}"
        ) from None
    except RecursionError:
        raise ValueError(f"nested too deeply: {excerpt(text)}; remedy: one flat JSON object per line") from None


def _without_doubled_keys(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {doubled!r} occurs twice in one object; remedy: each key once")
    return values


# CSV and TSV ------------------------------------------------------------------------------------


def _open_separated(path: Path, separator: str, names: list[str] | None) -> TextTable:
    _, columns = (0, names) if names else next(_cells(path, separator, _ignore), (1, []))
    if isinstance(columns, csv.Error) or not any(column.strip() for column in columns):
        raise ValueError(f"{path}: the header is missing; remedy: a first line that names the columns")
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled:
        raise ValueError(f"{path}: the header names columns twice: {doubled}; remedy: a name of its own for each")

    def records(bad: Bad) -> Iterator[tuple[int, list[str] | csv.Error]]:
        return islice(_cells(path, separator, bad), 0 if names else 1, None)

    def convert(cells: list[str] | csv.Error) -> dict:
        if isinstance(cells, csv.Error):
            raise ValueError(f"{cells}; remedy: {ESCAPED if isinstance(cells, _Escaped) else QUOTED}")
        if len(cells) != len(columns):
            known = "there are" if names else "the header has"
            raise ValueError(
                f"{len(cells)} cells, but {known} {len(columns)}: {excerpt(separator.join(cells))}; "
                "remedy: quote cells that hold separators, quotes or line breaks"
            )
        return dict(zip(columns, cells))

    return TextTable(path, columns, records, convert)


QUOTED = "double the quotes within quoted cells, and close every quote"
ESCAPED = "write it without an escape character (in pandas, without escapechar), or as JSON Lines"


class _Escaped(csv.Error):
    """Backslashes that an escape character seems to have written."""


def _cells(path: Path, separator: str, bad: Bad) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(number of its first line, cells) of every record, the header first; an error in place of unreadable cells.

    A quote that opens a cell and is not closed joins the following lines to one cell, and their rows would be lost. So
    a record of several lines is an error if each of its lines would be a whole record without quotes. So is a quote
    that a backslash escapes, and, at the end, a file in which all backslashes stand in pairs or before separators.
    """
    read: list[str] = []  # the lines of one record
    lines = (read.append(text) or text for _, text in _lines(path, bad))
    reader, width = csv.reader(lines, delimiter=separator, strict=True), 0
    literal = re.compile(rf"(?<!\\)(?:\\\\)*\\(?![\\{re.escape(separator)}\"\r\n])")  # a backslash of the text itself
    has_pairs = has_literal = False
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells = error
        if cells is None:
            if has_pairs and not has_literal:
                yield line, _Escaped("backslashes stand in pairs or before separators alone, as if to escape them")
            return
        if any("\\" in text for text in read):
            raw = "".join(read)
            has_pairs, has_literal = True, has_literal or bool(literal.search(raw))
            if '\\""' not in raw and not isinstance(cells, csv.Error) and any('\\"' in cell for cell in cells):
                cells = _Escaped("a backslash stands before a quote, as if to escape it")
        several = len(read) >= SWALLOWED_LINES[separator] and width > 1
        if several and all(text.count(separator) == width - 1 for text in read):
            cells = csv.Error(f"a quote opened in line {line} joins {len(read)} lines, each like a row, to one")
        read.clear()
        if cells:
            width = width or (1 if isinstance(cells, csv.Error) else len(cells))
            yield line, cells


# Lines ------------------------------------------------------------------------------------------


def _lines(path: Path, bad: Bad) -> Iterator[tuple[int, str]]:
    """(line number, line with its end) of a UTF-8 file, without a byte-order mark; .gz is decompressed."""
    position = number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    bad(
                        f"{path}, line {number}: byte {position + error.start + 1} of the file is not UTF-8 "
                        f"(0x{line[error.start]:02x}); remedy: save the file as UTF-8"
                    )
                    text = line.decode(errors="replace")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
                position += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip ({error}); remedy: fetch it again") from None


# Parquet ----------------------------------------------------------------------------------------


def _parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, memory_map=True, pre_buffer=False)


def _open_parquet(path: Path) -> ParquetTable:
    try:
        with _parquet(path) as file:
            columns, num_rows = file.schema_arrow.names, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({_line(error)}); remedy: fetch it again") from None
    doubled = sorted({column for column in columns if columns.count(column) > 1})
    if doubled:
        raise ValueError(f"{path} has columns of the same name: {doubled}; remedy: a name of its own for each")
    if num_rows == 0:
        raise ValueError(f"{path} holds no rows; remedy: a file with rows")
    return ParquetTable(path, columns, num_rows)


# Arrow ------------------------------------------------------------------------------------------


def _open_arrow(path: Path) -> ArrowTable:
    try:
        content = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Arrow stream ({_line(error)}); remedy: save it again") from None
    if content.num_rows == 0:
        raise ValueError(f"{path} holds no rows; remedy: a file with rows")
    return ArrowTable(path, content.column_names, content)


# Helpers ----------------------------------------------------------------------------------------


def _checked(path: Path, numbers: np.ndarray) -> np.ndarray:
    """The row numbers; ValueError unless they are sorted, different and not negative."""
    if len(numbers) and (numbers[0] < 0 or (np.diff(numbers) <= 0).any()):
        raise ValueError(f"{path}: row numbers must be sorted, different and from 0, got {numbers[:5]}")
    return numbers


def _raise(message: str) -> None:
    raise ValueError(message)


def _ignore(message: str) -> None:
    """Does nothing with a message: used where rows are only counted, or only the header is read."""


def _line(error: Exception) -> str:
    return excerpt(str(error).splitlines()[0]) if str(error) else type(error).__name__


def excerpt(value: object, length: int = 60) -> str:
    """A value as an error message shows it: its repr, shortened to `length` characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= length else value[: length - 3] + "...")
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def _name(column: str) -> str:
    """A column's name as it is, or as `excerpt` shows it if it is long or holds what cannot be printed."""
    return column if column.isprintable() and len(column) <= 60 else excerpt(column)


def spelled(value: object) -> str:
    """A value as text, to compare values of YAML, JSON and CSV: 1, 1.0 and '1' are equal."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
