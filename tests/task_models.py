"""Task models for tests: a likelihood, parameters and data, with a sigma for every leaf."""

import jax
import jax.numpy as jnp

import shrinkmeta as sm
from shrinkmeta.mode.task_model import task_model


def model_of(likelihood, phi, batch, scale=None):
  """The task model at phi; `scale` is a tree of sigmas like phi, or one for all; None is 1."""
  labels = sm.by_leaf(phi)
  scale = 1.0 if scale is None else scale
  if jax.tree.structure(scale) != jax.tree.structure(phi):
    scale = jax.tree.map(lambda _: scale, phi)
  names, sigmas = jax.tree.leaves(labels), jax.tree.leaves(scale)
  log_sigma2 = {m: 2 * jnp.log(jnp.asarray(s)) for m, s in zip(names, sigmas, strict=True)}
  return task_model(likelihood, labels, sm.MetaParams(phi, log_sigma2), batch)
