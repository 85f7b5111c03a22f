"""The algorithms that can be compared, by name."""

from collections.abc import Sequence

import shrinkmeta as sm

ALL = (
  "sigma_imaml",
  "sigma_reptile",
  "sigma_maml",
  "imaml",
  "reptile",
  "fomaml",
  "maml",
  "meta_sgd",
  "anil",
  "boil",
  "hand_picked",
  "fine_tuning",
)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
  """Return the algorithms that the flag --algorithms names; "all" stands for every algorithm."""
  if list(names) == ["all"]:
    return ALL
  if unknown := sorted(set(names) - set(ALL)):
    raise ValueError(f"{', '.join(unknown)}: no algorithm; choose of {', '.join(ALL)}, or all.")
  if not names or len(set(names)) < len(names):
    raise ValueError(f"Wanted one or more algorithms, each of them once; got {','.join(names)!r}.")
  return tuple(names)


def learns_sigma(name: str) -> bool:
  """Return whether an algorithm has a prior and learns one sigma for each module."""
  algorithm = sm.FAMILY.get(name)
  return algorithm is not None and algorithm.sigma == "learned" and algorithm.prior
