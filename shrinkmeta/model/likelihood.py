"""Likelihoods p(y_n | x_n, theta): a network, and the density of the targets given its outputs.

N is the number of examples, C the number of classes.

To add a likelihood to the library, write a function such as `poisson` in this file. The section
"Add a likelihood" of CONTRIBUTING.md lists the exports and tests to add. docs/own_models.md shows
how users write a likelihood of their own.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from shrinkmeta.checks import validate
from shrinkmeta.model.outputs import check_outputs, in_range, labels_of, log_softmax, one_array
from shrinkmeta.model.tasks import Batch, divisor, num_examples, weights

PyTree = Any
# (theta, inputs [N, ...]) -> outputs [N, ...], or (theta, inputs, constants) -> outputs
Predict = Callable[..., jax.Array]


class Likelihood(NamedTuple):
  """A likelihood in two functions: the network, and the density of the targets given its outputs.

      log p(y_n | x_n, theta) = log_prob(predict(theta, inputs), targets)_n

  The Gauss-Newton curvature needs the derivatives of the two functions separately.

  Attributes:
    predict: (theta, inputs) -> outputs [N, ...]. theta is a pytree of parameters. The leaves of
      inputs are [N, ...]. A network with constants, such as a frozen base, takes them as a third
      argument: (theta, inputs, constants) -> outputs.
    log_prob: (outputs [N, ...], targets) -> [N], in nats. The leaves of targets are [N, ...]. Entry
      n of the result must depend on example n only.

  >>> laplace = Likelihood(lambda theta, x: x * theta["slope"], lambda f, y: -jnp.abs(y - f))
  >>> laplace.log_prob(laplace.predict({"slope": 2.0}, jnp.ones(2)), jnp.zeros(2))
  Array([-2., -2.], dtype=float32)
  """

  predict: Predict
  log_prob: Callable[[jax.Array, PyTree], jax.Array]


def check_likelihood(name: str, likelihood: Any) -> None:
  """Raise TypeError unless `likelihood` is a Likelihood of two functions.

  Args:
    name: the name of the argument, for the error message.
    likelihood: the value of the argument.

  Raises:
    TypeError: if `likelihood` is something else, such as the function of the network alone.

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


def masked_log_prob(likelihood: Likelihood, outputs: jax.Array, batch: Batch) -> jax.Array:
  """Return the log density of one task's examples, given the outputs of the network.

      sum_n mask_n log p(y_n | outputs_n)

  On padding, outputs and targets are set to 0 before log_prob is called. Otherwise an overflow on
  padding would make the gradient NaN (0 * inf), and a label on padding could be out of range.

  Args:
    likelihood: the likelihood, whose log_prob is called.
    outputs: the result of `predict`, leaves [N, ...].
    batch: the examples, leaves [N, ...].

  Returns:
    The log density [], in nats. It is a sum over the examples.

  Raises:
    TypeError: if `predict` returned something other than arrays, or a tuple that log_prob cannot
      read.
    ValueError: if `predict` or log_prob did not return one entry for each example.
  """
  want = jnp.shape(jax.tree.leaves(batch.targets)[0])[:1]
  if not isinstance(outputs, jax.Array) or jnp.shape(outputs)[:1] != want:
    check_outputs(outputs, want[0])
  log_prob = likelihood.log_prob(*without_padding((outputs, batch.targets), batch))
  if (shape := jnp.shape(log_prob)) != want:
    hint = "Sum over the trailing axes." if shape[:1] == want else "Do not sum over the examples."
    raise ValueError(
      f"Likelihood.log_prob must return one number an example, shape {want}; it returned shape "
      f"{shape}. {hint}"
    )
  if batch.mask is None:
    return jnp.sum(log_prob)
  mask = weights(batch, log_prob.dtype)
  return jnp.sum(jnp.where(mask != 0, mask * log_prob, 0.0))  # padding adds 0, not NaN


