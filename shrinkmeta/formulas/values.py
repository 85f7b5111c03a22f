"""Convert the values of a dict or a DataFrame to the columns of a table.

The label of a value depends neither on the type of its column nor on the other values. So the rows
to predict find their groups whether their labels are categorical, float32 or plain.
"""

import datetime
import itertools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# In small letters, and what spreadsheets, R and pandas write for a missing value.
MISSING = ("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none", "nat", ".")


class Column(NamedTuple):
  """One column of a table.

  Attributes:
    values: [N]. Numbers are float64, with nan for a missing value. Texts are int indices into
      `levels`, with -1 for a missing value.
    levels: the different texts, in the order of their first row. None for a column of numbers.
    ordered: whether the user chose the order of `levels`, as in a pandas categorical.
    scalar: the type that the numbers had. Their labels have the shortest digits of this type.
    named: whether a dict or a DataFrame had texts here, so that "1" names a level. False for a
      file, where every value is text, and for numbers that float64 has no digits for.
  """

  values: np.ndarray
  levels: tuple[str, ...] | None
  ordered: bool = False
  scalar: type[np.floating] = np.float64
  named: bool = False


def column(values: Any, name: str) -> Column:
  """Convert the values of one column.

  Args:
    values: a list, an array, a masked array or a column of a DataFrame. Missing values are None,
      nan, masked entries, and the texts `MISSING`. Bytes are UTF-8 text.
    name: the name of the column, for the error message.

  Returns:
    A Column. The categories of a pandas categorical have the labels of plain values. Texts among
    them are never missing values.

  Raises:
    ValueError: the values are not one-dimensional, are complex numbers, or hold bytes that are not
      UTF-8 text.

  >>> column(np.ma.array([3, 1], mask=[False, True]), "x").values
  array([ 3., nan])
  """
  categorical = getattr(values, "cat", values)
  if getattr(categorical, "categories", None) is not None:  # of pandas
    array = _array(categorical.categories, name)
    found = _numbers(array)
    if found is None:
      made = of_text(_texts(array, name), set())
    else:
      made = of_text([label_of(v, found.scalar) for v in found.values.tolist()], set())
    codes = np.asarray(categorical.codes, np.int64)
    return Column(np.append(made.values, -1)[codes], made.levels, ordered=True)
  array = _array(values, name)
  if (made := _numbers(array)) is not None:
    return made
  named = any(isinstance(value, str | bytes) for value in array.tolist())
  return of_text(_texts(array, name), None)._replace(named=named)


def of_text(values: Sequence[str], missing: set[str] | None) -> Column:
  """Convert texts to levels in the order of their first row.

  Args:
    values: the texts.
    missing: the texts of a missing value. None: those of `MISSING`, in upper or lower case.

  Returns:
    A Column.

  >>> of_text(["b", "NA", "a"], None).levels
  ('b', 'a')
  """
  places: dict[str, int] = {}
  codes = np.fromiter((places.setdefault(v, len(places)) for v in values), np.int64, len(values))
  lost = [v.lower() in MISSING if missing is None else v in missing for v in places]
  new = np.where(lost, -1, np.cumsum(np.logical_not(lost)) - 1)
  return Column(new[codes], tuple(itertools.compress(places, np.logical_not(lost))))


def label_of(value: float, scalar: type[np.floating] = np.float64) -> str:
  """Return a number as the label of a level.

  Args:
    value: the number.
    scalar: `Column.scalar` of its column.

  Returns:
    The label.

  >>> label_of(3.0), label_of(float(np.float32(0.1)), np.float32)
  ('3', '0.1')
  """
  if value.is_integer() and abs(value) < 2**64:  # as the integers of NumPy print it
    return str(int(value))
  return repr(float(str(scalar(value))))


def text_of(value: Any, where: str) -> str:
  """Return a value as text; bytes are decoded as UTF-8.

  Args:
    value: the value.
    where: where the value stands, such as "Column 'g'", for the error message.

  Returns:
    The text.

  Raises:
    ValueError: the bytes are not UTF-8 text.

  >>> text_of(b"a", "Column 'g'")
  'a'
  """
  if not isinstance(value, bytes):
    return str(value)
  try:
    return value.decode("utf-8")
  except UnicodeDecodeError:
    raise ValueError(
      f"{where} has the bytes {value!r}, which are not UTF-8 text. Decode them first, such as by "
      'np.char.decode(values, "latin-1").'
    ) from None


