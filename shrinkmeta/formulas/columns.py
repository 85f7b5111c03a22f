"""Columns of a table for a formula: numbers, levels and groups."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas.language.formula import Formula
from shrinkmeta.formulas.table import Column, Table, number, where

_LARGEST = 1e100  # beyond it float64 has no room for squares
ALIAS = re.compile(r"_([ct])(\d+)_")
_TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:.*)?|-?\d+ (days|hours|minutes|\w*seconds)")
_LOGICAL = {"true": 1.0, "false": 0.0}


class Frame(NamedTuple):
  """The columns of a formula on the rows that are used.

  Attributes:
    data: a pandas DataFrame; `_c0_` and `_t0_` are columns of it.
    formula: whose columns these are.
    table, rows: where they are from; `rows` [N] are places in the table.
    levels: {column of `data`: its levels in their order}, of those that hold levels.
  """

  data: Any
  formula: Formula
  table: Table
  rows: np.ndarray
  levels: dict[str, tuple[str, ...]]


def places(text: str) -> list[int]:
  """Return the places in `Formula.columns` of the columns that an expression uses.

  Args:
    text: a checked expression.

  Returns:
    Each place once, in the order of the text.
  """
  return list(dict.fromkeys(int(m[2]) for m in ALIAS.finditer(text)))


def find(table: Table, name: str, what: str) -> Column:
  """Return a column.

  Args:
    table: the table.
    name: the name of the column.
    what: what it is for, in errors.

  Returns:
    The column.

  Raises:
    ValueError: there is none of this name. The message lists those that there are.
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
  """Say which rows of a column are missing.

  Args:
    column: the column.

  Returns:
    [N] bool.
  """
  return np.isnan(column.values) if column.levels is None else column.values < 0


def is_numeric(column: Column, decimal: str) -> bool:
  """Say whether a column holds numbers alone, beside missing values.

  Args:
    column: the column.
    decimal: the decimal sign of its table.

  Returns:
    False for a pandas categorical too, whatever its levels.
  """
  if column.levels is None:
    return True
  if column.ordered:
    return False
  return bool(column.levels) and _parsed(column.levels, decimal) is not None


def numbers(table: Table, name: str, what: str) -> np.ndarray:
  """Return the numbers of a column; 1 and 0 of True and False.

  Args:
    table: the table.
    name: the name of the column.
    what: what it is for, in errors.

  Returns:
    [N] float64, nan where a value is missing.

  Raises:
    ValueError: a value is not a number, or is infinite or huge. The message names its row.
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
  """Group rows by a column, or by the combinations of several.

  Args:
    table: the table.
    names: the columns.
    rows: [N] places of the rows that are used, none of them missing.

  Returns:
    The group of each row [N], and the labels of the groups in the order of their first row.

  Raises:
    ValueError: different combinations have one label, as "a:b" and "c" have with "a" and "b:c".
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
    rows: [N] places of the rows that are used.
    levels: those of an earlier frame, for new rows; None takes the levels that occur.

  Returns:
    A Frame.

  Raises:
    ValueError: a function takes a column that is not numeric; a level that `levels` does not have.
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
  if len(others) < len(column.levels) / 2:
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
    return codes, [_label(float(found[i])) for i in order.tolist()]
  return codes, [column.levels[int(found[i])] for i in order.tolist()]


def _label(value: float) -> str:
  """A number as a label: 3 of 3.0."""
  return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


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
    hint = f" If {other!r} is the decimal sign, say so by decimal={other!r}."
  elif what == "a term":
    hint = " C(...) takes it as levels."
  return (
    f"Column {name!r} ({what}) is not numeric: {column.levels[bad]!r} in {where(table, row)}.{hint}"
  )
