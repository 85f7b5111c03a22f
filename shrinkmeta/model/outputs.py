"""What a network returns, checked against the targets that it is compared with.

N is the number of examples. Only types, shapes and dtypes are read, so that nothing is left of the
checks in a compiled program; `in_range`, `labels_of` and `log_softmax` alone compute.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import is_array, shown
from shrinkmeta.model.tasks import Task

PyTree = Any


def check_outputs(outputs: PyTree, count: int) -> None:
  """Check that every leaf of what `predict` returned leads with [N].

  A Likelihood of the user's own may have outputs in a dict or in a tuple, if its log_prob reads
  them.

  Args:
    outputs: what `predict` returned.
    count: N, the number of examples in the batch.

  Raises:
    TypeError: there are no outputs, or a leaf is no array.
    ValueError: a leaf has another number of examples.

  >>> check_outputs({"mean": jnp.ones([4, 2])}, 4)
  >>> check_outputs(jnp.ones([1, 4]), 4)
  Traceback (most recent call last):
  ValueError: predict must return outputs [4, ...], one entry an example; it returned an array \
float32[1, 4].
  """
  leaves = validate.leaves_with_names(outputs)
  if not leaves or not all(is_array(leaf) for _, leaf in leaves):
    one_array("outputs", outputs)
    raise TypeError(f"predict must return outputs [N, ...]; it returned {shown(outputs)}.")
  for name, leaf in leaves:
    if jnp.shape(leaf)[:1] != (count,):
      if isinstance(outputs, (tuple, list)):
        one_array("outputs", outputs)
      where = f" at {name!r}" if name else ""
      raise ValueError(
        f"predict must return outputs [{count}, ...], one entry an example; it returned "
        f"{shown(leaf)}{where}."
      )


def one_array(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is one array, and say what to do about a tuple or a dict.

  Args:
    name: "outputs" or "targets".
    value: what `predict` returned, or what the batch holds.

  Raises:
    TypeError: it is a tuple, a dict, or another object.

  >>> one_array("outputs", (jnp.ones(3), {"batch_stats": jnp.ones(2)}))
  Traceback (most recent call last):
  TypeError: predict returned a tuple of 2 items: return the outputs [N, ...] alone, for example \
module.apply(variables, inputs, mutable=False).
  """
  if is_array(value):
    return
  if name == "targets":
    raise TypeError(
      f"targets must be one array [N, ...]; got {shown(value)}. For others write the density "
      "yourself: sm.Likelihood(predict, log_prob)."
    )
  if isinstance(value, (tuple, list)):
    raise TypeError(
      f"predict returned {shown(value)}: return the outputs [N, ...] alone, for example "
      "module.apply(variables, inputs, mutable=False)."
    )
  raise TypeError(
    f"predict must return one array, the outputs [N, ...]; it returned {shown(value)}. Return one "
    "of its entries, or write the density yourself: sm.Likelihood(predict, log_prob)."
  )


def in_range(targets: jax.Array, dtype: Any, most: float, what: str) -> jax.Array:
  """Return the targets [N, ...] as floats; one outside [0, most] is an error, or NaN under jit."""
  if (value := validate.known(targets)) is not None and ((value < 0) | (value > most)).any():
    raise ValueError(f"targets must be {what}; got {value.min()} to {value.max()}.")
  y = jnp.asarray(targets).astype(dtype)
  return jnp.where((y >= 0) & (y <= most), y, jnp.nan)


def labels_of(targets: jax.typing.ArrayLike) -> jax.Array:
  """Widen integers [...] to 32 bits at least: compared with a uint8, 256 classes would be 0.

  See docs/hazards.md#narrow-integers.
  """
  targets = jnp.asarray(targets)
  return targets if targets.dtype.itemsize >= 4 else targets.astype(jnp.int32)


def log_softmax(logits: jax.Array) -> jax.Array:
  """The log-probabilities [..., C] of logits [..., C], with an accurate second derivative.

      log p_c = u_c - log(1 + sum_{c != m} exp u_c),   u = f - f_m,   m the largest logit

  The second derivative of `jax.nn.log_softmax` subtracts p_m^2 from p_m. Where p_m is nearly 1 only
  rounding is left of that difference, and the curvature may become negative. Here no probability
  that is squared is larger than 1/2.
  """
  largest = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
  top = jnp.sum(jnp.where(largest, logits, 0.0), -1, keepdims=True)
  u = logits - top  # at m: 0, or NaN where f_m is infinite
  u = jnp.where(largest, jax.lax.stop_gradient(u), u)
  others = jnp.sum(jnp.where(largest, 0.0, jnp.exp(u)), -1, keepdims=True)
  return u - jnp.log1p(others)


def check_targets(likelihood: Any, name: str, tasks: PyTree, phi: PyTree) -> None:
  """Let `likelihood.log_prob` check the values of the targets of T tasks, before they are traced.

  The ready-made densities refuse a target out of range where its value is known. Under jit, where
  no value is known, the task counts as failed.

  Args:
    likelihood: a Likelihood; its `predict` is traced, for the shape of the outputs.
    name: of the tasks, as the caller knows them.
    tasks: a Task or a Batch, leaves [T, N, ...].
    phi: the parameters. Where they are traced, nothing is checked.

  Raises:
    ValueError: what `log_prob` raises, with the name of the part.
  """
  if any(validate.known(x) is None for x in jax.tree.leaves(phi)):
    return  # under a trace, in which no value is known
  parts = {"train": tasks.train, "val": tasks.val} if isinstance(tasks, Task) else {"": tasks}
  for part, batch in parts.items():
    if batch is None or any(validate.known(x) is None for x in jax.tree.leaves(batch)):
      continue  # traced, or on another host
    outputs = jax.eval_shape(
      lambda phi, inputs: jax.vmap(likelihood.predict, (None, 0))(phi, inputs), phi, batch.inputs
    )
    leading = jax.tree.leaves(batch.targets)[0].shape[:2]  # in NumPy: a trace may be under way
    mask = np.ones(leading, bool) if batch.mask is None else np.asarray(batch.mask) != 0
    targets = jax.tree.map(lambda y, keep=mask: np.asarray(y)[keep], batch.targets)
    flat = lambda f, keep=mask: jax.ShapeDtypeStruct((keep.sum(), *f.shape[2:]), f.dtype)
    try:
      jax.eval_shape(lambda f, y=targets: likelihood.log_prob(f, y), jax.tree.map(flat, outputs))
    except ValueError as error:
      raise ValueError(f"{name}.{part}".rstrip(".") + f": {error}") from error
