"""Check that a mixed model can be fitted to a design; the errors say what to change."""

import numpy as np

from shrinkmeta.formulas.design import Design

FAMILIES = ("gaussian", "logistic", "poisson")
_SAME_UNITS = 1e-5  # the largest difference of two log det X'X that may be rounding


def check(design: Design) -> None:
  """Raise ValueError if a design cannot be fitted, whatever the family.

  Args:
    design: the matrices of a formula.

  Raises:
    ValueError: the numbers of rows differ, there are too many columns or too few groups, or a
      value is not allowed. The message says what to change.
  """
  rows, p = np.shape(design.fixed)
  if rows == 0 or rows != len(design.response):
    raise ValueError(
      f"The design has {len(design.response)} values of the response and {rows} rows of fixed "
      "columns; it needs the same number, at least one."
    )
  if p >= rows:
    raise ValueError(
      f"The fixed part has {p} columns for {rows} rows ({', '.join(design.fixed_names)}); leave "
      "columns out or bring more rows."
    )
  arrays = [("the response " + repr(design.response_name), design.response)]
  columns = zip(design.fixed_names, np.asarray(design.fixed).T, strict=True)
  arrays += [(f"the fixed column {n!r}", x) for n, x in columns]
  arrays += [("the offset", design.offset), ("the weights", design.weights)]
  arrays += [("the trials", design.trials)]
  for term in design.random:
    columns = zip(term.names, np.asarray(term.columns).T, strict=True)
    arrays += [(f"the random column {n!r} of {term.group!r}", x) for n, x in columns]
    found, levels = np.unique(term.index), len(term.levels)
    if len(found) and (found[0] < 0 or found[-1] >= levels):
      raise ValueError(
        f"The index of the grouping factor {term.group!r} goes from {found[0]} to {found[-1]}; for "
        f"{levels} groups it must go from 0 to {levels - 1}. Its type is {found.dtype}. Use int64: "
        "int8, for example, holds no number above 127."
      )
    if len(found) != levels:
      raise ValueError(
        f"The grouping factor {term.group!r} names {levels} groups, and {len(found)} have rows; "
        "leave out the groups without rows."
      )
    if levels < 2:
      raise ValueError(
        f"The grouping factor {term.group!r} has one level, {term.levels[0]!r}, in {rows} rows; a "
        "variance between groups needs at least two."
      )
  for name, values in arrays:
    if values is None:
      continue
    if len(values) != rows:
      raise ValueError(f"{name} has {len(values)} values for {rows} rows of the response.")
    bad = np.flatnonzero(~(np.abs(np.asarray(values, float)) < 1e100))
    if len(bad):
      raise ValueError(
        f"{name} is {values[bad[0]]} in row {bad[0] + 1}; all values must be finite and below "
        "1e100. Leave such rows out, or choose another unit."
      )
    if ("column" in name or "weights" in name) and not np.any(values):
      raise ValueError(f"{name} is 0 in all {rows} rows; leave it out.")
  if design.weights is not None and not (np.asarray(design.weights) > 0).all():
    first = int(np.flatnonzero(~(np.asarray(design.weights) > 0))[0])
    raise ValueError(
      f"The weight of row {first + 1} is {design.weights[first]}; weights must be positive. Leave "
      "out the rows that should not count."
    )


def check_nested(coarse: str, fine: str, outer: np.ndarray, inner: np.ndarray) -> None:
  """Raise ValueError unless every group of the finer factor lies in one group of the coarser one.

  Args:
    coarse, fine: the names of the two factors.
    outer, inner: [N], the group of every row in the coarser and in the finer factor.

  Raises:
    ValueError: the factors are crossed.
  """
  found = np.zeros(int(inner.max()) + 1, int)  # 127 + 1 is -128 in int8
  found[inner] = outer
  if not np.array_equal(found[inner], outer):
    raise ValueError(
      f"The grouping factors {coarse!r} and {fine!r} are crossed: a group of {fine!r} has rows in "
      f"several groups of {coarse!r}. Only nested factors can be fitted. If the labels of one are "
      f"used again in every group of the other, write (1 | {coarse}/{fine}) for {fine!r} within "
      f"{coarse!r}, or (1 | {fine}/{coarse}). Otherwise put the factor with fewer levels into the "
      "fixed part, as C(...), or fit crossed factors with lme4."
    )


