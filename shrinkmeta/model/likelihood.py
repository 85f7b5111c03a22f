"""Likelihoods p(y_n | x_n, theta): a network, and the density of the targets given its outputs.

N is the number of examples, C the number of classes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from shrinkmeta import validate
from shrinkmeta.kinds import is_array, shown
from shrinkmeta.model.outputs import in_range, labels_of, one_array, same_shape, sum_trailing

PyTree = Any
Predict = Callable[[PyTree, PyTree], jax.Array]  # (theta, inputs [N, ...]) -> outputs [N, ...]


class Likelihood(NamedTuple):
  """A likelihood in two parts, so that Gauss-Newton knows where the network ends.

      log p(y_n | x_n, theta) = log_prob(predict(theta, inputs), targets)_n

  Attributes:
    predict: (theta, inputs) -> outputs [N, ...]; theta is a pytree of parameters, the leaves of
      inputs are [N, ...].
    log_prob: (outputs [N, ...], targets) -> [N]; the leaves of targets are [N, ...]. Entry n may
      depend on example n alone.

  >>> laplace = Likelihood(lambda theta, x: x * theta["slope"], lambda f, y: -jnp.abs(y - f))
  >>> laplace.log_prob(laplace.predict({"slope": 2.0}, jnp.ones(2)), jnp.zeros(2))
  Array([-2., -2.], dtype=float32)
  """

  predict: Predict
  log_prob: Callable[[jax.Array, PyTree], jax.Array]


def check_likelihood(name: str, likelihood: Any) -> None:
  """Raise TypeError unless `likelihood` is a Likelihood of two functions.

  Args:
    name: the argument, as the caller knows it.
    likelihood: what was passed.

  Raises:
    TypeError: it is something else, such as the network's function alone.

  >>> check_likelihood("likelihood", gaussian(lambda theta, x: x * theta["slope"]))
  """
  validate.instance(
    name,
    likelihood,
    Likelihood,
    "a shrinkmeta.Likelihood(predict, log_prob)",
    "Choose the density of the targets: sm.gaussian(predict), sm.categorical(predict), ...; "
    f"predict is {_PREDICT}.",
  )
  validate.function(f"{name}.predict", likelihood.predict, _PREDICT)
  validate.function(f"{name}.log_prob", likelihood.log_prob, "(outputs [N, ...], targets) -> [N]")


_PREDICT = "(theta, inputs) -> outputs [N, ...]"


def in_precision(likelihood: Likelihood, dtype: jax.typing.DTypeLike) -> Likelihood:
  """Compute the network in another precision, such as bfloat16, and nothing else.

  Floating leaves of theta and of the inputs are cast to `dtype` before `predict`. The outputs are
  cast back to theta's dtype. Gradients and curvature products follow through these casts, and
  parameters, log_prob and solves keep their dtype.

  Args:
    likelihood: with outputs [N, ...].
    dtype: a floating dtype.

  Returns:
    A Likelihood with outputs of the same shapes.

  Raises:
    TypeError: not a Likelihood, or not a dtype.
    ValueError: the dtype is not floating.

  >>> half = in_precision(gaussian(lambda theta, x: x * theta["slope"]), jnp.bfloat16)
  >>> half.predict({"slope": jnp.float32(1.001)}, jnp.ones(1))  # 1.001 is 1 in bfloat16
  Array([1.], dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  try:
    floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError as error:
    raise TypeError(f"dtype must be a dtype; got {shown(dtype)}.") from error
  if not floating:
    raise ValueError(f"dtype must be floating, such as jnp.bfloat16; got {jnp.dtype(dtype)}.")

  def cast(tree: PyTree) -> PyTree:
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if floating(x) else x, tree)

  def predict(theta: PyTree, inputs: PyTree) -> jax.Array:
    if not (leaves := jax.tree.leaves(theta)):
      raise ValueError(f"theta has no arrays; got {shown(theta)}.")
    wide = jnp.result_type(leaves[0])
    return jax.tree.map(lambda x: x.astype(wide), likelihood.predict(cast(theta), cast(inputs)))

  return likelihood._replace(predict=predict)


