"""Measure how well predicted probabilities and standard deviations agree with what happens.

N is the number of examples, C the number of classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import scipy  # loads scipy.special at its first use

from shrinkmeta.checks import scalars, validate
from shrinkmeta.model.outputs import labels_of
from shrinkmeta.model.tasks import divisor


class Calibration(NamedTuple):
  """How well N predictions of a class are calibrated; see `calibration`.

  Attributes:
    accuracy: [] share of examples whose most probable class is the right one.
    nll: [] mean of -log p of the right class, nats per example.
    brier: [] mean over examples of sum_c (p_c - [c is right])^2, 0 to 2.
    ece: [] expected calibration error, 0 to 1.

  >>> found = calibration(jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0]))
  >>> float(found.accuracy), float(found.ece)
  (1.0, 0.25)
  """

  accuracy: jax.Array
  nll: jax.Array
  brier: jax.Array
  ece: jax.Array


def calibration(
  log_probabilities: jax.Array,
  targets: jax.Array,
  mask: jax.Array | None = None,
  bins: int = 15,
) -> Calibration:
  """Compute accuracy, negative log-likelihood, Brier score and expected calibration error.

  The confidence of a prediction is its largest probability. The calibration error sorts predictions
  by confidence into bins b of equal width over (0, 1], with N_b predictions in bin b:

      ece = sum_b N_b / N |accuracy of bin b - mean confidence of bin b|

  Args:
    log_probabilities: [N, C], log-probabilities or logits. Each row is normalised by log-softmax.
    targets: [N] integers from 0 to C - 1, the right classes. Outside jit a class out of range
      raises ValueError. Under jit it makes all four results NaN.
    mask: [N], 0 for examples that do not count, or weights. None: all examples count once.
    bins: the number of bins.

  Returns:
    A Calibration of four numbers []. They are NaN if a log-probability that counts is NaN, and 0 if
    no example counts.

  Raises:
    TypeError: an argument is not an array, or `bins` is not an integer.
    ValueError: the shapes are wrong, the targets are not integers, or a weight is negative.

  References: Brier, 1950; Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks,
    arXiv 1706.04599.

  >>> sure = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2]]))
  >>> found = calibration(sure, jnp.array([0, 1]))
  >>> [round(float(x), 3) for x in found]  # accuracy 0.5 at a confidence of 0.8
  [0.5, 0.916, 0.68, 0.3]
  """
  validate.array("log_probabilities", log_probabilities, "an array [N, C]")
  validate.array("targets", targets, "an array [N] of integers")
  bins = validate.integer("bins", bins, least=1)
  log_probabilities, targets = _wide(log_probabilities), jnp.asarray(targets)
  if log_probabilities.ndim != 2 or targets.shape != log_probabilities.shape[:1]:
    raise ValueError(
      f"log_probabilities must be [N, C] and targets [N]; got {log_probabilities.shape} and "
      f"{targets.shape}."
    )
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f"targets must be integers, the classes; got dtype {targets.dtype}.")
  weights = _weights(mask, log_probabilities, targets.shape)
  classes = log_probabilities.shape[1]
  value, kept = validate.known(targets), validate.known(weights)
  if value is not None and (mask is None or kept is not None):
    value = value if kept is None else value[kept > 0]
    if ((value < 0) | (value >= classes)).any():
      raise ValueError(f"targets must lie in 0..{classes - 1}; got {value.min()}..{value.max()}.")
  labels = labels_of(targets)
  in_range = (labels >= 0) & (labels < classes)
  log_p = jnp.where(in_range[:, None], jax.nn.log_softmax(log_probabilities), jnp.nan)
  total = _total(weights)
  mean = lambda x: jnp.sum(jnp.where(weights != 0, weights * x, 0.0)) / total
  right = jax.nn.one_hot(labels, log_p.shape[1], dtype=log_p.dtype)
  p = jnp.exp(log_p)
  valid = ~jnp.isnan(log_p).any(1)
  correct = jnp.where(valid, jnp.argmax(log_p, 1) == labels, jnp.nan).astype(log_p.dtype)
  confidence = jnp.max(p, 1)
  place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
  miss = jnp.where(weights != 0, weights * (correct - confidence), 0.0)
  # `jax.ops.segment_sum` adds one number after another, which loses digits; a sum over N does not.
  gap = jax.lax.map(lambda b: jnp.sum(jnp.where(place == b, miss, 0.0)), jnp.arange(bins))
  nll = -jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
  brier = jnp.sum(jnp.square(p - right), 1)
  return Calibration(mean(correct), mean(nll), mean(brier), jnp.sum(jnp.abs(gap)) / total)


def coverage(
  mean: jax.Array,
  sd: jax.Array,
  targets: jax.Array,
  level: float = 0.95,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Return the share of targets within the central interval of N(mean, sd^2).

      |target - mean| <= sd * Phi^-1((1 + level) / 2)

  Calibrated predictions cover a share of about `level`.

  Args:
    mean: [N, ...], the means of the predictions.
    sd: [N, ...], their standard deviations, in the unit of the targets.
    targets: [N, ...].
    level: the probability of the interval, between 0 and 1.
    mask: [N, ...], 0 for targets that do not count, or weights; axes after the first may have the
      size 1. None: all targets count once.

  Returns:
    A number []. It is NaN if a mean, sd or target that counts is NaN, or if an sd that counts is
    negative. It is 0 if no target counts.

  Raises:
    TypeError: an argument is not an array, or `level` is not a number.
    ValueError: the shapes are wrong, the level is out of range, or a weight is negative.

  >>> coverage(jnp.zeros(2), jnp.ones(2), jnp.array([1.9, 2.0]))
  Array(0.5, dtype=float32)
  """
  for name, value in (("mean", mean), ("sd", sd), ("targets", targets)):
    validate.array(name, value, "an array [N, ...]")
  level = scalars.number("level", level)
  mean, sd, targets = _wide(mean), _wide(sd), _wide(targets)
  if not mean.shape == sd.shape == targets.shape:
    raise ValueError(
      f"Shapes must agree; got mean {mean.shape}, sd {sd.shape} and targets {targets.shape}."
    )
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1; got {level}.")
  weights = _weights(mask, mean, mean.shape)
  # Phi^-1 in float64: in float32 (1 + level) / 2 may be 1.
  half = jnp.asarray(scipy.special.ndtri(0.5 + 0.5 * level), sd.dtype) * sd
  distance = jnp.abs(targets - mean)
  unknown = jnp.isnan(distance) | jnp.isnan(half) | (sd < 0)
  inside = jnp.where(unknown, jnp.nan, distance <= half).astype(weights.dtype)
  return jnp.sum(jnp.where(weights != 0, inside * weights, 0.0)) / _total(weights)