def check_response(design: Design, family: str) -> None:
  """Raise ValueError if the response does not fit the family.

  Args:
    design: the design that holds the response.
    family: the family.

  Raises:
    ValueError: a value of the response or of the trials is not allowed; the response is all
      failures, all successes or all counts 0; or a gaussian response and its offset are constant.
      The message says what to change.
  """
  if family not in FAMILIES:
    raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}.")
  y, name, rows = np.asarray(design.response, float), design.response_name, len(design.response)
  if design.trials is not None and family != "logistic":
    raise ValueError(f"trials belong to a logistic response; the family is {family}.")
  if family == "logistic":
    trials = np.ones(rows) if design.trials is None else np.asarray(design.trials, float)
    bad = np.flatnonzero(~((trials >= 1) & (trials == np.round(trials))))
    if len(bad):
      raise ValueError(
        f"The trials of row {bad[0] + 1} are {trials[bad[0]]:g}; they must be whole numbers of at "
        "least 1."
      )
    bad = np.flatnonzero(~((y >= 0) & (y <= trials) & (y == np.round(y))))
    if len(bad):
      wanted = "0 or 1" if design.trials is None else "a whole number from 0 to its trials"
      raise ValueError(
        f"A logistic response is {wanted}; {name!r} is {y[bad[0]]:g} in row {bad[0] + 1} of {rows}."
      )
  elif family == "poisson":
    bad = np.flatnonzero(~((y >= 0) & (y == np.round(y))))
    if len(bad):
      raise ValueError(
        f"A Poisson response is a count; {name!r} is {y[bad[0]]:g} in row {bad[0] + 1} of {rows}. "
        "Give a rate as counts with an offset, the log of the exposure."
      )
  # An offset that varies leaves something to explain in a constant gaussian response.
  still = family == "gaussian" and rows > 1 and np.ptp(y) == 0 and np.unique(design.offset).size < 2
  if still or is_extreme(design, family):
    raise ValueError(
      f"The response {name!r} is {y[0]:g} in all {rows} rows; there is nothing to explain."
    )


def is_extreme(design: Design, family: str) -> bool:
  """Tell whether a response is all failures, all successes or all counts 0.

  As an intercept goes to -inf or inf, the likelihood of such a response goes to 1.

  Args:
    design: the design that holds the response.
    family: the family. A gaussian response is never extreme.

  Returns:
    Whether the response is extreme.

  >>> one = np.ones((3, 1))
  >>> is_extreme(Design(np.zeros(3), "y", one, ("(Intercept)",), (), np.zeros(3)), "poisson")
  True
  """
  trials = 1.0 if design.trials is None else np.asarray(design.trials, float)
  y = np.asarray(design.response, float)
  lowest = family != "gaussian" and np.all(y == 0)
  return bool(lowest or (family == "logistic" and np.all(y == trials)))


def check_restricted(small: Design, large: Design) -> None:
  """Raise ValueError unless the restricted likelihoods of two designs can be compared.

  Fixed columns X A in place of X add -log |det A| to log L_REML, whatever the variances are. So the
  columns of both designs must span the same space, and det X'X must be the same. This allows
  another order of the columns, and I(x - 3) in place of x where there is an intercept.

  Args:
    small, large: the designs. The fixed columns of each are linearly independent.

  Raises:
    ValueError: the fixed columns span different spaces, or are in different units.
  """
  one, other = (np.asarray(made.fixed, float) for made in (small, large))
  if one.shape == other.shape and not outside(one, other):
    # R of X = Q R keeps digits that X'X would lose: log det X'X is 2 log |det R|.
    a, b = (np.log(np.abs(np.diag(np.linalg.qr(x, mode="r")))).sum() for x in (one, other))
    if 2 * abs(a - b) < _SAME_UNITS:
      return
  raise other_fixed(small.fixed_names, large.fixed_names)


def other_fixed(small: tuple[str, ...], large: tuple[str, ...]) -> ValueError:
  """Return the error for two REML fits whose fixed effects have these names."""
  return ValueError(
    f"The fixed columns of the two models ({', '.join(small)}; {', '.join(large)}) differ, if only "
    "in their units. Restricted likelihoods of different fixed columns cannot be compared. Use the "
    "same fixed columns in both models, or fit both models by 'ml'."
  )


def outside(columns: np.ndarray, spanned: np.ndarray) -> list[int]:
  """Find the columns that are no linear combination of others.

  Args:
    columns: [N, P].
    spanned: [N, Q], the others.

  Returns:
    The positions of these columns, from 0 to P - 1.

  >>> outside(np.eye(3), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
  [0, 1]
  """
  basis = np.linalg.qr(spanned / np.maximum(np.linalg.norm(spanned, axis=0), 1e-300))[0]
  left = np.linalg.norm(columns - basis @ (basis.T @ columns), axis=0)
  return np.flatnonzero(left > 1e-7 * np.linalg.norm(columns, axis=0)).tolist()
