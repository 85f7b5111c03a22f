"""Read the columns that a formula uses from a table, as numbers, levels or groups."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas.language.formula import Formula
from shrinkmeta.formulas.table import Table, number, where
from shrinkmeta.formulas.values import Column, label_of

_LARGEST = 1e100  # beyond it float64 has no room for squares
ALIAS = re.compile(r"_([ct])(\d+)_")
_TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:.*)?|-?\d+ (days|hours|minutes|\w*seconds)")
_LOGICAL = {"true": 1.0, "false": 0.0}


class Frame(NamedTuple):
  """The columns of a formula on the rows that the model uses.

  Attributes:
    data: a pandas DataFrame. Its columns are called `_c0_`, `_t0_`, ... as in the checked formula.
    formula: the formula that uses the columns.
    table: the table from which the columns were read.
    rows: [N], the indices of the rows in the table.
    levels: {column of `data`: its levels in order}, for each column that holds levels.
  """

  data: Any
  formula: Formula
  table: Table
  rows: np.ndarray
  levels: dict[str, tuple[str, ...]]


def places(text: str) -> list[int]:
  """Return the indices in `Formula.columns` of the columns that an expression uses.

  Args:
    text: a checked expression.

  Returns:
    Each index once, in the order of the text.
  """
  return list(dict.fromkeys(int(m[2]) for m in ALIAS.finditer(text)))


def find(table: Table, name: str, what: str) -> Column:
  """Return the column with a given name.

  Args:
    table: the table.
    name: the name of the column.
    what: the role of the column, such as "a term", for the error message.

  Returns:
    The column.

  Raises:
    ValueError: no column has this name. The message lists the columns of the table.
  """
  if name in table.columns:
    return table.columns[name]
  near = difflib.get_close_matches(name.lower(), [n.lower() for n in table.columns], 1, 0.7)
  meant = [n for n in table.columns if n.lower() in near]
  hint = f" Did you mean {meant[0]!r}?" if meant else ""
  only = next(iter(table.columns), "")
  if table.lines is not None and len(table.columns) == 1 and len(only.split()) > 1:
    hint = " If spaces separate the columns, read the file with sep='space'."
  raise ValueError(
    f"There is no column {name!r} ({what}); {table.source} has {', '.join(table.columns)}, "
    f"{table.rows} rows.{hint}"
  )


def is_missing(column: Column) -> np.ndarray:
  """Tell for each row whether the value of the column is missing.

  Args:
    column: the column.

  Returns:
    [N] bool.
  """
  return np.isnan(column.values) if column.levels is None else column.values < 0


def is_numeric(column: Column, decimal: str) -> bool:
  """Tell whether a column holds numbers, so that a plain term of it is a slope.

  Args:
    column: the column.
    decimal: the decimal sign of its table.

  Returns:
    True or False. It is False for a pandas categorical and for texts in a dict or a DataFrame, even
    if their levels are numbers. In a file every value is text, and digits are numbers there.
  """
  if column.levels is None:
    return True
  if column.ordered or column.named:
    return False
  return bool(column.levels) and _parsed(column.levels, decimal) is not None


def numbers(table: Table, name: str, what: str) -> np.ndarray:
  """Return the values of a column as numbers; True becomes 1, and False becomes 0.

  Args:
    table: the table.
    name: the name of the column.
    what: the role of the column, such as "a term", for the error message.

  Returns:
    [N] float64, nan where a value is missing.

  Raises:
    ValueError: a value is not a number, or is infinite or at least 1e100. The message names its
      row.
  """
  column = find(table, name, what)
  if column.levels is None:
    values = column.values
  else:
    small = [level.lower() for level in column.levels]
    if small and set(small) <= set(_LOGICAL):
      parsed = np.array([_LOGICAL[level] for level in small])
    else:
      parsed = _parsed(column.levels, table.decimal)
    if parsed is None:
      raise ValueError(_not_numeric(table, column, name, what))
    values = np.append(parsed, np.nan)[column.values]
  huge = np.abs(values) >= _LARGEST
  if huge.any():
    row = int(np.flatnonzero(huge)[0])
    raise ValueError(
      f"Column {name!r} ({what}) has infinite or huge values, the first in {where(table, row)}; "
      "choose a unit in which they are below 1e100."
    )
  return values


def groups(table: Table, names: Sequence[str], rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
  """Group rows by one column, or by the combinations of several columns.

  Args:
    table: the table.
    names: the names of the columns.
    rows: [N], the indices of the rows to group. The columns have no missing value there.

  Returns:
    The group of each row [N], and the labels of the groups in the order of their first row.

  Raises:
    ValueError: two different combinations get the same label. For example, "a:b" with "c" and
      "a" with "b:c" both give "a:b:c".
  """
  codes, labels = None, []
  for name in names:
    column = find(table, name, "a grouping factor")
    own, texts = _codes(column, rows)
    if codes is None:
      codes, labels = own, texts
      continue
    both, first, codes = np.unique(codes * len(texts) + own, return_index=True, return_inverse=True)
    labels = [f"{labels[i // len(texts)]}:{texts[i % len(texts)]}" for i in both.tolist()]
    order = np.argsort(first)
    codes = np.argsort(order)[codes.ravel()]
    labels = [labels[i] for i in order.tolist()]
  assert codes is not None
  if len(set(labels)) < len(labels):
    twice = next(label for label in labels if labels.count(label) > 1)
    raise ValueError(
      f"Different groups of {':'.join(names)!r} would both be called {twice!r}; replace the colons "
      "in their labels."
    )
  return codes, labels


def frame(
  formula: Formula,
  table: Table,
  rows: np.ndarray,
  levels: Mapping[str, tuple[str, ...]] | None = None,
) -> Frame:
  """Collect the columns that the expressions of a formula use.

  Args:
    formula: the formula.
    table: the table.
    rows: [N], the indices of the rows to read.
    levels: `Frame.levels` of the fitted data, if the rows are new. None takes the levels that
      occur in `rows`.

  Returns:
    A Frame.

  Raises:
    ValueError: a function of numbers gets a column that is not numeric, or a row has a level that
      is not in `levels`.
  """
  import pandas as pd

  texts = " ".join(
    [*formula.responses, formula.fixed, *(r.terms for r in formula.random), *formula.offsets]
  )
  data, found = {}, {}
  for alias, kind, place in sorted({(m[0], m[1], int(m[2])) for m in ALIAS.finditer(texts)}):
    name = formula.columns[place]
    column = find(table, name, "a term")
    numeric = kind == "c" and (name in formula.numeric or is_numeric(column, table.decimal))
    if alias not in levels if levels is not None else numeric:
      data[alias] = numbers(table, name, "a term")[rows]
      continue
    codes, labels = _codes(column, rows)
    if kind == "c" and levels is None:
      _check_no_number_lost(table, column, name)
      _check_no_times(column, name)
    order = tuple(_ordered(column, labels, table.decimal))
    if levels is not None:
      order = levels[alias]
      new = [label for label in labels if label not in order]
      if new:
        raise ValueError(
          f"Column {name!r} has the level {new[0]!r}, which the data of the fit do not have; they "
          f"have {', '.join(order)}."
        )
    place_of = {label: i for i, label in enumerate(order)}
    data[alias] = pd.Categorical.from_codes(
      np.array([place_of[label] for label in labels], int)[codes], list(order)
    )
    found[alias] = order
  return Frame(pd.DataFrame(data, index=range(len(rows))), formula, table, rows, found)


def _check_no_number_lost(table: Table, column: Column, name: str) -> None:
  """A text among numbers is a slip more often than a level."""
  if column.levels is None or column.ordered:
    return
  others = [text for text in column.levels if _parsed([text], table.decimal) is None]
  if 0 < len(others) < len(column.levels) / 2:
    row = int(np.flatnonzero(column.values == column.levels.index(others[0]))[0])
    raise ValueError(
      f"Column {name!r} has {others[0]!r} in {where(table, row)} among numbers. If it stands for a "
      f"missing value, read the table with na=[{others[0]!r}]; if the values are levels, write "
      f"C({name})."
    )


def _check_no_times(column: Column, name: str) -> None:
  """Dates are points in time more often than levels."""
  if column.levels and not column.ordered and all(map(_TIME.fullmatch, column.levels)):
    raise ValueError(
      f"Column {name!r} has dates or durations, such as {column.levels[0]!r}. Make a column of "
      f"numbers of it, such as days since the first date; if each is a level, write C({name})."
    )


def _codes(column: Column, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
  """(place among the labels [N], labels in the order of their first row) of the rows."""
  found, first, codes = np.unique(column.values[rows], return_index=True, return_inverse=True)
  order = np.argsort(first)
  codes = np.argsort(order)[codes.ravel()]
  if column.levels is None:
    return codes, [label_of(float(found[i]), column.scalar) for i in order.tolist()]
  return codes, [column.levels[int(found[i])] for i in order.tolist()]


def _ordered(column: Column, labels: list[str], decimal: str) -> list[str]:
  """Levels in their owner's order, by number if they are numbers, else by text."""
  if column.ordered and column.levels is not None:
    return [label for label in column.levels if label in set(labels)]
  parsed = _parsed(labels, decimal if column.levels is not None else ".")
  if parsed is not None:
    return [labels[i] for i in np.argsort(parsed, kind="stable").tolist()]
  return sorted(labels)


def _parsed(texts: Sequence[str], decimal: str) -> np.ndarray | None:
  """The texts as numbers; None if one is not."""
  try:
    return np.array([number(text, decimal) for text in texts], float)
  except ValueError:
    return None


def _not_numeric(table: Table, column: Column, name: str, what: str) -> str:
  assert column.levels is not None
  bad = next(i for i, text in enumerate(column.levels) if _parsed([text], table.decimal) is None)
  row = int(np.flatnonzero(column.values == bad)[0])
  other = "," if table.decimal == "." else "."
  hint = ""
  if _parsed([column.levels[bad]], other) is not None:
    hint = f" If {other!r} is the decimal sign, pass decimal={other!r}."
  elif what == "a term":
    hint = " To use its values as levels, write C(...)."
  return (
    f"Column {name!r} ({what}) is not numeric: {column.levels[bad]!r} in {where(table, row)}.{hint}"
  )