def mean_nll(likelihood: Likelihood, theta: PyTree, batch: Batch) -> jax.Array:
  """Return the mean over examples of -log p(y_n | x_n, theta), nats per example [].

  Args:
    likelihood: the network and the density of the targets given its outputs.
    theta: the parameters of one task, a pytree of arrays [...].
    batch: the examples of the task, leaves [N, ...].

  Raises:
    ValueError: if the log density has another dtype than theta, because the data or `predict`
      promote it.
  """
  log_p = masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)
  dtype = jnp.result_type(jax.tree.leaves(theta)[0])
  if log_p.dtype != dtype:
    raise ValueError(
      f"log p(D | theta) is {log_p.dtype}, the parameters are {dtype}: data or predict promote it. "
      f"Cast inputs and targets to {dtype}, or the parameters to {log_p.dtype}."
    )
  if batch.mask is None:
    return -log_p / jax.tree.leaves(batch.targets)[0].shape[0]
  return -log_p / divisor(num_examples(batch, log_p.dtype))


def without_padding(tree: PyTree, batch: Batch) -> PyTree:
  """Return `tree`, leaves [N, ...], with the entries of padding set to 0."""
  if batch.mask is None:
    return tree
  keep = weights(batch, bool)
  clear = lambda x: jnp.where(keep.reshape(-1, *[1] * (jnp.ndim(x) - 1)), x, jnp.zeros_like(x))
  return jax.tree.map(clear, tree)


def gaussian(predict: Predict, scale: jax.typing.ArrayLike = 1.0) -> Likelihood:
  """Return the likelihood of targets that are normal around the outputs of the network.

      y ~ N(f, scale^2),  log p = -((y - f) / scale)^2 / 2 - log scale - log(2 pi) / 2

  log p is summed over the axes [...] after N.

  Args:
    predict: (theta, inputs) -> f [N, ...], the mean.
    scale: the standard deviation of y, in the unit of y. It is one number [], or an array that
      broadcasts against [...], with one number for each output. If every example has a standard
      deviation of its own, these are data: let targets be (values, scales) and write
      `Likelihood(predict, log_prob)`.

  Returns:
    A Likelihood whose targets are [N, ...], with the shape of the outputs.

  Raises:
    TypeError: if `predict` is not a function, or `scale` is not an array.
    ValueError: if a scale is not positive.

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
    s = jnp.broadcast_to(s, outputs.shape)
    residual = (targets - outputs) / s
    return sum_trailing(-0.5 * jnp.square(residual) - jnp.log(s) - 0.5 * math.log(2 * math.pi))

  return Likelihood(predict, log_prob)


def categorical(predict: Predict) -> Likelihood:
  """Return the likelihood of integer labels, given the logits that the network returns.

      y ~ Categorical(softmax(f)),  log p = f_y - log sum_c exp f_c

  log p is summed over the axes [...] between N and C.

  Args:
    predict: (theta, inputs) -> f, logits [N, ..., C].

  Returns:
    A Likelihood whose targets are integers [N, ...] from 0 to C - 1. Outside jit, log_prob raises
    ValueError if a label is out of range. Under jit the log-probability of the example is then NaN,
    and learners report its task as failed and leave the task out.

  Raises:
    TypeError: if `predict` is not a function.

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
    # For a label out of range the sum over all classes is multiplied by NaN. The gradient with
    # respect to every logit is then NaN too.
    chosen = jax.nn.one_hot(targets, classes, dtype=bool) | ~valid[..., None]
    # `where` and not a product: a logit may be -inf, and 0 * -inf is NaN.
    picked = jnp.sum(jnp.where(chosen, log_softmax(outputs), 0.0), -1)
    return sum_trailing(picked * jnp.where(valid, 1.0, jnp.nan))

  return Likelihood(predict, log_prob)


