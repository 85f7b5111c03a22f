"""The response and the matrices of a mixed model, which are built from a formula and a table.

    eta = offset + X beta + sum_k Z_k b_k,   b_k of level l ~ N(0, Sigma_k),   k over random terms

There are N rows, and X has P columns. Random term k has q_k columns, and its grouping factor has
L_k levels.
"""

from typing import NamedTuple

import numpy as np


class RandomTerm(NamedTuple):
  """One random part of a formula: `(1 | g)`, `(x | g)`, or one of the terms of `(x || g)`.

  Attributes:
    group: the name of the grouping factor, such as `"g"`. The inner factor of `(1 | a/b)` is
      called `"a:b"`.
    levels: the L labels of the groups, in the order of their first row.
    index: [N] int, the position in `levels` of the group of every row.
    names: the q names of the columns.
    columns: [N, q] float64.
    correlated: True if Sigma_k is a full covariance [q, q]. False if it is diagonal, with one
      standard deviation for each column. If q is 1, the two are the same.
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
    response: [N] float64. With `trials` it holds the numbers of successes.
    response_name: the response as the formula writes it.
    fixed: [N, P] float64, the matrix X.
    fixed_names: the P names of the columns of X.
    random: the random terms. They have one grouping factor, or grouping factors that are nested.
    offset: [N] float64, added to eta.
    weights: [N] float64. A weight multiplies the log density of its row; in the gaussian family it
      multiplies the precision of the row. None gives every row the weight 1.
    trials: [N] float64, the numbers of trials of a binomial response. None: one trial in each row.
    dropped: (reason, number of rows) for the rows of the table that are left out.
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
