"""Round theta - phi to bfloat16 or int8, which takes fewer bytes, and measure the loss in nats."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from shrinkmeta.base import MetaState, check_state
from shrinkmeta.checks import validate
from shrinkmeta.mode.frozen import merge
from shrinkmeta.model.density import log_likelihood
from shrinkmeta.model.likelihood import Likelihood, check_likelihood
from shrinkmeta.model.tasks import Batch, check_batch, divisor, num_examples
from shrinkmeta.model.variants import with_constants
from shrinkmeta.serving.deltas import (
  Deltas,
  check_deltas,
  check_fingerprint,
  fingerprint,
  with_structure,
)

PyTree = Any
Rounding = Literal["bfloat16", "int8"]

# {dtype: the names of the tensors that are stored for one leaf}.
PARTS = {None: ("theta",), "bfloat16": ("difference",), "int8": ("difference", "scale")}


def rounded_parts(
  path: str, theta: np.ndarray, phi: np.ndarray | None, dtype: Rounding | None
) -> list[np.ndarray]:
  """Return the arrays to store for one leaf of K tasks.

  Without phi this is theta [K, ...]. With phi it is theta - phi [K, ...] in bfloat16, or
  (theta - phi) / scale in int8 and the scale [K].

  Raises:
    ValueError: theta - phi overflows in the dtype.
  """
  if phi is None:
    return [theta]
  difference = theta.astype(np.float64) - phi.astype(np.float64)
  axes = tuple(range(1, theta.ndim))
  with np.errstate(over="ignore"):
    if dtype == "bfloat16":
      stored = [difference.astype(ml_dtypes.bfloat16)]
    else:
      scale = (np.abs(difference).max(axes, initial=0.0) / 127.0).astype(np.float32)
      safe = np.where(scale > 0, scale, 1.0).reshape(-1, *[1] * len(axes))
      stored = [np.clip(np.rint(difference / safe), -127, 127).astype(np.int8), scale]
  finite = np.isfinite(stored[-1].astype(np.float64)).all()
  with np.errstate(over="ignore"):  # a theta near the largest number may be rounded up
    finite = finite and np.isfinite(restored(stored, phi).astype(np.float64)).all()
  if not finite:
    raise ValueError(f"theta - phi of {path!r} overflows in dtype {dtype!r}: save with dtype=None.")
  return stored


def restored(parts: Sequence[np.ndarray], phi: np.ndarray) -> np.ndarray:
  """Return theta [K, ...] from the rounded difference and, for int8, the scale [K]."""
  difference = parts[0].astype(np.float64)
  if len(parts) > 1:
    difference *= parts[1].astype(np.float64).reshape(-1, *[1] * phi.ndim)
  return (phi.astype(np.float64) + difference).astype(phi.dtype)


def theta_of(
  parts: Sequence[np.ndarray], stored: tuple[str, ...], phi: np.ndarray
) -> np.ndarray | None:
  """Return theta from the tensors of one leaf, or None if `rounded_parts` cannot have made them."""
  if stored not in PARTS.values() or parts[0].shape[1:] != phi.shape:
    return None
  if stored == ("theta",):
    return parts[0] if parts[0].dtype == phi.dtype else None
  if len(parts) > 1 and parts[1].shape != parts[0].shape[:1]:
    return None
  want = [ml_dtypes.bfloat16] if len(parts) == 1 else [np.int8, np.float32]
  return restored(parts, phi) if [x.dtype for x in parts] == want else None


def phi_of(deltas: Deltas, state: MetaState | None, dtype: Rounding) -> dict[str, np.ndarray]:
  """Return {path: phi} for the leaves of `deltas`; raise an error if they belong to another phi."""
  if state is None:
    raise ValueError(
      f"state is None. dtype={dtype!r} stores theta - phi: pass the state the tasks adapted from."
    )
  check_state("state", state)
  check_fingerprint(deltas.fingerprint, fingerprint(state), "These Deltas")
  shared = dict(validate.leaves_with_names(state.phi))
  return {path: np.asarray(shared[path]) for path, _ in validate.leaves_with_names(deltas.thetas)}


def rounding_loss(
  likelihood: Likelihood, state: MetaState, deltas: Deltas, batches: Batch, dtype: Rounding
) -> jax.Array:
  """Measure what storing rounded parameters costs, in nats per example of each task.

    loss_t = (1 / N_t) sum_n [log p(y_tn | x_tn, theta_t) - log p(y_tn | x_tn, rounded theta_t)]

  Args:
    likelihood: the likelihood of the learner that adapted the tasks.
    state: the state from which the tasks were adapted.
    deltas: T tasks, not rounded.
    batches: examples that were not used for adaptation, leaves [T, N, ...].
    dtype: "bfloat16" or "int8", as for `save_deltas`.

  Returns:
    the loss of each task, [T]. It is positive if rounding makes the predictions worse.

  Raises:
    TypeError, ValueError: an argument does not fit.

  Example:
    >>> import shrinkmeta as sm
    >>> likelihood = sm.gaussian(lambda p, x: x * p["w"])
    >>> learner = sm.maml(likelihood, {"w": "w"})
    >>> state = learner.init({"w": 0.0})
    >>> own = sm.deltas(learner, state, {"w": jnp.array([1.0, 1.01])}, ["ann", "bob"])
    >>> batches = sm.Batch(jnp.ones([2, 4]), jnp.ones([2, 4]))
    >>> loss = sm.rounding_loss(likelihood, state, own, batches, "bfloat16")
    >>> bool(loss[0] == 0)  # 1.0 is a number of bfloat16
    True
  """
  check_likelihood("likelihood", likelihood)
  check_deltas("deltas", deltas)
  if dtype not in ("bfloat16", "int8"):
    raise ValueError(f'dtype must be "bfloat16" or "int8"; got {dtype!r}.')
  phi = phi_of(deltas, state, dtype)
  check_batch("batches", batches, ("T", "N"))
  if jax.tree.leaves(batches.targets)[0].shape[0] != deltas.num_tasks:
    raise ValueError(f"batches must lead with T = {deltas.num_tasks}, the tasks of deltas.")
  likelihood = with_constants(likelihood, state.constants)
  leaves = dict(validate.leaves_with_names(deltas.thetas))
  rounded = {
    path: jnp.asarray(restored(rounded_parts(path, np.asarray(x), phi[path], dtype), phi[path]))
    for path, x in leaves.items()
  }

  def mean(part: PyTree, batch: Batch) -> jax.Array:
    total = log_likelihood(likelihood, merge(part, state.phi), batch)
    return total / divisor(num_examples(batch, total.dtype))

  mean = jax.vmap(mean)
  return mean(deltas.thetas, batches) - mean(with_structure(state.phi, rounded), batches)
