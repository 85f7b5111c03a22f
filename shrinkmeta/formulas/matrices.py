"""Make the matrices of a formula from the columns of a Frame, with the package formulaic."""

import itertools
import re
import warnings
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas import columns
from shrinkmeta.formulas.columns import ALIAS, Frame
from shrinkmeta.formulas.language import functions
from shrinkmeta.formulas.language.formula import INTERCEPT, Formula
from shrinkmeta.formulas.table import Table, where

_POWER = re.compile(r"(?<=[_)]) \*\* (?=-?\d)")
_RAW = re.compile(r"(poly\(.*?raw=True[^()]*\))\[(\d+)\]")


class Matrix(NamedTuple):
  """A matrix, and formulaic's specification of it.

  Attributes:
    names: the P names of the columns.
    values: [N, P] float64.
    spec: formulaic's ModelSpec, which makes the same columns for other rows.
    crossed: whether each of the P columns belongs to an interaction. The names do not tell: a
      column of the table or a level may have a colon in its name.
  """

  names: tuple[str, ...]
  values: np.ndarray
  spec: Any
  crossed: tuple[bool, ...]


class Expression(NamedTuple):
  """An expression that gives one number for each row.

  Attributes:
    formula: the expression, in `responses`.
    spec: formulaic's specification from the fitted rows, with their means and scales. None before
      the fit, and for a plain column, which needs none.
  """

  formula: Formula
  spec: Any = None


def matrix(text: str, frame: Frame, spec: Any = None) -> Matrix:
  """Make the matrix of the terms of a checked formula.

  Args:
    text: the terms, such as `Formula.fixed`.
    frame: the columns that the terms use.
    spec: `Matrix.spec` of the fitted data, if the rows are new. It keeps the means and the knots
      of the fitted data. None makes a new specification.

  Returns:
    A Matrix. The intercept is called "(Intercept)", and a numeric column keeps its name. The column
    `f[T.b]` is 1 in rows where f is b, and 0 elsewhere.

  Raises:
    ImportError: formulaic is not installed.
    ValueError: formulaic cannot read the terms, or a value of the matrix is nan or infinite.
  """
  formulaic, errors = _formulaic()
  readable = lambda name: _readable(name, frame)
  try:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
      warnings.simplefilter("error", errors.DataMismatchWarning)
      warnings.simplefilter("ignore", RuntimeWarning)
      if spec is None:
        parsed = formulaic.Formula(text, _parser=_parser())
        _check_factors(parsed, frame)
        made = parsed.get_model_matrix(
          frame.data, context=functions.context(), na_action="ignore", output="pandas"
        )
      else:
        made = spec.get_model_matrix(frame.data, context=functions.context())
  except (errors.FormulaicError, errors.DataMismatchWarning, ValueError, TypeError) as error:
    said = re.sub("\x1b\\[[0-9;]*m|[⧛⧚]", "", readable(str(error))).split("\n")[0]
    if isinstance(error, errors.DataMismatchWarning):
      said = "levels=[...] leaves out levels that rows have; name all of them, or drop these rows."
    if "beyond upper and/or lower bounds" in said:
      said = "a value is outside of the range of the fit, where bs has no spline; cr(...) goes on."
    if "levels" in said:
      said += "".join(
        f" {readable(alias)} has the levels {', '.join(map(repr, levels))}."
        for alias, levels in frame.levels.items()
        if alias in text
      )
    raise ValueError(
      f"The terms {readable(text).removeprefix('+ ')!r} of the formula cannot be made: {said}"
    ) from error
  values = made.to_numpy(float)
  # formulaic counts the columns of poly from 1, and those of poly(..., raw=True) from 0.
  counted = [_RAW.sub(lambda m: f"{m[1]}[{int(m[2]) + 1}]", n) for n in made.columns]
  names = tuple(INTERCEPT if n == "Intercept" else readable(n) for n in counted)
  for part in made.model_spec.structure if spec is None else ():
    if not part.columns:
      raise ValueError(
        f"The term {readable(str(part.term))!r} has one level in {len(values)} rows, so it has no "
        "column of its own. Leave it out."
      )
  for j in np.flatnonzero(~np.isfinite(values).all(0)).tolist():
    row = int(np.flatnonzero(~np.isfinite(values[:, j]))[0])
    raise ValueError(
      f"{names[j]} is {values[row, j]:g} in {where(frame.table, int(frame.rows[row]))}; leave such "
      "rows out, or choose another function."
    )
  crossed = [len(part.term.factors) > 1 for part in made.model_spec.structure for _ in part.columns]
  return Matrix(names, values, made.model_spec, tuple(crossed))


def vector(
  expression: Expression, table: Table, rows: np.ndarray, what: str
) -> tuple[np.ndarray, Expression]:
  """Evaluate an expression that gives one number for each row.

  Args:
    expression: the expression. For new rows it is the one that this function returned for the
      fitted rows, so that both use the same means and scales.
    table: the table.
    rows: [N], the indices of the rows.
    what: the role of the numbers, such as "the weights", for the error message.

  Returns:
    [N] float64, and the expression with its specification. In a plain column of truth values True
    is 1, and False is 0.

  Raises:
    ImportError: formulaic is not installed.
    ValueError: for the reasons of `matrix`, or because the expression gives several columns.
  """
  formula = expression.formula
  text = formula.responses[0]
  if plain := ALIAS.fullmatch(text):
    return columns.numbers(table, formula.columns[int(plain[2])], what)[rows], expression
  frame = columns.frame(formula, table, rows)
  found = matrix(f"0 + {text}", frame, expression.spec)
  if len(found.names) != 1:
    name = _readable(text, frame)
    raise ValueError(f"{name!r} must be one column of numbers; got {len(found.names)} columns.")
  return found.values[:, 0], Expression(formula, found.spec)


def _readable(text: str, frame: Frame) -> str:
  """A checked text as users write it, with the names of the columns."""
  text = _POWER.sub("^", text).replace("as_numeric(", "as.numeric(").replace(functions.CENTRE, "")
  text = ALIAS.sub(lambda m: frame.formula.columns[int(m[2])], text)
  return functions.readable(text)


def _formulaic() -> tuple[Any, Any]:
  try:
    import formulaic
    import formulaic.errors
  except ImportError as error:
    raise ImportError(
      "Formulas of mixed models need the package formulaic: pip install 'shrinkmeta[mixed]'."
    ) from error
  return formulaic, formulaic.errors


def _parser() -> Any:
  from formulaic.parser import DefaultFormulaParser

  return DefaultFormulaParser(feature_flags=DefaultFormulaParser.FeatureFlags.NONE)


def _check_factors(parsed: Any, frame: Frame) -> None:
  """Nothing reaches formulaic's `eval` that `functions.checked` has not seen."""
  for factor in itertools.chain.from_iterable(term.factors for term in parsed):
    if factor.eval_method.value == "lookup" and factor.expr not in frame.data:
      raise ValueError(f"{factor.expr!r} is not a term.")
    if factor.eval_method.value == "python":
      functions.checked(factor.expr.replace("_t", "_c"), factor.expr, frame.formula.columns)