def gaussian(predict: Predict, scale: jax.typing.ArrayLike = 1.0) -> Likelihood:
  """A normal density of the targets around the network's outputs.

      y ~ N(f, scale^2),  log p = -((y - f) / scale)^2 / 2 - log scale - log(2 pi) / 2

  summed over the axes [...] after N.

  Args:
    predict: (theta, inputs) -> f [N, ...], the mean.
    scale: the standard deviation, in the unit of y: one number [], or one for each output, an array
      that broadcasts against [...]. A standard deviation of each example is data and belongs in the
      targets: let targets be (values, scales) and write `Likelihood(predict, log_prob)`.

  Returns:
    A Likelihood whose targets are [N, ...], of the shape of the outputs.

  Raises:
    TypeError: `predict` is not a function, or `scale` is not an array.
    ValueError: a scale is not positive.

  >>> likelihood = gaussian(lambda theta, x: x * theta["slope"], scale=0.5)
  >>> likelihood.log_prob(jnp.zeros(2), jnp.array([0.0, 0.5]))
  Array([-0.226, -0.726], dtype=float32)
  """
  validate.function("predict", predict, _PREDICT)
  validate.array("scale", scale, "a positive number or an array of them")
  if (value := validate.known(scale)) is not None and not (value > 0).all():
    raise ValueError(f"scale is a standard deviation and must be positive; got {value}.")

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    same_shape(outputs, targets)
    s, one = jnp.asarray(scale, outputs.dtype), (1, *outputs.shape[1:])
    aligned = zip(s.shape[::-1], one[::-1], strict=False)
    if s.ndim > len(one) or any(a not in (1, b) for a, b in aligned):
      raise ValueError(
        f"scale has shape {s.shape}; it must broadcast against the outputs of one example, shape "
        f"{one[1:]}. Scales of examples belong in the targets, with a Likelihood of your own."
      )
    residual = (targets - outputs) / s
    return sum_trailing(-0.5 * jnp.square(residual) - jnp.log(s) - 0.5 * math.log(2 * math.pi))

  return Likelihood(predict, log_prob)


def gaussian_with_scale(
  predict: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
) -> Likelihood:
  """A normal density whose standard deviation is predicted or learned too.

      y ~ N(f, s^2),  outputs [N, ..., 2]: (f / s^2, -1 / (2 s^2))

  The outputs are the natural parameters. log p is concave in them, so that Gauss-Newton stays
  positive semi-definite. `mean_and_scale` turns them into (f, s). While s is held fixed, the
  variance of f is s^4 times the variance of f / s^2.

  Args:
    predict: (theta, inputs) -> (f [N, ...], log s); log s broadcasts against f. If log s is a
      parameter of its own, give its module sigma = 0: all tasks then share it, and it is learned as
      part of phi.

  Returns:
    A Likelihood whose targets are [N, ...], of the shape of f.

  Raises:
    TypeError: `predict` is not a function, or does not return a pair.

  >>> predict = lambda theta, x: (x * theta["slope"], theta["log_scale"])
  >>> likelihood = gaussian_with_scale(predict)
  >>> likelihood.predict({"slope": 3.0, "log_scale": 0.0}, jnp.ones(1))
  Array([[ 3. , -0.5]], dtype=float32)
  """
  validate.function("predict", predict, "(theta, inputs) -> (f [N, ...], log s)")

  def natural(theta: PyTree, inputs: PyTree) -> jax.Array:
    pair = predict(theta, inputs)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_array, pair)):
      raise TypeError(
        f"predict must return a pair of arrays (f [N, ...], log s); it returned {shown(pair)}."
      )
    f, log_s = jnp.asarray(pair[0]), pair[1]
    precision = jnp.exp(-2.0 * jnp.asarray(log_s, f.dtype))
    precision = jnp.maximum(precision, 4 * jnp.finfo(f.dtype).tiny)  # outputs of 0 mean padding
    precision = jnp.broadcast_to(precision, f.shape)
    return jnp.stack([f * precision, -0.5 * precision], -1)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    f, s = mean_and_scale(outputs)
    same_shape(f, targets)
    log_p = -0.5 * jnp.square((targets - f) / s) - jnp.log(s) - 0.5 * math.log(2 * math.pi)
    return sum_trailing(log_p)

  return Likelihood(natural, log_prob)


