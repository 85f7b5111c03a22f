"""Variants of likelihoods: constants, random networks, lower precision, a predicted scale."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import is_array, shown
from shrinkmeta.model.likelihood import (
  Likelihood,
  Predict,
  check_likelihood,
  same_shape,
  sum_trailing,
)
from shrinkmeta.model.outputs import one_array

PyTree = Any


class WithConstants:
  """The function (theta, inputs) -> predict(theta, inputs, constants).

  Attributes:
    predict: (theta, inputs, constants) -> outputs [N, ...].
    constants: a pytree of arrays. No derivative with respect to them is taken.
  """

  def __init__(self, predict: Predict, constants: PyTree):
    self.predict, self.constants = predict, jax.lax.stop_gradient(constants)
    self.random = getattr(predict, "random", False)

  def __call__(self, theta: PyTree, inputs: PyTree, **key: jax.Array) -> jax.Array:
    return self.predict(theta, inputs, self.constants, **key)


def with_constants(likelihood: Likelihood, constants: PyTree) -> Likelihood:
  """Return the likelihood as a function of (theta, inputs) alone.

  Args:
    likelihood: its predict takes `constants` as a third argument, unless they are None.
    constants: a pytree of arrays of any dtype, or None.

  Returns:
    A Likelihood whose predict is (theta, inputs) -> predict(theta, inputs, constants).

  Raises:
    TypeError: `likelihood` is no Likelihood, or a constant is no array. Or predict takes constants
      but `constants` is None, or `constants` are given but predict does not take them.

  >>> from shrinkmeta.model.likelihood import gaussian
  >>> scaled = gaussian(lambda theta, x, constants: x * theta["w"] * constants["unit"])
  >>> with_constants(scaled, {"unit": jnp.array(2.0)}).predict({"w": 3.0}, jnp.ones(1))
  Array([6.], dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  takes = _num_arguments(likelihood.predict)
  if constants is None:
    if takes == 3:
      raise TypeError(
        "predict takes (theta, inputs, constants), and there are no constants. Pass them: "
        "learner.init(params, constants=...), or the keyword constants= of a function of one task."
      )
    return likelihood
  if takes == 2:
    raise TypeError(
      "There are constants, and predict takes (theta, inputs). Let it take them: predict(theta, "
      "inputs, constants)."
    )
  for name, leaf in validate.leaves_with_names(constants, "constants"):
    validate.array(name, leaf, "an array", numbers=False)
  return likelihood._replace(predict=WithConstants(likelihood.predict, constants))


def _num_arguments(predict: Predict) -> int | None:
  """How many positional arguments `predict` needs; None if its signature does not say."""
  try:
    parameters = inspect.signature(predict).parameters.values()
  except (TypeError, ValueError):
    return None
  parameters = [p for p in parameters if p.name != "key"]  # of a random network
  positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  if any(p.kind == p.VAR_POSITIONAL for p in parameters):
    return None
  needed = [p for p in positional if p.default is p.empty]
  return len(needed) if len(needed) == len(positional) else None


class Random:
  """A function predict(theta, inputs, [constants,] key=None) of a random network.

  Attributes:
    predict: the function. Without a key it is the deterministic network.
    random: always True. `is_random` looks for this attribute.
  """

  random = True

  def __init__(self, predict: Predict):
    self.predict = predict
    functools.update_wrapper(self, predict)

  def __call__(self, *arguments: PyTree, key: jax.Array | None = None) -> jax.Array:
    return self.predict(*arguments) if key is None else self.predict(*arguments, key=key)


def with_randomness(likelihood: Likelihood) -> Likelihood:
  """Say that `predict` takes a random key, as a network with dropout does.

      predict(theta, inputs, key=None),   or predict(theta, inputs, constants, key=None)

  Without a key, predict must return the outputs of the deterministic network. With a key it draws,
  for example, a dropout mask. Algorithms without an implicit gradient (`maml`, `fomaml`, `reptile`,
  `sigma_maml`, `fine_tuning`, ...) use the random network. They derive keys from the key of
  `learner.update`, `adapt` or `adapt_tasks`: separate keys for every task, every inner step, and
  every batch in the objective of phi. No key is used twice. Without a key they use the
  deterministic network, and `update` logs a warning.

  A posterior mode is defined for one fixed network, and every key makes another network. So
  learners with an implicit gradient or the evidence (`imaml`, `sigma_imaml`, `sigma_reptile`,
  `empirical_bayes`) use the deterministic network. So do `sm.map_estimate`, `sm.log_evidence` and
  `sm.predict_tasks`. `sm.evaluate` and `sm.choose_modules` adapt as the learner does, and compute
  the losses of their results with the deterministic network.

  Args:
    likelihood: its predict has the keyword `key`, with the default None.

  Returns:
    A Likelihood that learners pass keys to.

  Raises:
    TypeError: `likelihood` is not a Likelihood, or its predict has no keyword `key` with the
      default None.

  >>> from shrinkmeta.model.likelihood import gaussian
  >>> def predict(theta, x, key=None):
  ...   keep = 1.0 if key is None else jax.random.bernoulli(key, 0.5, x.shape) / 0.5
  ...   return (x * keep) @ theta["w"]
  >>> likelihood = with_randomness(gaussian(predict))
  >>> likelihood.predict({"w": jnp.ones(4)}, jnp.ones((1, 4)))
  Array([4.], dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  try:
    key = inspect.signature(likelihood.predict).parameters.get("key")
  except (TypeError, ValueError):
    key = None
  if key is None or key.default is not None:
    raise TypeError(
      "predict must have the keyword key=None: predict(theta, inputs, key=None), or predict(theta, "
      f"inputs, constants, key=None); got {shown(likelihood.predict)}."
    )
  return likelihood._replace(predict=Random(likelihood.predict))


def is_random(likelihood: Likelihood) -> bool:
  """Return whether `predict` takes a key: see `with_randomness`."""
  return getattr(likelihood.predict, "random", False)


def deterministic(likelihood: Likelihood) -> Likelihood:
  """Return the likelihood of the deterministic network, which takes no key."""
  predict = likelihood.predict
  return likelihood._replace(predict=predict.predict) if isinstance(predict, Random) else likelihood


def warn_without_key() -> None:
  """Warn that a random network runs without a key."""
  warnings.warn(
    "predict is a random network (sm.with_randomness), and there is no key: the deterministic "
    "network is used. Pass one: learner.update(state, tasks, key), or sm.fit(..., key=key).",
    stacklevel=4,
  )


def with_key(likelihood: Likelihood, key: jax.Array | None) -> Likelihood:
  """Return the likelihood of a random network at one key; any other likelihood is unchanged."""
  if key is None or not is_random(likelihood):
    return likelihood
  return likelihood._replace(predict=functools.partial(likelihood.predict, key=key))


def in_precision(likelihood: Likelihood, dtype: jax.typing.DTypeLike) -> Likelihood:
  """Return a likelihood whose network is computed in another precision, such as bfloat16.

  The floating leaves of theta, of the inputs and of the constants are cast to `dtype` before
  `predict`. The outputs are cast back to the dtype of theta. Gradients and curvature products go
  through these casts. All else, such as the parameters, log_prob and linear solves, keeps its
  dtype.

  Args:
    likelihood: a Likelihood with outputs [N, ...].
    dtype: the floating dtype in which `predict` is computed.

  Returns:
    A Likelihood with outputs of the same shapes.

  Raises:
    TypeError: if `likelihood` is not a Likelihood, or `dtype` is not a dtype.
    ValueError: if the dtype is not floating.

  >>> from shrinkmeta.model.likelihood import gaussian
  >>> half = in_precision(gaussian(lambda theta, x: x * theta["slope"]), jnp.bfloat16)
  >>> half.predict({"slope": jnp.float32(1.001)}, jnp.ones(1))  # 1.001 is 1 in bfloat16
  Array([1.], dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  dtype = scalars.floating_dtype("dtype", dtype)

  def cast(tree: PyTree) -> PyTree:
    floating = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if floating(x) else x, tree)

  @functools.wraps(likelihood.predict)
  def predict(theta: PyTree, inputs: PyTree, *constants: PyTree, **key: jax.Array) -> jax.Array:
    if not (leaves := jax.tree.leaves(theta)):
      raise ValueError(f"theta has no arrays; got {shown(theta)}.")
    wide = jnp.result_type(leaves[0])
    outputs = likelihood.predict(cast(theta), cast(inputs), *cast(constants), **key)
    return jax.tree.map(lambda x: x.astype(wide), outputs)

  return likelihood._replace(predict=Random(predict) if is_random(likelihood) else predict)


def gaussian_with_scale(
  predict: Callable[[PyTree, PyTree], tuple[jax.Array, jax.Array]],
) -> Likelihood:
  """Return the likelihood of normal targets whose standard deviation s is predicted or learned.

      y ~ N(f, s^2),  outputs [N, ..., 2]: (f / s^2, -1 / (2 s^2))

  The outputs are the natural parameters of the normal density. log p is concave in them, so the
  Gauss-Newton curvature is positive semi-definite. `mean_and_scale` turns the outputs into (f, s).
  `Posterior.predictive` gives variances of the outputs. If the task does not adapt s, the variance
  of f is s^4 times that of the output f / s^2.

  Args:
    predict: (theta, inputs) -> (f [N, ...], log s), or with constants as a third argument. log s
      broadcasts against f. If log s is a parameter, make it a module of its own with sigma = 0. All
      tasks then share log s, and it is learned as part of phi.

  Returns:
    A Likelihood whose targets are [N, ...], with the shape of f.

  Raises:
    TypeError: if `predict` is not a function. The predict of the result raises TypeError if the
      user's `predict` does not return a pair of arrays.

  >>> predict = lambda theta, x: (x * theta["slope"], theta["log_scale"])
  >>> likelihood = gaussian_with_scale(predict)
  >>> likelihood.predict({"slope": 3.0, "log_scale": 0.0}, jnp.ones(1))
  Array([[ 3. , -0.5]], dtype=float32)
  """
  validate.function("predict", predict, "(theta, inputs) -> (f [N, ...], log s)")

  @functools.wraps(predict)  # it keeps whether predict takes constants or a key
  def natural(theta: PyTree, inputs: PyTree, *constants: PyTree, **key: jax.Array) -> jax.Array:
    pair = predict(theta, inputs, *constants, **key)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_array, pair)):
      raise TypeError(
        f"predict must return a pair of arrays (f [N, ...], log s); it returned {shown(pair)}."
      )
    f, log_s = map(jnp.asarray, pair)
    sizes = zip(log_s.shape[::-1], f.shape[::-1], strict=False)
    fits = log_s.ndim <= f.ndim and all(a in (1, b) for a, b in sizes)
    if not fits or not jnp.issubdtype(f.dtype, jnp.floating):
      raise ValueError(
        "predict must return (f, log s), floats f [N, ...] and a log s that broadcasts against "
        f"them; it returned {f.dtype}{list(f.shape)} and {log_s.dtype}{list(log_s.shape)}."
      )
    # The precision is not 0, which means padding, and not inf, which would make the outputs NaN.
    limits = jnp.finfo(f.dtype)
    most, least = (-0.5 * math.log(float(x)) for x in (4 * limits.tiny, limits.max / 16))
    precision = jnp.exp(-2.0 * jnp.clip(log_s.astype(f.dtype), least, most))
    precision = jnp.broadcast_to(precision, f.shape)
    return jnp.stack([f * precision, -0.5 * precision], -1)

  return Likelihood(natural, log_prob_with_scale)


