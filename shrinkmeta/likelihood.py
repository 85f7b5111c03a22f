"""p(x_n | theta): a network and the density of what it predicts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from shrinkmeta import validate

PyTree = Any
Predict = Callable[[PyTree, PyTree], jax.Array]  # (theta, inputs [N, ...]) -> outputs [N, ...]


class Likelihood(NamedTuple):
  """A likelihood in two parts, so that Gauss-Newton knows where the network ends.

  predict(theta, inputs) -> outputs [N, ...]; log_prob(outputs, targets) -> [N].
  """

  predict: Predict
  log_prob: Callable[[jax.Array, PyTree], jax.Array]


def _sum_trailing(x: jax.Array) -> jax.Array:
  """[N, ...] -> [N]."""
  return jnp.sum(x.reshape(x.shape[0], -1), axis=-1)


def _same_shape(outputs: jax.Array, targets: jax.Array) -> None:
  if jnp.shape(outputs) != jnp.shape(targets):
    raise ValueError(
      f"predict returned outputs of shape {jnp.shape(outputs)}, the targets have shape "
      f"{jnp.shape(targets)}; they must be equal (reshape one: broadcasting would pair every "
      "output with every target)."
    )


def gaussian(predict: Predict, scale: jax.typing.ArrayLike = 1.0) -> Likelihood:
  """y ~ N(f, scale^2): -((y - f) / scale)^2 / 2 - log scale - log(2 pi) / 2, summed over [...].

  Args:
    predict: outputs f [N, ...], the mean.
    scale: standard deviation, in the unit of y; broadcasts against the outputs.
  """
  if (value := validate.known(scale)) is not None and not (value > 0).all():
    raise ValueError(f"scale is a standard deviation and must be positive; got {value}.")

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _same_shape(outputs, targets)
    s = jnp.asarray(scale, outputs.dtype)
    residual = (targets - outputs) / s
    return _sum_trailing(-0.5 * jnp.square(residual) - jnp.log(s) - 0.5 * math.log(2 * math.pi))

  return Likelihood(predict, log_prob)


def categorical(predict: Predict) -> Likelihood:
  """y ~ Categorical(softmax(f)): f_y - logsumexp(f), summed over positions.

  Outputs are logits [N, ..., C]; targets are integer labels [N, ...] from 0 to C - 1. A label out
  of range makes that example's log-probability NaN (so that its task is reported and left out)
  and is a ValueError outside jit.
  """

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
      raise ValueError(f"targets must be integer labels; got dtype {jnp.result_type(targets)}.")
    if jnp.shape(outputs)[:-1] != jnp.shape(targets):
      raise ValueError(
        f"predict returned logits of shape {jnp.shape(outputs)}, so labels must have shape "
        f"{jnp.shape(outputs)[:-1]}; got {jnp.shape(targets)}."
      )
    classes = outputs.shape[-1]
    if (value := validate.known(targets)) is not None and ((value < 0) | (value >= classes)).any():
      raise ValueError(
        f"labels must lie in 0..{classes - 1} (predict returned {classes} logits); got "
        f"{value.min()}..{value.max()}."
      )
    one_hot = jax.nn.one_hot(targets, classes, dtype=outputs.dtype)
    picked = jnp.sum(one_hot * jax.nn.log_softmax(outputs), -1)
    in_range = (targets >= 0) & (targets < classes)
    return _sum_trailing(jnp.where(in_range, picked, jnp.nan))

  return Likelihood(predict, log_prob)


def bernoulli(predict: Predict) -> Likelihood:
  """y ~ Bernoulli(sigmoid(f)): y f - log(1 + exp f), summed over [...]; y in [0, 1]."""

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _same_shape(outputs, targets)
    return _sum_trailing(targets.astype(outputs.dtype) * outputs - jax.nn.softplus(outputs))

  return Likelihood(predict, log_prob)


def poisson(predict: Predict) -> Likelihood:
  """y ~ Poisson(exp f): y f - exp f - log y!, summed over [...]; y a count."""

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _same_shape(outputs, targets)
    y = targets.astype(outputs.dtype)
    return _sum_trailing(y * outputs - jnp.exp(outputs) - gammaln(y + 1))

  return Likelihood(predict, log_prob)
