"""Check that a mixed model can be fitted to a design; the errors say what to change."""

import numpy as np

from shrinkmeta.formulas.design import Design

FAMILIES = ("gaussian", "logistic", "poisson")


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
    levels = len(np.unique(term.index))
    if levels != len(term.levels):
      raise ValueError(
        f"The grouping factor {term.group!r} names {len(term.levels)} groups, and {levels} have "
        "rows; leave out the groups without rows."
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
  found = np.zeros(inner.max() + 1, int)
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
    ValueError: a value of the response or of the trials is not allowed, or the response is
      constant. The message says what to change.
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
    constant = np.all(y == 0) or np.all(y == trials)
  elif family == "poisson":
    bad = np.flatnonzero(~((y >= 0) & (y == np.round(y))))
    if len(bad):
      raise ValueError(
        f"A Poisson response is a count; {name!r} is {y[bad[0]]:g} in row {bad[0] + 1} of {rows}. "
        "Give a rate as counts with an offset, the log of the exposure."
      )
    constant = np.all(y == 0)
  else:
    constant = rows > 1 and np.ptp(y) == 0
  if constant:
    raise ValueError(
      f"The response {name!r} is {y[0]:g} in all {rows} rows; there is nothing to explain."
    )