def _wide(x: jax.typing.ArrayLike) -> jax.Array:
  """Return floats of at least 32 bits: a sum of many 16-bit numbers stops growing, or overflows."""
  return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _weights(mask: Any, like: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Return `mask` as floats of the shape `shape`, or ones if it is None.

  Raise TypeError or ValueError if `mask` does not fit the shape or has a negative weight.
  """
  if mask is None:
    return jnp.ones(shape, like.dtype)
  validate.array("mask", mask, f"an array of shape {shape}, or None")
  if jnp.issubdtype(jnp.result_type(mask), jnp.complexfloating):
    raise TypeError(f"mask must be bool, integer or float; got {jnp.result_type(mask)}.")
  rest = zip(jnp.shape(mask)[1:], shape[1:], strict=False)
  fits = jnp.ndim(mask) == len(shape) and jnp.shape(mask)[:1] == shape[:1]
  if not fits or any(a not in (1, b) for a, b in rest):
    raise ValueError(
      f"mask must have shape {shape}, one weight for each target; got {jnp.shape(mask)}."
    )
  if (value := validate.known(mask)) is not None and not (value >= 0).all():
    raise ValueError(f"mask must be 0, 1 or a positive weight; got {value.min()}.")
  return jnp.broadcast_to(jnp.asarray(mask).astype(like.dtype), shape)


def _total(weights: jax.Array) -> jax.Array:
  """Return the divisor [] of a weighted sum: the sum of the weights, or 1 if that is 0.

  If a weight is NaN, so is the divisor.
  """
  total = jnp.sum(weights)
  return jnp.where(jnp.isnan(total), jnp.nan, divisor(total))
