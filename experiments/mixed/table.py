"""A CSV file in long format, as tasks of unequal size: one group, one task."""

import csv
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import shrinkmeta as sm
from experiments.mixed.formula import INTERCEPT, Formula

Columns = dict[str, list[str]]
# In small letters, and what spreadsheets, R and pandas write for a missing value.
_MISSING = ("", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none", "nat", ".")


class Grouped(NamedTuple):
  """The data of a formula, G groups padded to N examples."""

  batches: sm.Batch  # inputs {term: [G, N]}, targets [G, N], mask [G, N]
  groups: tuple[str, ...]
  rows: int


def read(path: pathlib.Path) -> Columns:
  """All columns as text.

  Raises:
    ValueError: no such file, no rows, a line of another length, a name twice.
  """
  if not path.is_file():
    raise ValueError(f"There is no file {path}; --data is a CSV file with a line of column names.")
  try:
    with path.open(newline="", encoding="utf-8-sig") as file:
      lines = [line for line in csv.reader(file, strict=True) if line]
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text ({error}); save it as such.") from error
  except csv.Error as error:
    raise ValueError(f"{path} is no CSV file that can be read: {error}.") from error
  if len(lines) < 2:
    raise ValueError(f"{path} has no rows below its line of column names.")
  names = [name.strip() for name in lines[0]]
  if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
    raise ValueError(f"{path} has one column, {names[0]!r}; columns must be separated by commas.")
  if len(set(names)) < len(names):
    raise ValueError(f"{path} has a column name twice: {names}.")
  for number, line in enumerate(lines[1:], 2):
    if len(line) != len(names):
      raise ValueError(
        f"{path}, row {number - 1}: {len(line)} fields, but there are {len(names)} column names."
      )
  return {name: [line[i].strip() for line in lines[1:]] for i, name in enumerate(names)}


def grouped(columns: Columns, formula: Formula, family: str) -> Grouped:
  """The numbers that the formula asks for, by group, in order of first appearance.

  Raises:
    ValueError: a column is missing, has missing values or is not numeric; one group only; a
      response that the family cannot have; columns of the fixed part that depend on each other.
  """
  names = sorted(set(formula.fixed + formula.random) - {INTERCEPT})
  numbers = {name: _numbers(columns, name, "a term") for name in names}
  response = _numbers(columns, formula.response, "the response")
  _check_response(response, formula.response, family)
  labels = _column(columns, formula.group, "the grouping factor")
  rows = len(response)
  groups = tuple(dict.fromkeys(labels))
  if len(groups) < 2:
    raise ValueError(
      f"The grouping factor {formula.group!r} has one level, {groups[0]!r}, in {rows} rows; a "
      "variance between groups needs at least two."
    )
  numbers[INTERCEPT] = np.ones(rows)
  if formula.fixed:
    _check_rank(np.stack([numbers[name] for name in formula.fixed], 1), formula, rows)
  used = {name: numbers[name] for name in dict.fromkeys(formula.fixed + formula.random)}
  where = [np.flatnonzero(np.asarray(labels) == group) for group in groups]
  one = lambda at: sm.Batch(
    {name: jnp.asarray(x[at]) for name, x in used.items()}, jnp.asarray(response[at])
  )
  longest = max(map(len, where))
  batches = sm.stack_batches([one(at) for at in where], rows=longest)
  mask = jnp.asarray(batches.mask, jnp.result_type(float))
  return Grouped(batches._replace(mask=mask), groups, rows)


def _column(columns: Columns, name: str, what: str) -> list[str]:
  if name not in columns:
    raise ValueError(
      f"There is no column {name!r} ({what}); the data have {', '.join(columns)}, "
      f"{len(next(iter(columns.values())))} rows."
    )
  values = columns[name]
  missing = [i for i, value in enumerate(values) if value.lower() in _MISSING]
  if missing:
    raise ValueError(
      f"Column {name!r} ({what}) has {len(missing)} missing values in {len(values)} rows, the "
      f"first in row {missing[0] + 1}; remove these rows or fill them in."
    )
  return values


def _numbers(columns: Columns, name: str, what: str) -> np.ndarray:
  values = _column(columns, name, what)
  try:
    numbers = np.array([_number(value) for value in values])
  except ValueError:
    bad = next(value for value in values if not _is_number(value))
    raise ValueError(
      f"Column {name!r} ({what}) is not numeric: {bad!r} among its {len(values)} rows. Code "
      "categories as columns of 0 and 1."
    ) from None
  if not (np.abs(numbers) < 1e100).all():
    raise ValueError(
      f"Column {name!r} ({what}) has infinite or huge values in {len(values)} rows; choose a unit "
      "in which they are below 1e100."
    )
  if not numbers.any() and what == "a term":
    raise ValueError(f"Column {name!r} ({what}) is 0 in all {len(values)} rows; leave it out.")
  return numbers


def _number(value: str) -> float:
  if "_" in value:  # which Python allows
    raise ValueError
  return float(value)


def _is_number(value: str) -> bool:
  try:
    _number(value)
  except ValueError:
    return False
  return True


def _check_response(response: np.ndarray, name: str, family: str) -> None:
  whole = (response >= 0) & (response == np.round(response))
  if family == "logistic" and not np.isin(response, (0.0, 1.0)).all():
    raise ValueError(f"A logistic response is 0 or 1; {name!r} has others, {len(response)} rows.")
  if family == "poisson" and not whole.all():
    raise ValueError(f"A Poisson response is a count; {name!r} has others, {len(response)} rows.")
  if np.ptp(response) == 0:
    raise ValueError(f"The response {name!r} is {response[0]} in all {len(response)} rows.")


def _check_rank(fixed: np.ndarray, formula: Formula, rows: int) -> None:
  """Judge by scaled columns, beside an intercept centred ones: their units say nothing of rank."""
  scaled = fixed / np.abs(fixed).max(0)
  size = np.ones(fixed.shape[1])
  if INTERCEPT in formula.fixed:
    scaled = np.delete(scaled, formula.fixed.index(INTERCEPT), 1)
    scaled -= scaled.mean(0)
    size = np.abs(scaled).max(0)
  rounding = 4 * np.finfo(float).eps  # of values up to 1, which a small spread makes larger
  least = rounding * max(scaled.shape) / size.min(initial=1.0)
  constant = (size <= rounding).any()
  if constant or np.linalg.matrix_rank(scaled / size, rtol=least) < scaled.shape[1]:
    raise ValueError(
      f"The columns of the fixed part, {', '.join(formula.fixed)}, depend on each other in {rows} "
      "rows; leave one out."
    )
