"""The description that is stored with a checkpoint, and the checks that use it.

The description holds the algorithm, the modules, the shape of every array and a fingerprint of its
bits. It lets a reader detect a damaged file and a checkpoint of another model.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.base import MetaLearner, MetaState
from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import is_key

PyTree = Any

FORMAT = 1  # version of the description; increase it with every change that older code cannot read

_PACKAGES = ("shrinkmeta", "jax", "jaxlib", "optax", "orbax-checkpoint")


def plain_data(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Convert settings to types of JSON: tuples to lists, scalars to numbers, paths to text.

  Raises:
    TypeError: a setting is not plain data.
  """

  def scalar(value: Any) -> Any:
    if isinstance(value, os.PathLike):
      return os.fspath(value)
    if np.ndim(value) == 0 and isinstance(value, (np.generic, np.ndarray, jax.Array)):
      return value.item()
    raise TypeError(f"{type(value).__name__} is not plain data: {value!r}")

  return json.loads(json.dumps(settings, default=scalar))


def describe(
  learner: MetaLearner,
  state: MetaState,
  settings: Mapping[str, Any],
  meta_batch: int | None = None,
  constants: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Describe the properties that a checkpoint and a run that continues from it must share.

  Args:
    learner: the learner of the run.
    state: a state of this learner. Only its dtypes and shapes matter.
    settings: `Checkpoints.settings`.
    meta_batch: the number of tasks per update. It fixes which tasks the next update sees. None
      skips this check.
    constants: the result of `describe_constants`, if the checkpoint does not hold the constants.

  Returns:
    The description, in types that JSON reads back unchanged.
  """
  arrays = {
    name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    for name, leaf in named(state).items()
  }
  # The state holds the learned sigmas. The description adds the sigmas that the user chose: fixed,
  # frozen (0) or free (inf).
  learned = learner.algorithm.sigma == "learned"
  chosen = {m: s for m, s in learner.spec.sigma.items() if not learned or s in (0.0, math.inf)}
  return {
    "format": FORMAT,
    # The algorithm. Its key is still called "row", so that older checkpoints can be read.
    "row": [*learner.algorithm[:3], *(() if learner.algorithm.prior else ("no prior",))],
    "sigma": {module: f"{sigma:g}" for module, sigma in chosen.items()},
    "restricted": sorted(set(learner.spec.restricted)),
    "fit": {} if meta_batch is None else {"meta_batch": meta_batch},
    "settings": plain_data(settings),
    "modules": dict(validate.leaves_with_names(learner.labels)),
    "arrays": arrays,
    "constants": dict(constants or {}),
  }


def stored(state: MetaState, by_value: bool) -> MetaState:
  """Return the part of the state that a checkpoint holds: the constants only if `by_value`."""
  return state if by_value else state._replace(constants=None)


def describing(
  learner: MetaLearner,
  settings: Mapping[str, Any],
  by_value: bool,
  meta_batch: int | None = None,
) -> Callable[[MetaState], dict[str, Any]]:
  """Return a function state -> description, which describes the constants only once."""
  known: list[dict[str, Any]] = []

  def description(state: MetaState) -> dict[str, Any]:
    if not known:
      known.append({} if by_value else describe_constants(state.constants))
    return describe(learner, stored(state, by_value), settings, meta_batch, known[0])

  return description


def describe_constants(constants: PyTree) -> dict[str, Any]:
  """Return {path: dtype, shape and fingerprint} of the constants of a state."""
  prints = jax.jit(fingerprints)(constants)
  return {
    name: f"{leaf.dtype}{list(leaf.shape)}, fingerprint {int(prints[name]):08x}"
    for name, leaf in named(constants).items()
  }


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """List the differences between the description of a checkpoint and the wanted description."""
  if saved["row"] != wanted["row"]:
    return [f"it was written by the algorithm {saved['row']}, and this learner is {wanted['row']}"]
  found = []
  new = wanted["restricted"]
  if (old := saved.get("restricted", new)) != new:  # older checkpoints do not have this field
    found.append(f"restricted: {old} in it, {new} here")
  fields = ("fit", "argument"), ("settings", "setting"), ("modules", "module"), ("arrays", "array")
  for field, what in (("sigma", "sigma of"), *fields, ("constants", "constant")):
    if field in ("sigma", "fit", "constants") and field not in saved:
      continue  # older checkpoints do not have these fields
    if field == "fit" and not (saved[field] and wanted[field]):
      continue  # the caller skips this check
    old, new = saved[field], wanted[field]
    for name in sorted(old.keys() | new.keys()):
      a, b = old.get(name, "absent"), new.get(name, "absent")
      if not equal(a, b):
        found.append(f"{what} {name}: {_short(a)} in it, {_short(b)} here")
  return found


def equal(a: Any, b: Any) -> bool:
  """Return whether two values of JSON are equal, where NaN is equal to NaN."""
  # A tuple stands for NaN, or for inf. It is equal to itself, and to no other value of JSON.
  comparable = lambda value: json.loads(json.dumps(value), parse_constant=lambda name: (name,))
  return comparable(a) == comparable(b)


def _short(value: Any) -> str:
  if isinstance(value, dict) and value.keys() == {"dtype", "shape"}:
    return f"{value['dtype']}{value['shape']}"
  return "absent" if value == "absent" else repr(value)


def check_description(
  found: Mapping[str, Any], wanted: Mapping[str, Any], path: pathlib.Path
) -> None:
  """Raise ValueError if a checkpoint belongs to another run, or to a newer version of the format.

  The function compares descriptions only. The arrays are read later and can still be damaged.
  """
  if found["format"] > FORMAT:
    raise ValueError(
      f"{path} has format {found['format']}, written by shrinkmeta "
      f"{found.get('versions', {}).get('shrinkmeta')}; this version reads up to {FORMAT}. Install "
      "that version."
    )
  _check_constants(found, wanted, path)
  if different := differences(found, wanted):
    more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
    raise ValueError(
      f"{path} is a checkpoint of another run: {'; '.join(different[:3])}{more}. Continue with the "
      "settings that wrote it, or name another folder."
    )


def _check_constants(
  found: Mapping[str, Any], wanted: Mapping[str, Any], path: pathlib.Path
) -> None:
  """Raise ValueError if one of two runs stores the constants and the other does not."""
  inside = lambda about: any(f"{name}/".startswith("constants/") for name in about["arrays"])
  if inside(found) and not inside(wanted):
    raise ValueError(
      f"{path} stores the constants: pass Checkpoints(folder, constants=True), and a state with "
      "constants of the same shapes, learner.init(params, constants=...). Their values may be "
      "zeros: the stored values replace them."
    )
  if inside(wanted) and found.get("constants"):
    raise ValueError(
      f"{path} does not store the constants, only their fingerprints: pass Checkpoints(folder) "
      "without constants=True, and the constants of the run in learner.init(params, constants=...)."
    )


def read_description(path: pathlib.Path) -> dict[str, Any]:
  """Read the description that orbax wrote as JSON into the folder `path`.

  Raises:
    ValueError: the description has changed since it was written.
  """
  description = json.loads((path / "metadata").read_text(encoding="utf-8"))
  if description.pop("digest") != digest(description):
    raise ValueError("its description has changed")
  return description


def digest(description: Mapping[str, Any]) -> str:
  """Return the SHA-256 of a description that has no digest yet."""
  return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
  """Return {package: version} of the installed packages that write checkpoints."""
  found = {}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def fingerprints(state: PyTree) -> dict[str, int]:
  """Compute a 32-bit fingerprint of every leaf, from all of its bits.

  A damaged file can decode to wrong numbers without an error (docs/hazards.md#orbax-errors). The
  fingerprint of an array is a sum modulo 2^32 of its words of up to 32 bits. Each word is first
  multiplied by an odd number that depends on the place of the word. The sum does not depend on how
  devices share the array. A change of one bit changes the sum, because an odd factor has an inverse
  modulo 2^32. Call this function under `jax.jit`.

  Returns:
    {path: uint32 []}.
  """
  return {name: _fingerprint(leaf) for name, leaf in named(state).items()}


def _fingerprint(leaf: jax.Array) -> Any:
  if jnp.iscomplexobj(leaf):
    leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
  size = jnp.dtype(leaf.dtype).itemsize
  narrow = leaf.dtype == jnp.bool_ or leaf.dtype.name in ("int4", "uint4", "int2", "uint2")
  words = leaf.astype(jnp.uint8) if narrow else leaf
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


def named(state: PyTree) -> dict[str, jax.Array]:
  """Return {path: leaf}, with each random key replaced by its integers."""
  plain = lambda x: jax.random.key_data(x) if is_key(x) else x
  return {name: plain(leaf) for name, leaf in validate.leaves_with_names(state)}


def with_entries(state: PyTree) -> dict[str, jax.Array]:
  """Return the leaves of `named` that have an entry: orbax refuses others.

  See docs/hazards.md#orbax-errors.
  """
  return {name: leaf for name, leaf in named(state).items() if leaf.size}


def unnamed(state: MetaState, named: Mapping[str, jax.Array]) -> MetaState:
  """Invert `with_entries`: put the leaves into the structure of `state`."""

  def leaf(path: tuple[Any, ...], old: jax.Array) -> jax.Array:
    if not old.size:
      return old
    new = named[validate.path_name(path)]
    if not is_key(old):
      return new
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))

  return jax.tree_util.tree_map_with_path(leaf, state)