def mean_and_scale(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean and the standard deviation in the outputs of `gaussian_with_scale`.

  Args:
    outputs: [N, ..., 2], (f / s^2, -1 / (2 s^2)).

  Returns:
    (f [N, ...], s [N, ...]); (0, 1) for padding, whose outputs are 0.

  Raises:
    TypeError: not an array.
    ValueError: the last axis does not have two entries.

  >>> mean_and_scale(jnp.array([[3.0, -0.5]]))
  (Array([3.], dtype=float32), Array([1.], dtype=float32))
  """
  one_array("outputs", outputs)
  if jnp.ndim(outputs) == 0 or jnp.shape(outputs)[-1] != 2:
    raise ValueError(f"outputs must have the shape [N, ..., 2]; got {jnp.shape(outputs)}.")
  precision = -2.0 * outputs[..., 1]
  precision = jnp.where(precision == 0, 1.0, precision)  # padding, which is 0
  return outputs[..., 0] / precision, jax.lax.rsqrt(precision)


def categorical(predict: Predict) -> Likelihood:
  """A categorical density of integer labels, given logits.

      y ~ Categorical(softmax(f)),  log p = f_y - log sum_c exp f_c

  summed over the axes [...] between N and C.

  Args:
    predict: (theta, inputs) -> f, logits [N, ..., C].

  Returns:
    A Likelihood whose targets are integers [N, ...] from 0 to C - 1. A label out of range is a
    ValueError outside jit. Under jit it makes the log-probability of that example NaN, and the
    learners report its task as failed and leave it out.

  Raises:
    TypeError: `predict` is not a function.

  >>> likelihood = categorical(lambda theta, x: x @ theta["kernel"])
  >>> likelihood.log_prob(jnp.zeros([2, 4]), jnp.array([0, 3]))
  Array([-1.386, -1.386], dtype=float32)
  """
  validate.function("predict", predict, _PREDICT)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    one_array("outputs", outputs)
    one_array("targets", targets)
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
    valid = (targets >= 0) & (targets < classes)
    # A label out of range chooses all classes, times NaN, so that the gradient is NaN as well.
    chosen = jax.nn.one_hot(targets, classes, dtype=bool) | ~valid[..., None]
    picked = jnp.sum(jnp.where(chosen, jax.nn.log_softmax(outputs), 0.0), -1)  # logits may be -inf
    return sum_trailing(picked * jnp.where(valid, 1.0, jnp.nan))

  return Likelihood(predict, log_prob)


def bernoulli(predict: Predict) -> Likelihood:
  """A Bernoulli density of binary targets, given logits.

      y ~ Bernoulli(sigmoid(f)),  log p = y f - log(1 + exp f)

  summed over the axes [...] after N.

  Args:
    predict: (theta, inputs) -> f, logits [N, ...].

  Returns:
    A Likelihood whose targets are [N, ...], from 0 to 1. A target out of range, such as a label -1,
    is a ValueError outside jit, and under jit makes the log-probability of that example NaN.

  Raises:
    TypeError: `predict` is not a function.

  >>> bernoulli(lambda theta, x: x @ theta["kernel"]).log_prob(jnp.zeros(2), jnp.array([0, 1]))
  Array([-0.693, -0.693], dtype=float32)
  """
  validate.function("predict", predict, _PREDICT)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    same_shape(outputs, targets)
    y = in_range(targets, outputs.dtype, 1.0, "between 0 and 1")
    return sum_trailing(y * outputs - jax.nn.softplus(outputs))

  return Likelihood(predict, log_prob)


def poisson(predict: Predict) -> Likelihood:
  """A Poisson density of counts, given log rates.

      y ~ Poisson(exp f),  log p = y f - exp f - log y!

  summed over the axes [...] after N.

  Args:
    predict: (theta, inputs) -> f, log rates [N, ...].

  Returns:
    A Likelihood whose targets are [N, ...], at least 0. A negative target is a ValueError outside
    jit, and under jit makes the log-probability of that example NaN.

  Raises:
    TypeError: `predict` is not a function.

  >>> poisson(lambda theta, x: x @ theta["kernel"]).log_prob(jnp.zeros(2), jnp.array([0, 2]))[1]
  Array(-1.693, dtype=float32)
  """
  validate.function("predict", predict, _PREDICT)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    same_shape(outputs, targets)
    y = in_range(targets, outputs.dtype, math.inf, "counts, not negative")
    return sum_trailing(y * outputs - jnp.exp(outputs) - gammaln(y + 1))

  return Likelihood(predict, log_prob)