def log_prob_with_scale(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Return the log density [N] of targets [N, ...] under the outputs of `gaussian_with_scale`."""
  f, s = mean_and_scale(outputs)
  same_shape(f, targets)
  log_p = -0.5 * jnp.square((targets - f) / s) - jnp.log(s) - 0.5 * math.log(2 * math.pi)
  return sum_trailing(log_p)


def mean_and_scale(outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the mean and the standard deviation that the outputs of `gaussian_with_scale` encode.

  Args:
    outputs: [N, ..., 2], the natural parameters (f / s^2, -1 / (2 s^2)).

  Returns:
    (f [N, ...], s [N, ...]). For padding, whose outputs are 0, (f, s) is (0, 1).

  Raises:
    TypeError: if `outputs` is not an array.
    ValueError: if the last axis does not have two entries.

  >>> mean_and_scale(jnp.array([[3.0, -0.5]]))
  (Array([3.], dtype=float32), Array([1.], dtype=float32))
  """
  one_array("outputs", outputs)
  if jnp.ndim(outputs) == 0 or jnp.shape(outputs)[-1] != 2:
    raise ValueError(f"outputs must have the shape [N, ..., 2]; got {jnp.shape(outputs)}.")
  precision = -2.0 * outputs[..., 1]
  precision = jnp.where(precision == 0, 1.0, precision)  # the outputs of padding are 0
  return outputs[..., 0] / precision, jax.lax.rsqrt(precision)
