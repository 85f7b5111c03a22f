"""The effects of each group after a fit: shrunk towards phi, their errors, and unshrunk."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shrinkmeta as sm
from experiments.mixed.criteria import INNER, Family, build, to_parameters
from experiments.mixed.formula import Formula
from experiments.mixed.model import Fit


def group_effects(
  formula: Formula, family: Family, fitted: Fit, batches: sm.Batch
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{random term: (theta_hat [G], its posterior standard deviation [G])} of every group."""
  model = build(formula, family)
  parameters = to_parameters(formula, fitted.fixed, fitted.sd, fitted.residual)
  zero = {term: np.zeros(len(batches.targets)) for term in formula.random}
  if all(sd == 0 for sd in fitted.sd.values()):
    return {t: (zero[t] + fitted.fixed.get(t, 0.0), zero[t]) for t in formula.random}

  def one(batch: sm.Batch) -> tuple[Any, jax.Array]:
    theta, _ = sm.map_estimate(model.likelihood, model.labels, *parameters, batch, INNER)
    found = sm.posterior(model.likelihood, model.labels, *parameters, theta, batch)
    shrink = found.eigenvalues / (1 + found.eigenvalues)
    return theta, 1.0 - jnp.sum(jnp.square(found.basis) * shrink[:, None], 0)

  theta, variance = jax.jit(jax.vmap(one))(batches)
  moving = sorted(term for term in formula.random if fitted.sd[term] > 0)
  sds = {t: np.asarray(jnp.sqrt(variance[:, i])) * fitted.sd[t] for i, t in enumerate(moving)}
  return {t: (np.asarray(theta[t]), sds.get(t, zero[t])) for t in formula.random}


def unshrunk(formula: Formula, batches: sm.Batch) -> dict[str, np.ndarray]:
  """{random term: the group's own least-squares estimate [G]}, nan where its rows leave it open.

  Fixed terms without a random part count with the groups' too: each group is fitted by itself.
  """
  terms = list(dict.fromkeys(formula.random + formula.fixed))
  result = {term: np.full(len(batches.targets), np.nan) for term in formula.random}
  for g, rows in enumerate(np.asarray(batches.mask) > 0):
    x = np.stack([np.asarray(batches.inputs[term][g])[rows] for term in terms], 1)
    varies = [i for i, term in enumerate(terms) if np.any(x[:, i] != 0)]
    kept = x[:, varies]
    if len(kept) < len(varies) or np.linalg.matrix_rank(kept) < len(varies):
      continue
    own = np.linalg.lstsq(kept, np.asarray(batches.targets[g])[rows], rcond=None)[0]
    for i, value in zip(varies, own, strict=True):
      if terms[i] in result:
        result[terms[i]][g] = value
  return result
