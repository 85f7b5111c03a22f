"""Read a table from a file, a dict or a DataFrame, and mark its missing values.

The columns of a file stay text until a formula asks for numbers. So labels such as 007, 1e5 or True
keep their text.
"""

import csv
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas.values import Column, column, of_text, text_of

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_WORDS = {**_SEPARATORS, " ": "space"}
_NAMES = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "space": " "}
_COMMA_NUMBER = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
_POINT_NUMBER = re.compile(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+")
_SEP_LINE = re.compile(r'"?sep=(.)"?\s*')  # the first line of some files for spreadsheets
_SAMPLE = 1000  # rows that are looked at for the separator and the decimal comma


class Table(NamedTuple):
  """Columns of equal length.

  Attributes:
    columns: {name: Column}.
    rows: the length N of the columns.
    source: the name of the table in error messages: the name of a file, or "the table".
    decimal: the decimal sign in columns of text, "." or ",".
    lines: [N], the line of the file at which each row begins. None if there is no file.
  """

  columns: dict[str, Column]
  rows: int
  source: str = "the table"
  decimal: str = "."
  lines: np.ndarray | None = None


def read(
  path: str | os.PathLike[str],
  *,
  sep: str | None = None,
  decimal: str | None = None,
  encoding: str | None = None,
  comment: str | None = None,
  na: Sequence[str] | None = None,
) -> Table:
  """Read a text file with a line of column names and a line for each row.

  Args:
    path: the file. Fields may stand in quotes ("). Empty lines are skipped.
    sep: the separator: a character, or "comma", "semicolon", "tab", "space". None takes it from a
      first line such as `sep=;`, or finds out which of comma, semicolon and tab it is.
    decimal: "." or ",". None takes "," if the file has numbers like 1,5 and none like 1.5.
    encoding: the encoding, such as "latin-1". None is UTF-8, or UTF-16 with a byte order mark.
    comment: lines that begin with this text are skipped.
    na: the texts of a missing value besides the empty field; their case must match. None: NA, N/A,
      #N/A, #NA, <NA>, NaN, -NaN, NULL, None, NaT and ".", in upper or lower case.

  Returns:
    A Table of columns of text.

  Raises:
    ValueError: the file does not exist, has no rows or has another encoding; the separator or the
      decimal sign is ambiguous; two lines differ in their number of fields; two columns have one
      name.

  >>> import pathlib, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = pathlib.Path(folder, "bees.csv")
  ...   _ = path.write_text("count;dose;hive\\n3;0,5;007\\n5;1,5;NA\\n")
  ...   table = read(path)
  >>> table.rows, table.decimal, table.columns["hive"].levels
  (2, ',', ('007',))
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"There is no file {path}; wanted a text file with a line of column names.")
  lines = list(io.StringIO(_text(path, encoding), newline=""))
  if lines and (said := _SEP_LINE.fullmatch(lines[0])):
    sep, lines[0] = sep or said[1], "\n"
  sep = _NAMES.get(sep, sep) if sep else _separator(lines, path, comment)
  if len(sep) != 1:
    raise ValueError(f"A separator is one character, or one of {', '.join(_NAMES)}; got {sep!r}.")
  if decimal not in (None, ".", ","):
    raise ValueError(f"The decimal sign is '.' or ','; got {decimal!r}.")
  numbers, rows = _fields(lines, sep, comment, path)
  if len(rows) < 2:
    raise ValueError(f"{path} has no rows below its line of column names.")
  names = [name.strip() for name in rows[0]]
  twice = sorted({name for name in names if name and names.count(name) > 1})
  if twice:
    raise ValueError(f"{path} has a column name twice: {', '.join(twice)}. Rename one of them.")
  for i, (number, row) in enumerate(zip(numbers[1:], rows[1:], strict=True), 1):
    if len(row) != len(names):
      raise ValueError(_other_length(path, i, number, row, names, sep, comment))
  fields = {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(names) if name}
  found = decimal or _decimal(fields, sep, path)
  missing = None if na is None else {"", *na}
  columns = {name: of_text(values, missing) for name, values in fields.items()}
  return Table(columns, len(rows) - 1, path.name, found, np.asarray(numbers[1:]))


def as_table(data: Any) -> Table:
  """Convert data to a Table.

  Args:
    data: a Table, the path of a file for `read`, {name: values}, or a pandas DataFrame. Missing
      values are None, nan, masked entries of NumPy, and the texts that `read` takes as missing.
      Bytes are UTF-8 text.

  Returns:
    A Table.

  Raises:
    ValueError: the columns differ in length, one is not one-dimensional or has bytes that are not
      UTF-8 text, or there are no rows.
    TypeError: `data` has another type.

  >>> as_table({"y": [1.0, None], "g": ["a", "b"]}).rows
  2
  """
  if isinstance(data, Table):
    return data
  if isinstance(data, str | os.PathLike):
    return read(data)
  if not isinstance(data, Mapping) and not hasattr(data, "columns"):
    raise TypeError(
      f"A table is a path, {{name: values}}, a pandas DataFrame or what `read` returns; got "
      f"{type(data).__name__}."
    )
  names = list(data) if isinstance(data, Mapping) else list(data.columns)
  texts = [text_of(name, "A column name") for name in names]
  columns = {to: column(data[name], to) for name, to in zip(names, texts, strict=True)}
  lengths = {name: len(column.values) for name, column in columns.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"The columns of a table must have equal lengths; got {lengths}.")
  if len(columns) < len(names):
    raise ValueError(f"The table has a column name twice: {names}.")
  rows = next(iter(lengths.values()), 0)
  if not rows:
    raise ValueError("The table has no rows.")
  return Table(columns, rows)


def where(table: Table, row: int) -> str:
  """Return the name of a row for an error message, such as "row 3 (line 4 of bees.csv)".

  Args:
    table: the table.
    row: the index of the row, from 0.

  Returns:
    The name. It has no line if the table does not come from a file.
  """
  if table.lines is None:
    return f"row {row + 1}"
  return f"row {row + 1} (line {table.lines[row]} of {table.source})"


def number(text: str, decimal: str = ".") -> float:
  """Convert a text to a number.

  Args:
    text: the text.
    decimal: the decimal sign.

  Returns:
    The number.

  Raises:
    ValueError: the text is not a number.
  """
  if "_" in text or (decimal == "," and "." in text):  # Python allows 1_000
    raise ValueError(text)
  return float(text.replace(",", ".") if decimal == "," else text)


def _text(path: pathlib.Path, encoding: str | None) -> str:
  data = path.read_bytes()
  if data[:2] == b"PK" or data[:4] == b"\xd0\xcf\x11\xe0":
    raise ValueError(f"{path} is a workbook or an archive; save the table in it as a CSV file.")
  if data[:2] == b"\x1f\x8b" or data[:3] == b"BZh" or data[:6] == b"\xfd7zXZ\0":
    raise ValueError(f"{path} is compressed; unpack it, or read it by pandas.read_csv.")
  if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
    encoding = encoding or "utf-16"
  try:
    text = data.decode(encoding or "utf-8-sig")
  except LookupError:
    raise ValueError(f"There is no encoding {encoding!r}; try utf-8, latin-1 or utf-16.") from None
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    hint = "latin-1 or cp1252" if not encoding else "another encoding"
    hint = "utf-16-le" if not encoding and b"\0" in data else hint
    raise ValueError(
      f"{path} is not {encoding or 'UTF-8'} text: line {line} has "
      f"{data[error.start : error.end]!r}. Read it with encoding {hint}, or save it as UTF-8."
    ) from None
  if "\0" in text:
    raise ValueError(f"{path} is not {encoding or 'UTF-8'} text; read it with encoding utf-16-le.")
  return text


def _fields(
  lines: Iterable[str], sep: str, comment: str | None, path: pathlib.Path
) -> tuple[list[int], list[list[str]]]:
  """(line, fields) of every row, the column names first."""
  lines = list(lines)
  kept = [i for i, line in enumerate(lines) if not (comment and line.startswith(comment))]
  reader = csv.reader((lines[i] for i in kept), delimiter=sep, strict=True, skipinitialspace=True)
  numbers, rows, start = [], [], 0
  try:
    for row in reader:
      if row and not (len(row) == 1 and not row[0].strip()):
        numbers.append(kept[start] + 1)
        rows.append(row[:-1] if sep == " " and row[-1] == "" else row)
      start = reader.line_num
  except csv.Error as error:
    line = kept[min(start, len(kept) - 1)] + 1
    raise ValueError(
      f"{path} cannot be read as a CSV file: line {line}: {error}. If something other than "
      f"{_WORDS.get(sep, sep)} separates the columns, pass sep."
    ) from error
  return numbers, rows


def _separator(lines: Sequence[str], path: pathlib.Path, comment: str | None) -> str:
  """The separator that cuts the first rows into equally many fields, two or more."""
  fits, counts = [], {}
  for sep in _SEPARATORS:
    try:
      rows = _fields(itertools.islice(lines, _SAMPLE), sep, comment, path)[1]
    except ValueError:  # a quoted field that does not end in the sample
      counts[sep] = lines[0].count(sep) + 1
      continue
    counts[sep] = len(rows[0]) if rows else 0
    if rows and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
      fits.append(sep)
  if len(fits) > 1:
    names = " or by ".join(_SEPARATORS[sep] for sep in fits)
    raise ValueError(f"The columns of {path} may be separated by {names}: pass sep to choose.")
  # If none fits, the one that the column names point to, for an error that names the row.
  return fits[0] if fits else max(counts, key=lambda sep: counts[sep], default=",")


def _other_length(
  path: pathlib.Path,
  i: int,
  line: int,
  row: Sequence[str],
  names: Sequence[str],
  sep: str,
  comment: str | None,
) -> str:
  hint = ""
  if names[0][:1] in ("#", "%", "!", "*", "/") and not comment:
    hint = f" Lines that begin with {names[0][0]} are skipped with comment='{names[0][0]}'."
  elif len(row) == len(names) + 1:
    hint = " Give the first column a name if it holds names of rows."
  elif len(names) == 1 and sep == ",":
    hint = " If something other than comma, semicolon or tab separates the columns, pass sep."
  return (
    f"{path}, row {i} (line {line}): {len(row)} fields, but there are {len(names)} column names, "
    f"{', '.join(names)}.{hint}"
  )


def _decimal(fields: Mapping[str, Sequence[str]], sep: str, path: pathlib.Path) -> str:
  """The decimal sign of the first rows; a comma only if there is no doubt."""
  cells = [v for values in fields.values() for v in values[:_SAMPLE] if "," in v or "." in v]
  commas = [v for v in cells if _COMMA_NUMBER.fullmatch(v)]
  if sep != ";":  # 1,234 may be a thousand
    commas = [v for v in commas if not _THOUSANDS.fullmatch(v)]
  points = [v for v in cells if _POINT_NUMBER.fullmatch(v)]
  if commas and points:
    raise ValueError(
      f"{path} has numbers such as {commas[0]} and such as {points[0]}: pass decimal to choose "
      "the decimal sign."
    )
  return "," if commas else "."
