"""The studies of starts, with a few designs and a few starts, and the likelihood they refer to."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from experiments.mixed.reference import Laplace, separated
from shrinkmeta import mixed

ONE = "(Intercept)"


@pytest.mark.parametrize(
  ("study", "designs"), (("study_starts", 2), ("study_glmms", 6)), ids=("gaussian", "glmms")
)
def test_no_design_of_a_few_is_missed(command, study, designs):
  done = command(f"mixed.{study}", f"--designs={designs}", "--starts=2")
  assert done.returncode == 0, done.stderr[-3000:]
  last = done.stdout.splitlines()[-1]
  wanted = f"{designs} designs from 0, seed 0: 0 more than 0.01 nats below the best of 2 starts"
  assert last.startswith(wanted)
  assert "0 not converged" in last and "0 of them not named" in last


def made(family, trials=None):
  """Six groups of five rows with correlated levels and slopes."""
  rng = np.random.default_rng(5)
  g, x = np.repeat(np.arange(6), 5), rng.normal(size=30)
  columns = np.stack([np.ones(30), x], 1)
  eta = columns @ [0.3, 0.5] + (columns * rng.normal(size=(6, 2))[g]).sum(1)
  most = 1 if trials is None else trials
  p = 1 / (1 + np.exp(-eta))
  y = rng.binomial(most, p) if family == "logistic" else rng.poisson(np.exp(eta))
  term = mixed.RandomTerm("g", tuple("abcdef"), g, (ONE, "x"), columns, True)
  offset = 0.2 * rng.normal(size=30)
  many = None if trials is None else np.full(30, float(trials))
  return mixed.Design(y * 1.0, "y", columns, (ONE, "x"), (term,), offset, trials=many)


@pytest.mark.parametrize(
  ("family", "trials", "near"), (("logistic", 50, 0.05), ("poisson", None, 0.1))
)
def test_the_reference_is_near_the_integral_and_its_gradient_is_right(family, trials, near):
  """The integral over both effects of a group on a grid of their standardised values."""
  design = made(family, trials)
  laplace = Laplace(design, family, True)
  v = np.array([0.4, 0.3, -0.3, -0.6, 0.4])
  value, gradient = laplace(v)
  steps = 1e-5 * np.eye(5)
  numeric = [(laplace(v + h)[0] - laplace(v - h)[0]) / 2e-5 for h in steps]
  np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-4)
  factor = np.linalg.cholesky(laplace.covariance(v)[0])
  u = np.linspace(-6, 6, 361)
  effects = np.stack(np.meshgrid(u, u, indexing="ij"), -1) @ factor.T
  prior = scipy.stats.norm.logpdf(u)[:, None] + scipy.stats.norm.logpdf(u)
  eta = design.offset + laplace.x @ v[:2]
  total = 0.0
  for group in range(6):
    log_p = prior.copy()
    for i in np.flatnonzero(design.random[0].index == group):
      at = eta[i] + effects @ design.fixed[i]
      if family == "logistic":
        log_p += design.response[i] * at - trials * np.logaddexp(0, at)
        log_p += np.log(scipy.special.comb(trials, design.response[i]))
      else:
        log_p += scipy.stats.poisson.logpmf(design.response[i], np.exp(at))
    total += scipy.special.logsumexp(log_p) + 2 * np.log(u[1] - u[0])
  assert -value == pytest.approx(total, abs=near)


def test_separation_is_found():
  design = made("logistic")
  assert not separated(design, False)
  assert separated(design._replace(response=(design.fixed[:, 1] > 0.1) * 1.0), False)
  counts = made("poisson")
  assert not separated(counts, True)
  treated = np.stack([np.ones(30), np.arange(30) % 5 == 0], 1)
  none = np.where(treated[:, 1] == 1, 0, counts.response + 1)
  assert separated(counts._replace(response=none, fixed=treated), True)
