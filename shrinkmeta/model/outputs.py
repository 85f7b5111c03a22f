"""What a network returns, checked against the targets that it is compared with.

N is the number of examples. Only types, shapes and dtypes are read, so that nothing is left of the
checks in a compiled program; `in_range` and `labels_of` alone compute.
"""

from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta import validate
from shrinkmeta.kinds import is_array, shown

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
  """The targets [N, ...] as floats, NaN outside [0, most]; outside jit that is a ValueError."""
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
