"""Build a Design from a formula and a table, and build the same columns for new rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas import columns, matrices
from shrinkmeta.formulas.checks import BINARY, check_columns, check_response
from shrinkmeta.formulas.columns import Frame
from shrinkmeta.formulas.design import Design, RandomTerm
from shrinkmeta.formulas.language.formula import Formula, expression, parse
from shrinkmeta.formulas.table import Column, Table, as_table


class Template(NamedTuple):
  """What `new_rows` needs to build the columns of a Design for new rows.

  Attributes:
    formula: the parsed formula.
    fixed, random: formulaic's specifications of the matrices.
    levels: `Frame.levels` of the frame from which the matrices were made.
    groups: {grouping factor as in `RandomTerm.group`: its labels}.
    offset: the parsed argument `offset`, or None.
  """

  formula: Formula
  fixed: Any
  random: tuple[Any, ...]
  levels: dict[str, tuple[str, ...]]
  groups: dict[str, tuple[str, ...]]
  offset: Formula | None


class NewRows(NamedTuple):
  """The columns of a formula on new rows.

  Attributes:
    fixed: [N, P], the matrix X.
    columns: [N, q] for each random term.
    groups: [N] for each random term, the index of the group; -1 for a group that has no row in
      the fitted data.
    offset: [N], added to the linear predictor.
  """

  fixed: np.ndarray
  columns: tuple[np.ndarray, ...]
  groups: tuple[np.ndarray, ...]
  offset: np.ndarray


def design(
  formula: str,
  table: Any,
  *,
  family: str = "gaussian",
  weights: str | float | np.ndarray | None = None,
  trials: str | float | np.ndarray | None = None,
  offset: str | float | np.ndarray | None = None,
) -> Design:
  """Make the matrices of a mixed model.

  Args:
    formula: the formula, such as "y ~ x + (x || g)".
    table: a path, {name: values}, a pandas DataFrame or a Table from `read`.
    family: "gaussian", "logistic" or "poisson". The response is checked against this family.
    weights: the weights of the rows. Give a column, an expression such as "1 / se^2", numbers [N],
      or one number for all rows.
    trials: the numbers of trials, in the same forms as `weights`. Give them if the response counts
      the successes of a logistic model.
    offset: a known term of the linear predictor, in the same forms as `weights`. It is added to
      every offset(...) in the formula.

  Returns:
    A Design. It leaves out the rows with a missing value in a column that the model uses, and
    counts them in `Design.dropped`.

  Raises:
    ImportError: formulaic is not installed.
    ValueError: the formula or the table cannot be used. The message says what to write.

  >>> data = {"y": [1.0, 2.0, 2.5, None], "x": [0, 1, 0, 1], "g": ["a", "a", "b", "b"]}
  >>> made = design("y ~ x + (1 | g)", data)
  >>> made.fixed_names, made.random[0].levels, made.dropped
  (('(Intercept)', 'x'), ('a', 'b'), (('y is missing', 1),))
  """
  return prepare(formula, table, family=family, weights=weights, trials=trials, offset=offset)[0]


def prepare(
  formula: str,
  table: Any,
  *,
  family: str = "gaussian",
  weights: str | float | np.ndarray | None = None,
  trials: str | float | np.ndarray | None = None,
  offset: str | float | np.ndarray | None = None,
) -> tuple[Design, Template]:
  """Make the matrices of a mixed model, and the Template that `new_rows` needs.

  Args:
    formula, table, family, weights, trials, offset: as for `design`.

  Returns:
    The Design and the Template.

  Raises:
    ImportError, ValueError: for the same reasons as `design`.
  """
  parsed, data = parse(formula), as_table(table)
  extra: dict[str, Formula] = {}
  for name, given in (("weights", weights), ("trials", trials), ("offset", offset)):
    if given is not None:
      data, extra[name] = _extra(data, name, given)
  if "trials" in extra and len(parsed.responses) == 2:
    raise ValueError(f"{parsed.response} already gives the trials; leave out the argument trials.")
  rows, dropped = _complete(data, parsed, extra)
  values = {name: _vector(part, data, rows) for name, part in extra.items()}
  response, trials_, name = _response(parsed, data, rows, family, values.pop("trials", None))
  if trials_ is not None and (trials_ == 0).any():
    kept = trials_ > 0
    dropped = (*dropped, ("no trials", int((~kept).sum())))
    rows, response, trials_ = rows[kept], response[kept], trials_[kept]
    values = {key: value[kept] for key, value in values.items()}
  check_response(response, name, family, trials_)
  weights_ = values.get("weights")
  if weights_ is not None and not (weights_ > 0).all():
    raise ValueError("All weights must be above 0; leave out the rows that should not count.")
  frame = columns.frame(parsed, data, rows)
  fixed = matrices.matrix(parsed.fixed, frame)
  check_columns(fixed.values, fixed.names, "the fixed part")
  random, specs = _random(parsed, data, rows, frame)
  offset_ = _offset(parsed, frame) + values.get("offset", 0.0)
  made = Design(
    response, name, fixed.values, fixed.names, random, offset_, weights_, trials_, dropped
  )
  groups = {term.group: term.levels for term in random}
  return made, Template(parsed, fixed.spec, specs, frame.levels, groups, extra.get("offset"))


def new_rows(template: Template, table: Any, offset: np.ndarray | None = None) -> NewRows:
  """Make the columns of a fitted formula for new rows.

  Args:
    template: the Template that `prepare` returned for the fitted data.
    table: the new rows, in a form that `design` accepts, without the response. A grouping column
      may be absent or have missing values. Rows without a group label count as a new group.
    offset: the offset of the new rows [N]. It is needed if the fit got its offset as numbers.

  Returns:
    The columns.

  Raises:
    ValueError: a predictor is absent or has a missing value, or a row has a level that the fitted
      data do not have.
  """
  parsed, data = template.formula, as_table(table)
  if template.offset is not None and template.offset.columns == (_argument("offset"),):
    if offset is None:
      raise ValueError("The fit got its offset as numbers: pass offset for the new rows too.")
    data, _ = _extra(data, "offset", offset)
  only = parsed._replace(responses=())
  rows = np.arange(data.rows)
  extra = {} if template.offset is None else {"offset": template.offset}
  for name in _used(only, extra):
    column = columns.find(data, name, "a term")
    if columns.is_missing(column).any():
      row = int(np.flatnonzero(columns.is_missing(column))[0])
      raise ValueError(f"Column {name!r} is missing in row {row + 1} of the new rows.")
  frame = columns.frame(only, data, rows, template.levels)
  index = []
  for term in parsed.random:
    known = {label: i for i, label in enumerate(template.groups[":".join(term.group)])}
    absent = np.zeros(data.rows, bool)
    for name in term.group:
      lost = name not in data.columns
      absent |= True if lost else columns.is_missing(data.columns[name])
    found = np.full(data.rows, -1)
    if not absent.all():
      codes, labels = columns.groups(data, term.group, rows[~absent])
      found[~absent] = np.array([known.get(label, -1) for label in labels])[codes]
    index.append(found)
  offset_ = _offset(parsed, frame)
  if template.offset is not None:
    offset_ = offset_ + _vector(template.offset, data, rows)
  return NewRows(
    matrices.matrix(parsed.fixed, frame, template.fixed).values,
    tuple(
      matrices.matrix(term.terms, frame, spec).values
      for term, spec in zip(parsed.random, template.random, strict=True)
    ),
    tuple(index),
    offset_,
  )


def _extra(data: Table, name: str, given: str | float | np.ndarray) -> tuple[Table, Formula]:
  """Weights, trials or an offset as an expression; numbers become a column of the table."""
  if isinstance(given, str):
    quoted = f"`{given}`" if given in data.columns else given
    return data, expression(quoted)
  values = np.asarray(given, float)
  if not values.ndim:
    values = np.full(data.rows, float(values))
  if values.shape != (data.rows,):
    raise ValueError(
      f"The argument {name} has shape {values.shape}; wanted ({data.rows},), one number a row."
    )
  added = {**data.columns, _argument(name): Column(values, None)}
  return data._replace(columns=added), expression(f"`{_argument(name)}`")


def _argument(name: str) -> str:
  """The column that holds an argument which is given as numbers."""
  return f"argument {name}"


def _used(parsed: Formula, extra: dict[str, Formula]) -> list[str]:
  """The columns that an expression of the formula or an argument uses."""
  texts = [*parsed.responses, parsed.fixed, *parsed.offsets, *(r.terms for r in parsed.random)]
  found = [parsed.columns[i] for i in columns.places(" ".join(texts))]
  return list(dict.fromkeys([*found, *(name for part in extra.values() for name in part.columns)]))


def _complete(
  data: Table, parsed: Formula, extra: dict[str, Formula]
) -> tuple[np.ndarray, tuple[tuple[str, int], ...]]:
  """The rows without missing values, and why the others are dropped."""
  groups = [name for term in parsed.random for name in term.group]
  kept, dropped = np.ones(data.rows, bool), []
  for name in dict.fromkeys([*_used(parsed, extra), *groups]):
    what = "the grouping factor" if name in groups else "a term"
    what = "the response" if name in _of_response(parsed) else what
    missing = columns.is_missing(columns.find(data, name, what)) & kept
    if missing.any():
      dropped.append((f"{name} is missing", int(missing.sum())))
      kept &= ~missing
  if not kept.any():
    reasons = "; ".join(f"{reason}: {count}" for reason, count in dropped)
    raise ValueError(f"No row of {data.source} is complete, {data.rows} rows: {reasons}.")
  return np.flatnonzero(kept), tuple(dropped)


def _of_response(parsed: Formula) -> list[str]:
  """The columns of the response."""
  return [parsed.columns[i] for i in columns.places(" ".join(parsed.responses))]


def _vector(part: Formula, data: Table, rows: np.ndarray) -> np.ndarray:
  return matrices.vector(part.responses[0], columns.frame(part, data, rows))


def _response(
  parsed: Formula, data: Table, rows: np.ndarray, family: str, trials: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, str]:
  """(response, trials, name)."""
  only = parsed._replace(fixed="0", random=(), offsets=())
  if len(parsed.responses) == 2:
    if family not in BINARY:
      raise ValueError(f"{parsed.response} is a logistic response; the family is {family}.")
    frame = columns.frame(only, data, rows)
    one, other = (matrices.vector(text, frame) for text in parsed.responses)
    if (one < 0).any() or (other < 0).any():
      raise ValueError(f"The counts of {parsed.response} must be at least 0; a row is negative.")
    return one, one + other, parsed.response
  text = parsed.responses[0]
  plain = text == f"_c{columns.places(text)[0]}_"
  if plain and not columns.is_numeric(data.columns[parsed.columns[0]], data.decimal):
    name = parsed.columns[0]
    if family in BINARY and trials is None:
      found = columns.frame(only, data, rows).data[text].cat
      levels = [str(level) for level in found.categories]
      if len(levels) == 2:
        return found.codes.to_numpy(float), None, f"{name} == {levels[1]!r}"
      raise ValueError(
        f"A logistic response has two values; {name!r} has {', '.join(map(repr, levels[:6]))}. "
        f'Compare it with one of them: I({name} == "{levels[-1]}").'
      )
    return columns.numbers(data, name, "the response")[rows], trials, parsed.response
  return matrices.vector(text, columns.frame(only, data, rows)), trials, parsed.response


def _random(
  parsed: Formula, data: Table, rows: np.ndarray, frame: Frame
) -> tuple[tuple[RandomTerm, ...], tuple[Any, ...]]:
  made, specs = [], []
  for term in parsed.random:
    group = ":".join(term.group)
    index, levels = columns.groups(data, term.group, rows)
    if len(levels) < 2:
      raise ValueError(
        f"The grouping factor {group!r} has one level, {levels[0]!r}, in {len(rows)} rows; a "
        "variance between groups needs at least two."
      )
    found = matrices.matrix(term.terms, frame)
    if not found.names:
      raise ValueError(f"{term.text} has no term left of its bar; write (1 | {group}).")
    check_columns(found.values, found.names, term.text)
    for other in made:
      _check_twice(other, group, found.names)
    made.append(RandomTerm(group, tuple(levels), index, found.names, found.values, term.correlated))
    specs.append(found.spec)
  return tuple(made), tuple(specs)


def _check_twice(other: RandomTerm, group: str, names: Sequence[str]) -> None:
  twice = sorted(set(other.names) & set(names))
  if other.group == group and twice:
    raise ValueError(
      f"The random effect {twice[0]} by {group} is in two terms; leave it out of one. An intercept "
      f"is left out by 0 +, as in (1 | {group}) + (0 + x | {group})."
    )


def _offset(parsed: Formula, frame: Frame) -> np.ndarray:
  zero = np.zeros(len(frame.rows))
  return sum((matrices.vector(text, frame) for text in parsed.offsets), zero)
