"""The matrices of a mixed model: what a formula makes of a table.

    eta = offset + X beta + sum_k Z_k b_k,   b_k of level l ~ N(0, Sigma_k),   k over random terms

N rows, P columns of X, q_k columns of a random term, L_k levels of its grouping factor.
"""

from typing import NamedTuple

import numpy as np


class RandomTerm(NamedTuple):
  """One random part of a formula: `(1 | g)`, `(x | g)`, or one of the terms of `(x || g)`.

  Attributes:
    group: the grouping factor as written, such as `"g"`; `"a:b"` for the inner part of `(1 | a/b)`.
    levels: the L labels of the groups, in the order of their first row.
    index: [N] int, the level of every row.
    names: the q names of the columns.
    columns: [N, q] float64.
    correlated: Sigma_k is a full covariance [q, q]; otherwise it is diagonal, one standard
      deviation a column. Makes no difference where q is 1.
  """

  group: str
  levels: tuple[str, ...]
  index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
  names: tuple[str, ...]
  columns: np.ndarray
  correlated: bool


class Design(NamedTuple):
  """The response and the columns of a mixed model.

  Attributes:
    response: [N] float64. Successes, where `trials` is given.
    response_name: how the formula writes it.
    fixed: [N, P] float64, the matrix X.
    fixed_names: the P names of its columns.
    random: the random terms. Their grouping factors are one factor, or nested in one another.
    offset: [N] float64, added to eta.
    weights: [N] float64, which multiply the log density of a row (gaussian: its precision); None
      for ones.
    trials: [N] float64, of a binomial response; None for one trial a row.
    dropped: (reason, number of rows) for the rows of the table that are not used.
  """

  response: np.ndarray
  response_name: str
  fixed: np.ndarray
  fixed_names: tuple[str, ...]
  random: tuple[RandomTerm, ...]
  offset: np.ndarray
  weights: np.ndarray | None = None
  trials: np.ndarray | None = None
  dropped: tuple[tuple[str, int], ...] = ()
