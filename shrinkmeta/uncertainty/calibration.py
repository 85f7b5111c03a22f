"""Do predicted probabilities hold? Numbers to read beside accuracy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta import validate
from shrinkmeta.model.likelihood import labels_of
from shrinkmeta.model.tasks import divisor


class Calibration(NamedTuple):
  """Of N predictions of a class; see `calibration`."""

  accuracy: jax.Array  # []
  nll: jax.Array  # [] mean of -log p of the right class, nats
  brier: jax.Array  # [] mean over examples of sum_c (p_c - [c is right])^2, 0 to 2
  ece: jax.Array  # [] expected calibration error, 0 to 1


def calibration(
  log_probabilities: jax.Array,
  labels: jax.Array,
  mask: jax.Array | None = None,
  bins: int = 15,
) -> Calibration:
  """Accuracy, negative log-likelihood, Brier score and expected calibration error.

  The last one sorts predictions by their confidence, the largest probability, into `bins` of equal
  width over (0, 1], and is the mean over examples of |accuracy - mean confidence| of the bin.

  Args:
    log_probabilities: [N, C]; logits are normalised.
    labels: [N] integers. One out of range is a ValueError outside jit, and under it all four are
      NaN.
    mask: [N], 0 for examples that do not count.

  References: Brier, 1950; Guo, Pleiss, Sun, Weinberger, On calibration of modern neural networks,
    arXiv 1706.04599.

  >>> import jax.numpy as jnp
  >>> sure = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2]]))
  >>> found = calibration(sure, jnp.array([0, 1]))
  >>> [round(float(x), 3) for x in found]  # accuracy 0.5 at a confidence of 0.8
  [0.5, 0.916, 0.68, 0.3]
  """
  if log_probabilities.ndim != 2 or labels.shape != log_probabilities.shape[:1]:
    raise ValueError(
      f"log_probabilities must be [N, C] and labels [N]; got {log_probabilities.shape} and "
      f"{labels.shape}."
    )
  classes = log_probabilities.shape[1]
  value, kept = validate.known(labels), validate.known(mask) if mask is not None else None
  if value is not None:
    value = value if kept is None else value[kept > 0]
    if ((value < 0) | (value >= classes)).any():
      raise ValueError(f"labels must lie in 0..{classes - 1}; got {value.min()}..{value.max()}.")
  labels = labels_of(labels)
  in_range = (labels >= 0) & (labels < classes)
  log_p = jnp.where(in_range[:, None], jax.nn.log_softmax(log_probabilities), jnp.nan)
  weights = jnp.ones(labels.shape, log_p.dtype) if mask is None else mask.astype(log_p.dtype)
  total = divisor(jnp.sum(weights))
  mean = lambda x: jnp.sum(jnp.where(weights > 0, weights * x, 0.0)) / total
  right = jax.nn.one_hot(labels, log_p.shape[1], dtype=log_p.dtype)
  p = jnp.exp(log_p)
  correct = jnp.where(in_range, jnp.argmax(log_p, 1) == labels, jnp.nan).astype(log_p.dtype)
  confidence = jnp.max(p, 1)
  place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
  miss = jnp.where(weights > 0, weights * (correct - confidence), 0.0)
  gap = jax.ops.segment_sum(miss, place, bins)
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
  """The share [] of targets within the central interval of N(mean, sd^2) that should hold `level`.

  Args:
    mean, sd, targets: one shape.
    mask: that broadcasts against it, 0 for targets that do not count.
  """
  if not mean.shape == sd.shape == targets.shape:
    raise ValueError(f"Shapes must agree; got {mean.shape}, {sd.shape}, {targets.shape}.")
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1; got {level}.")
  half = jax.scipy.stats.norm.ppf(0.5 + 0.5 * level) * sd
  inside = (jnp.abs(targets - mean) <= half).astype(mean.dtype)
  weights = jnp.broadcast_to(jnp.ones([], mean.dtype) if mask is None else mask, mean.shape)
  return jnp.sum(inside * weights) / divisor(jnp.sum(weights))