def _array(values: Any, name: str) -> np.ndarray:
  """[N], with nan, NaT or None for a missing value where its type has one."""
  if isinstance(values, list | tuple):
    values = [None if v is np.ma.masked else v for v in values]
  if isinstance(values, np.ma.MaskedArray):
    lost, kind = np.ma.getmaskarray(values), values.dtype.kind
    values = np.ma.getdata(values).astype(values.dtype if kind in "fMm" else object)
    values[lost] = {"f": np.nan, "M": "NaT", "m": "NaT"}.get(kind)
  array = np.asarray(values)
  if array.dtype.kind == "f" and "int" in str(getattr(values, "dtype", "")).lower():
    array = np.asarray(values, object)  # pandas makes floats of Int64 where a value is missing
  if array.ndim != 1:
    raise ValueError(f"Column {name!r} has shape {array.shape}; wanted one dimension, [N].")
  return array


def _numbers(array: np.ndarray) -> Column | None:
  """The column of an array of numbers; None if a value is something else or too long."""
  if array.dtype.kind in "iuf" and not _long(array):
    scalar = array.dtype.type if array.dtype.type in (np.float16, np.float32) else np.float64
    return Column(array.astype(float), None, scalar=scalar)
  if array.dtype.kind != "O":
    return None
  lost = np.array([_is_missing(v) for v in array.tolist()], bool)
  kept = array[~lost].tolist()
  numeric = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in kept)
  if not kept or not numeric or _long([v for v in kept if isinstance(v, int | np.integer)]):
    return None
  # Numbers of float32 in an array of objects are read as they are printed.
  values = np.full(len(array), np.nan)
  values[~lost] = [float(str(v)) if isinstance(v, np.floating) else float(v) for v in kept]
  return Column(values, None)


def _texts(array: np.ndarray, name: str) -> list[str]:
  """The labels of values that are not numbers; "" for a missing value."""
  if array.dtype.kind == "M":
    return _times(array)
  values = array if array.dtype.kind == "m" else array.tolist()  # tolist() makes integers of ns
  return ["" if _is_missing(v) else _text(v, name) for v in values]


def _text(value: Any, name: str) -> str:
  if isinstance(value, datetime.timedelta):
    value = getattr(value, "asm8", np.timedelta64(value))  # that of pandas keeps nanoseconds
  if isinstance(value, np.timedelta64):
    return _duration(value)
  if isinstance(value, np.datetime64):
    return _times(np.array([value]))[0]
  if isinstance(value, complex | np.complexfloating):
    raise ValueError(
      f"Column {name!r} has the complex number {value}. Pass real numbers, such as its real part."
    )
  if isinstance(value, datetime.datetime) and value.tzinfo is None:
    return _short(value.isoformat())
  return text_of(value, f"Column {name!r}").strip()


def _is_missing(value: Any) -> bool:
  """None, nan, NaT or pandas.NA. The last two by name: this file does without pandas."""
  if value is None or type(value).__name__ in ("NAType", "NaTType"):
    return True
  return bool(value != value)


def _long(values: Any) -> bool:
  """Whether whole numbers, such as long labels of groups, are more than float64 has digits for."""
  array = np.asarray(values)
  return array.dtype.kind != "f" and array.size > 0 and bool(np.max(np.abs(array)) > 2**53)


def _times(array: np.ndarray) -> list[str]:
  """Points in time [N] datetime64: the same labels in every unit."""
  seconds = array.astype(np.promote_types(array.dtype, "datetime64[s]"))
  return ["" if t == "NaT" else _short(t) for t in np.datetime_as_string(seconds).tolist()]


def _short(time: str) -> str:
  """Without zeros at the end of the fraction, and without a time of day that is midnight."""
  time = time.rstrip("0").rstrip(".") if "." in time else time
  return time.removesuffix("T00:00:00")


def _duration(value: np.timedelta64) -> str:
  """In the longest unit that gives a whole number."""
  for unit in ("D", "h", "m", "s", "ms", "us"):
    whole = value.astype(f"timedelta64[{unit}]")
    if whole == value:
      return str(whole)
  return str(value)
