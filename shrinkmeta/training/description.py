"""What a saved state says of itself: its structure, and a fingerprint of every array."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta import validate
from shrinkmeta.base import MetaLearner, MetaState

PyTree = Any

FORMAT = 1  # of the description; a number for every change that older code cannot read


def describe(
  learner: MetaLearner,
  state: MetaState,
  settings: Mapping[str, Any],
  meta_batch: int | None = None,
) -> dict[str, Any]:
  """What a checkpoint says of itself, as JSON: what must agree where it is restored.

  Args:
    meta_batch: tasks of an update, by which it is known which come next; None: not asked.
  """
  arrays = {
    name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    for name, leaf in named(state).items()
  }
  labels = dict(validate.leaves_with_names(learner.labels))
  learnt = (
    learner.algorithm.sigma == "learned"
  )  # then the state has it, but for what is frozen or free
  sigma = {m: f"{s:g}" for m, s in learner.spec.sigma.items() if not learnt or s in (0.0, math.inf)}
  return {
    "format": FORMAT,
    "row": [*learner.algorithm[:3], *(() if learner.algorithm.prior else ("no prior",))],
    "sigma": sigma,
    "fit": {} if meta_batch is None else {"meta_batch": meta_batch},
    "settings": json.loads(json.dumps(settings)),  # a tuple is a list when it is read again
    "modules": labels,
    "arrays": arrays,
  }


def fingerprints(state: PyTree) -> dict[str, int]:
  """{path: a number of 32 bits}, of every bit of every leaf; jit it.

  Sums modulo 2^32 of words times odd numbers that depend on their places: the same however an
  array is cut over devices, and another one wherever a single bit differs, as an odd multiplier
  has an inverse.
  """
  return {name: _fingerprint(leaf) for name, leaf in named(state).items()}


def _fingerprint(leaf: jax.Array) -> Any:
  size = jnp.dtype(leaf.dtype).itemsize
  words = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
  words = jax.lax.bitcast_convert_type(words, unsigned).astype(jnp.uint32)  # 8 bytes: two words
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    place = place * jnp.uint32(words.shape[axis]) + jax.lax.broadcasted_iota(
      jnp.uint32, words.shape, axis
    )
  mixed = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)
  mixed = (mixed ^ (mixed >> 12)) * jnp.uint32(0x297A2D39)
  return jnp.sum(words * (mixed | jnp.uint32(1)), dtype=jnp.uint32)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """How the description of a checkpoint differs from the one wanted, a sentence each."""
  if saved["row"] != wanted["row"]:
    return [f"it is of the row {saved['row']}, and this learner of {wanted['row']}"]
  found = []
  fields = ("fit", "argument"), ("settings", "setting"), ("modules", "module"), ("arrays", "array")
  for field, what in (("sigma", "sigma of"), *fields):
    if field in ("sigma", "fit") and field not in saved:
      continue  # written before it was asked for
    if field == "fit" and not (saved[field] and wanted[field]):
      continue  # not asked for
    old, new = saved[field], wanted[field]
    for name in sorted(old.keys() | new.keys()):
      a, b = old.get(name, "absent"), new.get(name, "absent")
      if a != b:
        found.append(f"{what} {name}: {_short(a)} in it, {_short(b)} here")
  return found


def _short(value: Any) -> str:
  if isinstance(value, dict) and value.keys() == {"dtype", "shape"}:
    return f"{value['dtype']}{value['shape']}"
  return "absent" if value == "absent" else repr(value)


def named(state: PyTree) -> dict[str, jax.Array]:
  """{path: leaf}, keys of random numbers as the integers they are."""
  plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return {name: plain(leaf) for name, leaf in validate.leaves_with_names(state)}


def unnamed(state: MetaState, named: Mapping[str, jax.Array]) -> MetaState:
  """The inverse of `named`, with the structure of `state`."""

  def leaf(path: tuple[Any, ...], old: jax.Array) -> jax.Array:
    new = named[validate.path_name(path)]
    if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
      return new
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))

  return jax.tree_util.tree_map_with_path(leaf, state)


def digest(about: Mapping[str, Any]) -> str:
  """Of a description that has no digest yet."""
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
