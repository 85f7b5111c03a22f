"""Build a Design from a formula and a table, and build the same columns for new rows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas import columns, matrices
from shrinkmeta.formulas.checks import BINARY, check_columns, check_once, check_response
from shrinkmeta.formulas.columns import Frame
from shrinkmeta.formulas.design import Design, RandomTerm
from shrinkmeta.formulas.language.formula import Formula, expression, parse
from shrinkmeta.formulas.matrices import Expression, vector
from shrinkmeta.formulas.table import Table, as_table
from shrinkmeta.formulas.values import column


class Template(NamedTuple):
  """What `new_rows` needs to build the columns of a Design for new rows.

  Attributes:
    formula: the parsed formula.
    fixed, random: formulaic's specifications of the matrices.
    levels: `Frame.levels` of the frame from which the matrices were made.
    groups: {grouping factor as in `RandomTerm.group`: its labels}.
    offsets: every offset(...) of the formula.
    arguments: {"offset", "weights": the argument of this name}, for those that the fit got.
  """

  formula: Formula
  fixed: Any
  random: tuple[Any, ...]
  levels: dict[str, tuple[str, ...]]
  groups: dict[str, tuple[str, ...]]
  offsets: list[Expression]
  arguments: dict[str, Expression]


class NewRows(NamedTuple):
  """The columns of a formula on new rows.

  Attributes:
    fixed: [N, P], the matrix X.
    columns: [N, q] for each random term.
    groups: [N] for each random term, the index of the group; -1 if its label is missing, and -2 if
      it has no row in the fitted data.
    offset: [N], added to the linear predictor.
    weights: [N]. They are 1 if the fit has none, and nan if the fit got them as numbers, and those
      of the new rows are not given.
  """

  fixed: np.ndarray
  columns: tuple[np.ndarray, ...]
  groups: tuple[np.ndarray, ...]
  offset: np.ndarray
  weights: np.ndarray


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
  extra: dict[str, Expression] = {}
  for name, given in (("weights", weights), ("trials", trials), ("offset", offset)):
    if given is not None:
      data, extra[name] = _extra(data, name, given)
  if "trials" in extra and len(parsed.responses) == 2:
    raise ValueError(f"{parsed.response} already gives the trials; leave out the argument trials.")
  rows, dropped = _complete(data, parsed, extra)
  counted = extra.pop("trials", None)
  trials_ = None if counted is None else vector(counted, data, rows, "the trials")[0]
  response, trials_, name = _response(parsed, data, rows, family, trials_)
  if trials_ is not None and (trials_ == 0).any():
    kept = trials_ > 0
    dropped = (*dropped, ("no trials", int((~kept).sum())))
    rows, response, trials_ = rows[kept], response[kept], trials_[kept]
  weights_, offset_, arguments, offsets = _evaluate(
    extra, [_part(parsed, text) for text in parsed.offsets], data, rows
  )
  check_response(response, name, family, trials_, offset_)
  frame = columns.frame(parsed._replace(offsets=()), data, rows)
  fixed = matrices.matrix(parsed.fixed, frame)
  check_columns(fixed.values, fixed.names, "the fixed part", fixed.crossed)
  random, specs = _random(parsed, data, rows, frame)
  made = Design(
    response, name, fixed.values, fixed.names, random, offset_, weights_, trials_, dropped
  )
  groups = {term.group: term.levels for term in random}
  return made, Template(parsed, fixed.spec, specs, frame.levels, groups, offsets, arguments)


def new_rows(
  template: Template,
  table: Any,
  offset: float | np.ndarray | None = None,
  weights: float | np.ndarray | None = None,
) -> NewRows:
  """Make the columns of a fitted formula for new rows.

  Args:
    template: the Template that `prepare` returned for the fitted data.
    table: the new rows, in a form that `design` accepts, without the response. A grouping column
      may be absent or have missing values. Rows without a group label count as a new group.
    offset, weights: the numbers of the new rows [N], or one number for all rows. Give them only if
      the fit got the argument of this name as numbers. Such an offset is needed.

  Returns:
    The columns.

  Raises:
    ValueError: a predictor is absent or has a missing value, or a row has a level that the fitted
      data do not have; or `offset` or `weights` do not fit what the fit got.
  """
  parsed, data = template.formula, as_table(table)
  for name, given in (("offset", offset), ("weights", weights)):
    data = _given(template, data, name, given)
  only, rows = parsed._replace(responses=()), np.arange(data.rows)
  used, arguments = dict.fromkeys(_used(only, {}), "a term"), dict(template.arguments)
  if "weights" in arguments and not data.columns.keys() >= {*arguments["weights"].formula.columns}:
    del arguments["weights"]
  for key, argument in arguments.items():
    used = dict.fromkeys(argument.formula.columns, f"the {key} of the fit") | used
  used.pop(_argument("weights"), None)  # nan where they are not known
  for name, what in used.items():
    missing = columns.is_missing(columns.find(data, name, what))
    if missing.any():
      row = int(np.flatnonzero(missing)[0])
      raise ValueError(f"Column {name!r} is missing in row {row + 1} of the new rows.")
  frame = columns.frame(only._replace(offsets=()), data, rows, template.levels)
  weights_, offset_, *_ = _evaluate(arguments, template.offsets, data, rows)
  if weights_ is None:
    weights_ = np.full(data.rows, np.nan if "weights" in template.arguments else 1.0)
  return NewRows(
    matrices.matrix(parsed.fixed, frame, template.fixed).values,
    tuple(
      matrices.matrix(term.terms, frame, spec).values
      for term, spec in zip(parsed.random, template.random, strict=True)
    ),
    tuple(_groups(template, term.group, data) for term in parsed.random),
    offset_,
    weights_,
  )


def _groups(template: Template, names: tuple[str, ...], data: Table) -> np.ndarray:
  """The index of the group of new rows [N]; -1 if its label is missing, -2 if it is unknown."""
  known = {label: i for i, label in enumerate(template.groups[":".join(names)])}
  absent = np.zeros(data.rows, bool)
  for name in names:
    absent |= name not in data.columns or columns.is_missing(data.columns[name])
  found = np.full(data.rows, -1)
  if not absent.all():
    codes, labels = columns.groups(data, names, np.flatnonzero(~absent))
    found[~absent] = np.array([known.get(label, -2) for label in labels])[codes]
  return found


def _given(template: Template, data: Table, name: str, given: Any) -> Table:
  """The table with the numbers of an argument; weights that the caller does not give are nan."""
  fitted = template.arguments.get(name)
  as_numbers = fitted is not None and _argument(name) in fitted.formula.columns
  if not as_numbers and given is None:
    return data
  if not as_numbers:
    has = f"no argument {name}"
    if fitted is not None:
      has = f"{name}={fitted.formula.text.strip('`')!r}, computed from the table"
    if name == "offset" and template.offsets:
      has += " and offset(...) in its formula"
    raise ValueError(f"The fit has {has}; leave out {name}.")
  if isinstance(given, str) or (given is None and name == "offset"):
    raise ValueError(
      f"The fit got its {name} as numbers: pass {name} for the new rows too, one number a row; got "
      f"{given!r}."
    )
  return _extra(data, name, np.nan if given is None else given)[0]


def _extra(data: Table, name: str, given: str | float | np.ndarray) -> tuple[Table, Expression]:
  """Weights, trials or an offset as an expression; numbers become a column of the table."""
  if isinstance(given, str):
    return data, Expression(expression(f"`{given}`" if given in data.columns else given))
  if not np.ndim(given):
    given = np.full(data.rows, given)
  if np.shape(given) != (data.rows,):
    raise ValueError(
      f"The argument {name} has shape {np.shape(given)}; wanted ({data.rows},), one number a row."
    )
  added = {**data.columns, _argument(name): column(given, _argument(name))}
  return data._replace(columns=added), Expression(expression(f"`{_argument(name)}`"))


def _evaluate(
  arguments: dict[str, Expression], offsets: Sequence[Expression], data: Table, rows: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray, dict[str, Expression], list[Expression]]:
  """(weights [N] or None, the sum of all offsets [N], arguments and offsets as evaluated)."""
  found = {key: vector(part, data, rows, f"the {key}") for key, part in arguments.items()}
  weights = found["weights"][0] if "weights" in found else None
  if weights is not None and (weights <= 0).any():
    raise ValueError("All weights must be above 0; leave out the rows that should not count.")
  added = [vector(part, data, rows, "an offset") for part in offsets]
  every = [values for values, _ in added] + [found[key][0] for key in found if key == "offset"]
  known = {key: part for key, (_, part) in found.items()}
  return weights, sum(every, np.zeros(len(rows))), known, [part for _, part in added]


def _argument(name: str) -> str:
  """The column that holds an argument which is given as numbers."""
  return f"argument {name}"


def _used(parsed: Formula, extra: dict[str, Expression]) -> list[str]:
  """The columns that an expression of the formula or an argument uses."""
  texts = [*parsed.responses, parsed.fixed, *parsed.offsets, *(r.terms for r in parsed.random)]
  found = [parsed.columns[i] for i in columns.places(" ".join(texts))]
  found += [name for part in extra.values() for name in part.formula.columns]
  return list(dict.fromkeys(found))


def _complete(
  data: Table, parsed: Formula, extra: dict[str, Expression]
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


def _response(
  parsed: Formula, data: Table, rows: np.ndarray, family: str, trials: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, str]:
  """(response, trials, name)."""
  parts = [_part(parsed, text) for text in parsed.responses]
  if len(parts) == 2:
    if family not in BINARY:
      raise ValueError(f"{parsed.response} is a logistic response; the family is {family}.")
    one, other = (vector(part, data, rows, "the response")[0] for part in parts)
    if (one < 0).any() or (other < 0).any():
      raise ValueError(f"The counts of {parsed.response} must be at least 0; a row is negative.")
    return one, one + other, parsed.response
  text, name = parsed.responses[0], parsed.columns[0]
  texts = columns.ALIAS.fullmatch(text) and not columns.is_numeric(data.columns[name], data.decimal)
  if texts and family in BINARY and trials is None:
    found = columns.frame(parts[0].formula, data, rows).data[text].cat
    levels = [str(level) for level in found.categories]
    if len(levels) == 2:
      return found.codes.to_numpy(float), None, f"{name} == {levels[1]!r}"
    raise ValueError(
      f"A logistic response has two values; {name!r} has {', '.join(map(repr, levels[:6]))}. "
      f'Compare it with one of them: I({name} == "{levels[-1]}").'
    )
  return vector(parts[0], data, rows, "the response")[0], trials, parsed.response


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
    check_columns(found.values, found.names, term.text, found.crossed)
    check_once(made, group, found.names)
    made.append(RandomTerm(group, tuple(levels), index, found.names, found.values, term.correlated))
    specs.append(found.spec)
  return tuple(made), tuple(specs)


def _part(parsed: Formula, text: str) -> Expression:
  """One expression of a formula by itself."""
  return Expression(parsed._replace(responses=(text,), fixed="0", random=(), offsets=()))
