"""Check the outputs of a network against the targets.

N is the number of examples. The checks read only types, shapes and dtypes, so they add nothing to a
compiled program. Only `in_range`, `labels_of` and `log_softmax` compute arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.core import Tracer

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import is_array, shown
from shrinkmeta.model.tasks import Batch, Task

PyTree = Any


def check_outputs(outputs: PyTree, count: int) -> None:
  """Check that every leaf of the outputs has the shape [N, ...].

  The outputs may be a dict or a tuple of arrays. A Likelihood of the user's own may return them, if
  its log_prob can read them.

  Args:
    outputs: the result of `predict`.
    count: N, the number of examples in the batch.

  Raises:
    TypeError: if there are no outputs, or a leaf is not an array.
    ValueError: if a leaf has another number of examples.

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
      several = isinstance(outputs, (tuple, list))
      if several and any(isinstance(one, Mapping) for one in outputs):  # flax: mutable=[...]
        one_array("outputs", outputs)
      where = f" at {name!r}" if name else ""
      hint = " Broadcast it, or leave it out." if several else ""
      raise ValueError(
        f"predict must return outputs [{count}, ...], one entry an example; it returned "
        f"{shown(leaf)}{where}.{hint}"
      )


def one_array(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is one array.

  Args:
    name: "outputs" or "targets".
    value: the result of `predict`, or the targets of the batch.

  Raises:
    TypeError: if `value` is a tuple, a dict or another object. The message says what to do.

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
  """Return the targets [N, ...] as floats, after a check that they lie in [0, most].

  Args:
    targets: the targets [N, ...].
    dtype: the floating dtype of the result.
    most: the largest target allowed.
    what: words for the allowed range, for the error message.

  Returns:
    The targets [N, ...]. Under jit, where no value is known, a target out of range becomes NaN.

  Raises:
    ValueError: if a known target is out of range.
  """
  if (value := validate.known(targets)) is not None and ((value < 0) | (value > most)).any():
    raise ValueError(f"targets must be {what}; got {value.min()} to {value.max()}.")
  y = jnp.asarray(targets).astype(dtype)
  return jnp.where((y >= 0) & (y <= most), y, jnp.nan)


def labels_of(targets: jax.typing.ArrayLike) -> jax.Array:
  """Return integer labels [...] in a dtype of at least 32 bits.

  In a comparison with uint8 labels JAX would turn the number of classes, 256, into 0
  (docs/hazards.md#narrow-integers).
  """
  targets = jnp.asarray(targets)
  return targets if targets.dtype.itemsize >= 4 else targets.astype(jnp.int32)


def log_softmax(logits: jax.Array) -> jax.Array:
  """Return the log-probabilities [..., C] of logits f [..., C], with an accurate second derivative.

      log p_c = u_c - log(1 + sum_{k != m} exp u_k),   u = f - f_m,   m the class of the largest f

  The second derivative of `jax.nn.log_softmax` contains p_m - p_m^2. If p_m is nearly 1, rounding
  dominates this difference, and the curvature may become negative. In the formula above, only
  probabilities of at most 1/2 are squared.
  """
  largest = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
  top = jnp.sum(jnp.where(largest, logits, 0.0), -1, keepdims=True)
  u = logits - top  # at m: 0, or NaN if f_m is infinite
  u = jnp.where(largest, jax.lax.stop_gradient(u), u)
  others = jnp.sum(jnp.where(largest, 0.0, jnp.exp(u)), -1, keepdims=True)
  return u - jnp.log1p(others)


def check_targets(likelihood: Any, name: str, tasks: PyTree, phi: PyTree) -> None:
  """Check the values of the targets of T tasks by a call of `likelihood.log_prob`.

  The log_prob of a ready-made likelihood raises an error for a known target out of range. Once the
  targets are traced, no value is known, and a wrong target only makes its task count as failed. So
  learners call this check first. It reports wrong targets only. Any other fault shows when the
  tasks run; and not every function can be called on all examples at once, as here.

  Args:
    likelihood: a Likelihood. Its `predict` is traced to find the shape of the outputs.
    name: the name of the tasks, for the error message.
    tasks: a Task or a Batch, leaves [T, N, ...].
    phi: the parameters; their shapes alone matter. If they are traced, nothing is checked.

  Raises:
    ValueError: if `log_prob` raises ValueError. The message then begins with the name of the part,
      such as tasks.train.
  """
  if any(isinstance(x, Tracer) for x in jax.tree.leaves(phi)):
    return  # jit or grad traces this call, so no value is known
  parts = {"train": tasks.train, "val": tasks.val} if isinstance(tasks, Task) else {"": tasks}
  for part, batch in parts.items():
    if batch is None or not validate.readable(batch):
      continue  # traced, or on another host
    leading = jax.tree.leaves(batch.targets)[0].shape[:2]
    # NumPy selects: inside a trace the results of JAX would be traced, and have no values.
    mask = np.ones(leading, bool) if batch.mask is None else np.asarray(batch.mask) != 0
    with jax.ensure_compile_time_eval():  # log_prob wants JAX arrays, with their values
      targets = jax.tree.map(lambda y, keep=mask: jnp.asarray(np.asarray(y)[keep]), batch.targets)
    flat = lambda f, keep=mask: jax.ShapeDtypeStruct((keep.sum(), *f.shape[2:]), f.dtype)
    predict = lambda phi, inputs: jax.vmap(likelihood.predict, (None, 0))(phi, inputs)
    try:
      outputs = jax.tree.map(flat, jax.eval_shape(predict, phi, batch.inputs))
      if mask.any():
        jax.eval_shape(lambda f, y=targets: likelihood.log_prob(f, y), outputs)
    except ValueError as error:
      cause = _error_of_one_task(likelihood, phi, batch) or error
      raise ValueError(f"{name}.{part}".rstrip(".") + f": {cause}") from cause
    # Not about a target: the caller runs the same functions task by task, and it fails there if it
    # is a fault. If not, as for a density of exactly N examples, nothing is wrong.
    except Exception as error:
      logging.debug("The targets of %s were not checked: %s", name, error)


def _error_of_one_task(likelihood: Any, phi: PyTree, batch: Batch) -> ValueError | None:
  """Return the ValueError that the shapes of one task raise, or None.

  `check_targets` calls `log_prob` on the examples of all tasks at once. The user knows the shapes
  [N, ...] of a task, so an error about shapes must name these.

  Args:
    likelihood: a Likelihood.
    phi: the parameters; their shapes alone matter.
    batch: the examples of T tasks, leaves [T, N, ...].
  """
  one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  log_prob = lambda phi, x, y: likelihood.log_prob(likelihood.predict(phi, x), y)
  try:
    jax.eval_shape(log_prob, phi, *jax.tree.map(one, (batch.inputs, batch.targets)))
  except ValueError as error:
    return error
  except Exception as error:
    logging.debug("The shapes of one task raise another error: %s", error)
  return None
