"""A response that the family can have, and columns that do not depend on each other."""

from collections.abc import Sequence

import numpy as np

from shrinkmeta.formulas.language.formula import INTERCEPT

BINARY = ("logistic", "binomial", "bernoulli")
COUNTS = ("poisson", "negative_binomial")


def check_response(
  response: np.ndarray, name: str, family: str, trials: np.ndarray | None = None
) -> None:
  """Check that a response [N] fits its family.

  Args:
    response: the numbers; successes, where there are trials.
    name: how the formula writes it.
    family: "gaussian", "logistic", "poisson", ...
    trials: [N] numbers of trials, or None.

  Raises:
    ValueError: it does not fit, or all rows have one value.

  >>> check_response(np.array([0.0, 2.0]), "y", "poisson")
  """
  rows = len(response)
  whole = (response >= 0) & (response == np.round(response))
  if family in BINARY and trials is None and not np.isin(response, (0.0, 1.0)).all():
    other = response[~np.isin(response, (0.0, 1.0))][0]
    if whole.all():
      advice = (
        f"Numbers of successes need their trials: cbind({name}, failures), or trials. A code such "
        f'as 2 for "yes" is compared: I({name} == 2)'
      )
    elif ((response >= 0) & (response <= 1)).all():
      advice = "Shares need their counts: cbind(successes, failures), or successes with trials"
    else:
      advice = f"A threshold makes it 0 or 1: I({name} > 3)"
    raise ValueError(
      f"A logistic response is 0 or 1; {name!r} has others, {rows} rows: {other:g} is one. "
      f"{advice}."
    )
  if trials is not None:
    if family not in BINARY:
      raise ValueError(f"Trials are those of a logistic response; the family is {family}.")
    if not whole.all() or not (trials == np.round(trials)).all() or (trials < 0).any():
      raise ValueError(
        f"Successes and trials are whole numbers, 0 or more; {name!r} has others, {rows} rows."
      )
    if (response > trials).any():
      i = int(np.flatnonzero(response > trials)[0])
      raise ValueError(
        f"There are more successes than trials: {response[i]:g} of {trials[i]:g} in {name!r}."
      )
  if family in COUNTS and not whole.all():
    other = response[~whole][0]
    raise ValueError(
      f"A {family.capitalize().replace('_', ' ')} response is a count, 0 or more without decimals; "
      f"{name!r} has others, {rows} rows: {other:g} is one. For a rate, take the count as response "
      "and the time or area as offset(log(time)); for other numbers, the gaussian family."
    )
  if family == "gamma" and (response <= 0).any():
    raise ValueError(f"A gamma response is above 0; {name!r} has others, {rows} rows.")
  share = response if trials is None else response / trials
  if np.ptp(share) == 0:
    raise ValueError(
      f"The response {name!r} is {share[0]:g} in all {rows} rows; there is nothing to explain."
    )


def check_columns(values: np.ndarray, names: Sequence[str], part: str) -> None:
  """Check that no column [N, P] is a linear combination of the others.

  Units say nothing of this, so columns are scaled, and centred beside an intercept.

  Args:
    values: the columns.
    names: their P names.
    part: which part of the formula they are, for errors.

  Raises:
    ValueError: one is. The message names it and those that it depends on.

  >>> check_columns(np.array([[1.0, 2.0], [1.0, 3.0]]), ["(Intercept)", "x"], "the fixed part")
  """
  rows = len(values)
  if not values.shape[1]:
    return
  largest = np.abs(values).max(0)
  for j in np.flatnonzero(largest == 0).tolist():
    advice = "; leave it out."
    if ":" in names[j]:
      advice = (
        "; these levels do not occur together. In place of the interaction, use one column that "
        "names the combinations that do."
      )
    raise ValueError(f"The column {names[j]!r} of {part} is 0 in all {rows} rows{advice}")
  scaled, kept = values / largest, list(range(len(names)))
  size = np.ones(len(names))
  if INTERCEPT in names:
    kept.remove(names.index(INTERCEPT))
    scaled = scaled[:, kept] - scaled[:, kept].mean(0)
    size = np.abs(scaled).max(0, initial=0.0)
  rounding = 4 * np.finfo(float).eps  # of values up to 1, which a small spread makes larger
  for j in np.flatnonzero(size <= rounding).tolist():
    raise ValueError(
      f"The columns of {part} depend on each other in {rows} rows: {names[kept[j]]!r} is "
      f"{values[0, kept[j]]:g} in all of them, as the intercept is. Leave it out."
    )
  if not kept:
    return
  scaled = scaled / size
  least = rounding * max(scaled.shape) / size.min()
  # Columns are few and rows many: R has the singular values of the columns.
  _, found, basis = np.linalg.svd(np.linalg.qr(scaled, mode="r"))
  if len(found) == scaled.shape[1] and found[-1] > least * found[0]:
    return
  involved = [kept[j] for j in np.flatnonzero(np.abs(basis[-1]) > 1e-6).tolist()]
  *others, last = [names[j] for j in involved] if len(involved) > 1 else names
  raise ValueError(
    f"The columns of {part} depend on each other in {rows} rows: {last!r} is a combination of "
    f"{', '.join(map(repr, others))}{' and the intercept' if INTERCEPT in names else ''}. "
    "Leave one out."
  )
