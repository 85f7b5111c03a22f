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


def in_precision(likelihood: Likelihood, dtype: jax.typing.DTypeLike) -> Likelihood:
  """The network computed in `dtype`, bfloat16 say; parameters, log_prob and solves as they were.

  Floating leaves of theta and of the inputs are cast on the way in, the outputs are cast back to
  theta's dtype on the way out, and so, through the casts, are gradients and curvature products.
  """

  def cast(tree: PyTree) -> PyTree:
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if floating(x) else x, tree)

  def predict(theta: PyTree, inputs: PyTree) -> jax.Array:
    wide = jnp.result_type(jax.tree.leaves(theta)[0])
    return likelihood.predict(cast(theta), cast(inputs)).astype(wide)

  return likelihood._replace(predict=predict)


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


def _in_range(targets: jax.Array, dtype: Any, most: float, what: str) -> jax.Array:
  """The targets as floats, NaN where they are not in [0, most]; ValueError where that is known."""
  if (value := validate.known(targets)) is not None and ((value < 0) | (value > most)).any():
    raise ValueError(f"targets must be {what}; got {value.min()} to {value.max()}.")
  y = jnp.asarray(targets).astype(dtype)
  return jnp.where((y >= 0) & (y <= most), y, jnp.nan)


def gaussian(predict: Predict, scale: jax.typing.ArrayLike = 1.0) -> Likelihood:
  """y ~ N(f, scale^2): -((y - f) / scale)^2 / 2 - log scale - log(2 pi) / 2, summed over [...].

  Args:
    predict: outputs f [N, ...], the mean.
    scale: standard deviation, in the unit of y; one number, or one an output, which broadcasts
      against [...]. One of each example is data, and belongs into the targets: with
      y = (values, scales), write `Likelihood(predict, log_prob)`.
  """
  if (value := validate.known(scale)) is not None and not (value > 0).all():
    raise ValueError(f"scale is a standard deviation and must be positive; got {value}.")

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _same_shape(outputs, targets)
    s, one = jnp.asarray(scale, outputs.dtype), (1, *outputs.shape[1:])
    aligned = zip(s.shape[::-1], one[::-1], strict=False)
    if s.ndim > len(one) or any(a not in (1, b) for a, b in aligned):
      raise ValueError(
        f"scale has shape {s.shape}; it must broadcast against the outputs of one example, shape "
        f"{one[1:]}. Scales of examples belong into the targets, with a Likelihood of your own."
      )
    residual = (targets - outputs) / s
    return _sum_trailing(-0.5 * jnp.square(residual) - jnp.log(s) - 0.5 * math.log(2 * math.pi))

  return Likelihood(predict, log_prob)


def gaussian_with_scale(
  predict: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
) -> Likelihood:
  """y ~ N(f, s^2), s predicted too: one number learnt for all, or one an output.

  The outputs [N, ..., 2] are the natural parameters (f / s^2, -1 / (2 s^2)), in which log p is
  concave, so that Gauss-Newton stays positive semi-definite; `mean_and_scale` turns them back, and
  with s held a variance of f / s^2 times s^4 is one of f.

  Args:
    predict: (theta, inputs) -> (f [N, ...], log s, which broadcasts against f). Where log s is a
      parameter of its own, give its module sigma = 0: it is then shared and learnt as part of phi.

  >>> import shrinkmeta as sm
  >>> predict = lambda theta, x: (x * theta["slope"], theta["log_scale"])
  >>> likelihood = sm.gaussian_with_scale(predict)
  >>> likelihood.predict({"slope": 3.0, "log_scale": 0.0}, jnp.ones(1))
  Array([[ 3. , -0.5]], dtype=float32)
  """

  def natural(theta: PyTree, inputs: PyTree) -> jax.Array:
    f, log_s = predict(theta, inputs)
    precision = jnp.exp(-2.0 * jnp.asarray(log_s, f.dtype))
    precision = jnp.maximum(precision, 4 * jnp.finfo(f.dtype).tiny)  # 0, of its half, is padding's
    precision = jnp.broadcast_to(precision, f.shape)
    return jnp.stack([f * precision, -0.5 * precision], -1)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    f, s = mean_and_scale(outputs)
    _same_shape(f, targets)
    log_p = -0.5 * jnp.square((targets - f) / s) - jnp.log(s) - 0.5 * math.log(2 * math.pi)
    return _sum_trailing(log_p)

  return Likelihood(natural, log_prob)


def mean_and_scale(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(f, s), [N, ...] each, from the outputs [N, ..., 2] of `gaussian_with_scale`."""
  precision = -2.0 * outputs[..., 1]
  precision = jnp.where(precision == 0, 1.0, precision)  # padding, which is 0
  return outputs[..., 0] / precision, jax.lax.rsqrt(precision)


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
    targets = labels_of(targets)
    in_range = (targets >= 0) & (targets < classes)
    # Out of range all are chosen, times NaN, so that the gradient is NaN as well.
    chosen = jax.nn.one_hot(targets, classes, dtype=bool) | ~in_range[..., None]
    picked = jnp.sum(jnp.where(chosen, jax.nn.log_softmax(outputs), 0.0), -1)  # logits may be -inf
    return _sum_trailing(picked * jnp.where(in_range, 1.0, jnp.nan))

  return Likelihood(predict, log_prob)


def labels_of(targets: jax.typing.ArrayLike) -> jax.Array:
  """Integers wide enough to be compared with a number of classes: for a uint8, 256 would be 0."""
  targets = jnp.asarray(targets)
  return targets if targets.dtype.itemsize >= 4 else targets.astype(jnp.int32)


def bernoulli(predict: Predict) -> Likelihood:
  """y ~ Bernoulli(sigmoid(f)): y f - log(1 + exp f), summed over [...]; y in [0, 1].

  Labels -1 and 1, say, are treated as labels out of range are by `categorical`.
  """

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _same_shape(outputs, targets)
    y = _in_range(targets, outputs.dtype, 1.0, "between 0 and 1")
    return _sum_trailing(y * outputs - jax.nn.softplus(outputs))

  return Likelihood(predict, log_prob)


def poisson(predict: Predict) -> Likelihood:
  """y ~ Poisson(exp f): y f - exp f - log y!, summed over [...]; y a count.

  Negative ones are treated as labels out of range are by `categorical`.
  """

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _same_shape(outputs, targets)
    y = _in_range(targets, outputs.dtype, math.inf, "counts, not negative")
    return _sum_trailing(y * outputs - jnp.exp(outputs) - gammaln(y + 1))

  return Likelihood(predict, log_prob)