def bernoulli(predict: Predict) -> Likelihood:
  """Return the likelihood of binary targets, given the logits that the network returns.

      y ~ Bernoulli(sigmoid(f)),  log p = y f - log(1 + exp f)

  log p is summed over the axes [...] after N.

  Args:
    predict: (theta, inputs) -> f, logits [N, ...].

  Returns:
    A Likelihood whose targets are numbers [N, ...] from 0 to 1. Outside jit, log_prob raises
    ValueError if a target is out of range, such as a label -1. Under jit the log-probability of the
    example is then NaN.

  Raises:
    TypeError: if `predict` is not a function.

  >>> bernoulli(lambda theta, x: x @ theta["kernel"]).log_prob(jnp.zeros(2), jnp.array([0, 1]))
  Array([-0.693, -0.693], dtype=float32)
  """
  validate.function("predict", predict, _PREDICT)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    same_shape(outputs, targets)
    y = in_range(targets, outputs.dtype, 1.0, "between 0 and 1")
    # For f > 0 it is (y - 1) f - log(1 + exp(-f)). A target of 0 or 1 may have an infinite logit.
    up = outputs > 0
    slope = jnp.where(up, y - 1, y)
    linear = slope * jnp.where((slope == 0) & jnp.isinf(outputs), 0.0, outputs)
    return sum_trailing(linear - jax.nn.softplus(jnp.where(up, -outputs, outputs)))

  return Likelihood(predict, log_prob)


def poisson(predict: Predict) -> Likelihood:
  """Return the likelihood of counts, given the log rates that the network returns.

      y ~ Poisson(exp f),  log p = y f - exp f - log y!

  log p is summed over the axes [...] after N. It is computed from u = f - log y, in which the large
  terms of a large count cancel before they are rounded.

  Args:
    predict: (theta, inputs) -> f, log rates [N, ...].

  Returns:
    A Likelihood whose targets are numbers [N, ...] of at least 0. Outside jit, log_prob raises
    ValueError if a target is negative. Under jit the log-probability of the example is then NaN.

  Raises:
    TypeError: if `predict` is not a function.

  >>> poisson(lambda theta, x: x @ theta["kernel"]).log_prob(jnp.zeros(2), jnp.array([0, 2]))[1]
  Array(-1.693, dtype=float32)
  """
  validate.function("predict", predict, _PREDICT)

  def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    same_shape(outputs, targets)
    y = in_range(targets, outputs.dtype, math.inf, "counts, not negative")
    positive = jnp.where(y > 0, y, 1.0)
    u = outputs - jnp.log(positive)
    # A count of 0 has the log-probability 0 at a rate of 0, whose logarithm is -inf. At an infinite
    # rate every count has -inf.
    linear = jnp.where(jnp.isposinf(u) | (y == 0) & jnp.isneginf(u), 0.0, u)
    return sum_trailing(y * linear - positive * jnp.expm1(u) + _log_p_at_best(y, positive))

  return Likelihood(predict, log_prob)


def _log_p_at_best(y: jax.Array, positive: jax.Array) -> jax.Array:
  """Return y log y - y - log y!, the log-probability of a count y at the rate y.

      ~ -log(2 pi y) / 2 - 1 / (12 y) + 1 / (360 y^3) - 1 / (1260 y^5),   for y >= 20 to 1e-12

  Args:
    y: counts [N, ...].
    positive: y, or 1 in place of 0. At y = 0 the result is -1, which makes up for expm1.
  """
  small = jnp.where(y < 20, positive, 1.0)
  exact = y * jnp.log(small) - small - gammaln(jnp.where(y < 20, y, 0.0) + 1)
  large = jnp.where(y < 20, 20.0, y)
  series = 1 / (12 * large) - 1 / (360 * large**3) + 1 / (1260 * large**5)
  return jnp.where(y < 20, exact, -0.5 * jnp.log(2 * jnp.pi * large) - series)


def same_shape(outputs: jax.Array, targets: jax.Array) -> None:
  """Raise an error unless outputs and targets are two arrays of one shape [N, ...]."""
  for name, value in (("outputs", outputs), ("targets", targets)):
    if not isinstance(value, jax.Array):
      one_array(name, value)
  if jnp.shape(outputs) != jnp.shape(targets):
    raise ValueError(
      f"predict returned outputs of shape {jnp.shape(outputs)}, the targets have shape "
      f"{jnp.shape(targets)}; they must be equal (reshape one: broadcasting would pair every "
      "output with every target)."
    )


def sum_trailing(x: jax.Array) -> jax.Array:
  """Sum over all axes but the first: [N, ...] -> [N]."""
  return jnp.sum(x.reshape(x.shape[0], -1), axis=-1)
