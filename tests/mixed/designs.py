"""Designs for the tests, and the likelihood of a linear mixed model as one dense density."""

import csv
import os
import pathlib

import numpy as np
import pytest
import scipy.stats

from shrinkmeta import mixed
from shrinkmeta.formulas.design import Design, RandomTerm

ROOT = pathlib.Path(os.environ.get("SHRINKMETA_DATA", "/nonexistent"))
DATA, CASES = ROOT / "mixed", ROOT.parent / "cases" / "mixed"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="SHRINKMETA_DATA has no folder mixed")
needs_cases = pytest.mark.skipif(
  not CASES.is_dir(), reason="no folder cases/mixed beside SHRINKMETA_DATA"
)
ONE = "(Intercept)"
DYESTUFF = (
  (1545, 1440, 1440, 1520, 1580),
  (1540, 1555, 1490, 1560, 1495),
  (1595, 1550, 1605, 1510, 1560),
  (1445, 1440, 1595, 1465, 1545),
  (1595, 1630, 1515, 1635, 1625),
  (1520, 1455, 1450, 1480, 1445),
)


def read(path):
  """{column: numbers, or texts where one is no number}."""
  with open(path, newline="", encoding="utf-8") as file:
    head, *rows = list(csv.reader(file))
  found = {}
  for name, column in zip(head, zip(*rows, strict=True), strict=True):
    try:
      found[name] = np.array(column, float)
    except ValueError:
      found[name] = np.array(column)
  return found


def design(table, response, fixed, *random, **more):
  """A design from {column: [N]}; `random` holds (group, columns, correlated)."""
  rows = len(table[response])
  column = lambda name: np.ones(rows) if name == ONE else np.asarray(table[name], float)
  terms = []
  for group, names, correlated in random:
    parts = [np.asarray(table[part]) for part in group.split(":")]
    labels = np.array([":".join(map(str, row)) for row in zip(*parts, strict=True)])
    levels = tuple(dict.fromkeys(labels.tolist()))
    index = np.array([levels.index(label) for label in labels])
    for part in [names] if correlated else [[name] for name in names]:
      columns = np.stack([column(name) for name in part], 1)
      terms.append(RandomTerm(group, levels, index, tuple(part), columns, correlated))
  x = np.stack([column(name) for name in fixed], 1) if fixed else np.zeros((rows, 0))
  offset = more.pop("offset", np.zeros(rows))
  return Design(
    np.asarray(table[response], float), response, x, tuple(fixed), tuple(terms), offset, **more
  )


def dyestuff():
  table = {"yield": np.ravel(DYESTUFF), "batch": np.repeat(list("ABCDEF"), 5)}
  return design(table, "yield", [ONE], ("batch", [ONE], False))


def marginal(made, sigmas, residual):
  """Cov(y) [N, N], from the covariance of the effects of every random term."""
  rows = len(made.response)
  weights = np.ones(rows) if made.weights is None else made.weights
  total = np.diag(residual**2 / weights)
  for term, sigma in zip(made.random, sigmas, strict=True):
    same = term.index[:, None] == term.index
    total += same * (term.columns @ sigma @ term.columns.T)
  return total


def dense(made, beta, sigmas, residual, reml=False):
  """log p(y), or the restricted likelihood at the generalised least squares estimate of beta."""
  v = marginal(made, sigmas, residual)
  y, x = made.response - made.offset, made.fixed
  if not reml:
    return scipy.stats.multivariate_normal.logpdf(y, x @ beta, v)
  cross = x.T @ np.linalg.solve(v, x)
  beta = np.linalg.solve(cross, x.T @ np.linalg.solve(v, y))
  value = scipy.stats.multivariate_normal.logpdf(y, x @ beta, v)
  return value + len(beta) / 2 * np.log(2 * np.pi) - np.linalg.slogdet(cross)[1] / 2


def nested(seed=0, rows=90, **more):
  """(1 | a) + (x | a:b) + (w || a:b): three terms on two factors, groups of unequal size."""
  rng = np.random.default_rng(seed)
  table = {"a": rng.integers(0, 5, rows), "b": rng.integers(0, 3, rows)}
  table |= {"x": rng.normal(size=rows) + 2, "w": rng.normal(size=rows)}
  inner = np.unique(table["a"] * 10 + table["b"], return_inverse=True)[1]
  draw = lambda index: rng.normal(size=index.max() + 1)[index]
  eta = 0.5 - 0.7 * table["x"] + draw(table["a"]) + 0.6 * table["x"] * draw(inner)
  eta += 0.8 * draw(inner) + 0.5 * table["w"] * draw(inner)
  table |= {"y": eta + 0.7 * rng.normal(size=rows), "eta": eta}
  table["count"] = rng.poisson(np.exp(np.clip(0.5 * eta, -5, 3)))
  table["trials"] = rng.integers(1, 6, rows)
  table["wins"] = rng.binomial(table["trials"], 1 / (1 + np.exp(-eta)))
  terms = (("a", [ONE], False), ("a:b", [ONE, "x"], True), ("a:b", ["w"], False))
  response = more.pop("response", "y")
  if response == "wins":
    more["trials"] = np.asarray(table["trials"], float)
  return design(table, response, [ONE, "x"], *terms, **more)


def gradient_by_differences(value, x, step=1e-5):
  found = []
  for i in range(len(x)):
    h = np.zeros(len(x))
    h[i] = step
    found.append((value(x + h) - value(x - h)) / (2 * step))
  return np.array(found)


def model_with_odd_names():
  """A fitted model whose names matplotlib would read as formulas, one of them a wrong formula."""
  rng = np.random.default_rng(0)
  names = ["$5", "a_b$", r"$\frac$", "d", "e", "f"]
  g = np.repeat(np.arange(6), 5)
  x = rng.normal(size=30)
  y = rng.normal(size=6)[g] + (1 + rng.normal(size=6)[g]) * x + 0.5 * rng.normal(size=30)
  data = {"y$x$": y, "x": x, "$g$": [names[i] for i in g]}
  return mixed.fit("`y$x$` ~ x + (x || `$g$`)", data)
