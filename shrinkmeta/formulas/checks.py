"""Check that the response fits its family, and that no column is a combination of others."""

from collections.abc import Sequence

import numpy as np

from shrinkmeta.formulas.design import RandomTerm
from shrinkmeta.formulas.language.formula import INTERCEPT

BINARY = ("logistic", "binomial", "bernoulli")
COUNTS = ("poisson", "negative_binomial")


def check_response(
  response: np.ndarray,
  name: str,
  family: str,
  trials: np.ndarray | None = None,
  offset: np.ndarray | None = None,
) -> None:
  """Check that a response [N] fits its family.

  Args:
    response: the values of the response. With `trials` they are numbers of successes.
    name: the response as the formula writes it, for the error message.
    family: "gaussian", "logistic", "poisson", ...
    trials: [N] numbers of trials, or None.
    offset: [N] the offset, or None. Equal counts in different exposures have something to explain.

  Raises:
    ValueError: a value does not fit the family, or the response is the same in all rows.

  >>> check_response(np.array([0.0, 2.0]), "y", "poisson")
  """
  rows = len(response)
  whole = (response >= 0) & (response == np.round(response))
  if family in BINARY and trials is None and not np.isin(response, (0.0, 1.0)).all():
    other = response[~np.isin(response, (0.0, 1.0))][0]
    if whole.all():
      advice = (
        f"If it counts successes, write cbind({name}, failures) or pass trials. If it has codes, "
        f'such as 2 for "yes", compare it with one: I({name} == 2)'
      )
    elif ((response >= 0) & (response <= 1)).all():
      advice = "For shares, write cbind(successes, failures), or pass successes with trials"
    else:
      advice = f"Compare it with a threshold, such as I({name} > 3)"
    raise ValueError(
      f"A logistic response must be 0 or 1; {name!r} has the value {other:g} among {rows} rows. "
      f"{advice}."
    )
  if trials is not None:
    if family not in BINARY:
      raise ValueError(f"trials belong to a logistic response; the family is {family}.")
    if not whole.all() or not (trials == np.round(trials)).all() or (trials < 0).any():
      raise ValueError(
        f"Successes and trials must be whole numbers of at least 0; those of {name!r} are not, in "
        f"{rows} rows."
      )
    if (response > trials).any():
      i = int(np.flatnonzero(response > trials)[0])
      raise ValueError(
        f"There are more successes than trials: {response[i]:g} of {trials[i]:g} in {name!r}."
      )
  if family in COUNTS and not whole.all():
    other = response[~whole][0]
    raise ValueError(
      f"A {family.capitalize().replace('_', ' ')} response must be a count, a whole number of at "
      f"least 0; {name!r} has the value {other:g} among {rows} rows. For a rate, use the count as "
      "response and add offset(log(time)). For other numbers, use the gaussian family."
    )
  if family == "gamma" and (response <= 0).any():
    raise ValueError(f"A gamma response must be above 0; {name!r} has values <= 0 ({rows} rows).")
  share = response if trials is None else response / trials
  # Failures alone, successes alone and counts of 0 have no finite rate, whatever the offset.
  ends = (0.0, 1.0) if family in BINARY else (0.0,) if family in COUNTS else ()
  if np.ptp(share) == 0 and (share[0] in ends or offset is None or np.ptp(offset) == 0):
    raise ValueError(
      f"The response {name!r} is {share[0]:g} in all {rows} rows; there is nothing to explain."
    )


def check_columns(
  values: np.ndarray, names: Sequence[str], part: str, crossed: Sequence[bool] = ()
) -> None:
  """Check that no column [N, P] is a linear combination of the others.

  The columns are scaled first, so that the result does not depend on their units. If there is an
  intercept, they are also centred.

  Args:
    values: the columns.
    names: the P names of the columns.
    part: the part of the formula that the columns belong to, for the error message.
    crossed: `Matrix.crossed`, for the error message. Empty: no column belongs to an interaction.

  Raises:
    ValueError: a column depends on others. The message names this column and the others.

  >>> check_columns(np.array([[1.0, 2.0], [1.0, 3.0]]), ["(Intercept)", "x"], "the fixed part")
  """
  rows = len(values)
  if not values.shape[1]:
    return
  largest = np.abs(values).max(0)
  for j in np.flatnonzero(largest == 0).tolist():
    advice = "; leave it out."
    if crossed and crossed[j]:
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


def check_once(terms: Sequence[RandomTerm], group: str, names: Sequence[str]) -> None:
  """Check that no random effect of a new term is already in another term of the same groups.

  Args:
    terms: the other terms.
    group: the grouping factor of the new term.
    names: the names of its columns.

  Raises:
    ValueError: an effect is in two terms. The message names it.

  >>> check_once([], "g", ["(Intercept)"])
  """
  for other in terms:
    twice = sorted(set(other.names) & set(names))
    if other.group == group and twice:
      raise ValueError(
        f"The random effect {twice[0]} by {group} is in two terms; leave it out of one. An "
        f"intercept is left out by 0 +, as in (1 | {group}) + (0 + x | {group})."
      )
