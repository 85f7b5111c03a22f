"""Check arguments: type, structure, shape, dtype and values. The errors name the leaf at fault.

Types, shapes and dtypes are known while tracing, so they are always checked. Values are known only
outside jit. For a traced array `known` returns None, and the checks of values are skipped.
"""

import contextlib
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from shrinkmeta.checks.kinds import is_array, is_key, model_hint, parameter_tree, shown

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
  """Write a key path of `jax.tree_util` as "a/b/c".

  Args:
    path: the keys, from the root to the leaf.

  Returns:
    A text. It is empty for the root.

  >>> path_name((jax.tree_util.DictKey("head"), jax.tree_util.SequenceKey(0)))
  'head/0'
  """
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_names(tree: PyTree, name: str = "") -> list[tuple[str, Any]]:
  """List the leaves of a pytree with their paths, in the order of `jax.tree.leaves`.

  Args:
    tree: any pytree.
    name: a text to put before every path.

  Returns:
    [(name/path, leaf)].

  Raises:
    ValueError: if two leaves have the same path text, because a key has a "/" in it.

  >>> leaves_with_names({"head": [1.0, 2.0]}, "phi")
  [('phi/head/0', 1.0), ('phi/head/1', 2.0)]
  """
  prefix = f"{name}/" if name else ""
  under = lambda path: f"{prefix}{path_name(path)}" if path else name
  named = [(under(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
  seen: set[str] = set()
  for path, _ in named:
    if path in seen:
      raise ValueError(f'Two leaves are at {path!r}: rename the key that has a "/" in it.')
    seen.add(path)
  return named


def known(x: Any) -> np.ndarray | None:
  """Return the value of an array, or None if the value cannot be read.

  Args:
    x: an array or a number [...].

  Returns:
    A NumPy array [...]. None if x is traced, lies partly on another host, or is a key of random
    numbers.

  >>> known(jnp.ones(2))
  array([1., 1.], dtype=float32)
  """
  return np.asarray(x) if readable(x) and not is_key(x) else None


def readable(tree: PyTree) -> bool:
  """Return whether no leaf is traced or lies partly on another host.

  >>> readable((jnp.ones(2), jax.random.key(0)))
  True
  """
  here = lambda x: not isinstance(x, jax.Array) or x.is_fully_addressable
  return all(not isinstance(x, Tracer) and here(x) for x in jax.tree.leaves(tree))


def instance(
  name: str, value: Any, kind: type | tuple[type, ...], wanted: str, hint: str = ""
) -> None:
  """Raise TypeError unless `value` is an instance of `kind`.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument.
    kind: a class, or a tuple of classes.
    wanted: words that say what the argument must be.
    hint: a sentence that says what the caller should do.

  Raises:
    TypeError: if the value is of another type.

  >>> instance("steps", 2.5, int, "an integer", "Round it.")
  Traceback (most recent call last):
  TypeError: steps must be an integer; got 2.5. Round it.
  """
  if not isinstance(value, kind):
    raise TypeError(f"{name} must be {wanted}; got {shown(value)}. {hint}".rstrip())


def function(name: str, value: Any, wanted: str, hint: str = "") -> None:
  """Raise TypeError unless `value` is a function or another callable object.

  A whole model of flax or equinox is refused although it is callable. The caller must pass its
  parameters and its function separately.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument.
    wanted: the function's arguments and result, such as "(theta, inputs) -> outputs [N, ...]".
    hint: a sentence that says what the caller should do.

  Raises:
    TypeError: if the value is not callable, or is a whole model.

  >>> function("predict", 3, "(theta, inputs) -> outputs [N, ...]")
  Traceback (most recent call last):
  TypeError: predict must be a function, (theta, inputs) -> outputs [N, ...]; got 3.
  """
  if came := model_hint(value):
    raise TypeError(f"{name} must be a function, {wanted}; got {came}")
  if not callable(value):
    raise TypeError(f"{name} must be a function, {wanted}; got {shown(value)}. {hint}".rstrip())


def integer(name: str, value: Any, least: int | None = None) -> int:
  """Return an integer of Python, NumPy or JAX as a Python int, or raise an error.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument. A bool, 2.0 or a traced array does not count as an integer.
    least: the smallest value allowed. None allows all integers.

  Returns:
    The integer.

  Raises:
    TypeError: if the value is not an integer.
    ValueError: if the value is less than `least`.

  >>> integer("bins", 0, least=1)
  Traceback (most recent call last):
  ValueError: bins must be at least 1; got 0.
  """
  known = value
  with contextlib.suppress(TypeError):
    known = operator.index(value)
  if not isinstance(known, int) or isinstance(value, (bool, np.bool_)):
    wanted = "an integer" if least is None else f"an integer of at least {least}"
    raise TypeError(f"{name} must be {wanted}; got {shown(value)}.")
  if least is not None and known < least:
    raise ValueError(f"{name} must be at least {least}; got {known}.")
  return known


def array(name: str, value: Any, wanted: str, numbers: bool = True) -> None:
  """Raise TypeError unless `value` is an array of numbers or bools.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument; it may be traced.
    wanted: words that say what the argument must be, with its shape.
    numbers: True to accept Python's numbers as arrays of shape [].

  Raises:
    TypeError: if the value is a list, None, or another object without a shape and a dtype.

  >>> array("mask", [1, 0], "an array [N]")
  Traceback (most recent call last):
  TypeError: mask must be an array [N]; got a list of 2 items. Make an array of the \
numbers: jnp.asarray.
  """
  if isinstance(value, jax.Array):
    return
  number = isinstance(value, (bool, int, float, complex))
  if not is_array(value) or (number and not numbers):
    rows = number or (isinstance(value, (list, tuple)) and str not in map(type, value))
    hint = " Make an array of the numbers: jnp.asarray." if rows else ""
    raise TypeError(f"{name} must be {wanted}; got {shown(value)}.{hint}")


def labels(name: str, tree: PyTree) -> None:
  """Raise TypeError unless every leaf of `tree` is a string.

  Args:
    name: the name of the argument, for the error message.
    tree: the labels that the caller passed.

  Raises:
    TypeError: if the tree has no leaves, or if a leaf is not a string. The latter happens if the
      caller passes the parameters.

  >>> labels("labels", {"kernel": "head", "bias": "head"})
  >>> labels("labels", {"kernel": jnp.ones([2])})
  Traceback (most recent call last):
  TypeError: labels/kernel must be a string, the name of a module; got an array float32[2]. Make \
labels from the parameters: sm.by_layer(params), sm.by_leaf(params) or sm.by_path(params, rules).
  """
  make = (
    "Make labels from the parameters: sm.by_layer(params), sm.by_leaf(params) or "
    "sm.by_path(params, rules)."
  )
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  if not leaves:
    raise TypeError(f"{name} must be a pytree of strings; got {shown(tree)}. {make}")
  for path, leaf in leaves:
    if not isinstance(leaf, str):
      where = _at(name, path_name(path))
      raise TypeError(f"{where} must be a string, the name of a module; got {shown(leaf)}. {make}")


def finite(name: str, tree: PyTree) -> None:
  """Raise ValueError if a floating leaf of `tree` holds NaN or inf.

  Args:
    name: the name of the argument, for the error message.
    tree: a pytree of arrays [...]; traced leaves are not checked.

  Raises:
    ValueError: if an entry is NaN or infinite.

  >>> finite("phi", {"w": jnp.array([0.0, jnp.inf])})
  Traceback (most recent call last):
  ValueError: phi/w (shape (2,)) has 1 NaN or infinite entries, the first at index (1,): inf. \
Remove or replace them before calling.
  """
  for leaf_name, leaf in leaves_with_names(tree, name):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or (value := known(leaf)) is None:
      continue
    wide = np.complex128 if np.iscomplexobj(value) else np.float64  # isfinite knows no bfloat16
    bad = ~np.isfinite(value.astype(wide))
    if bad.any():
      first = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(
        f"{leaf_name} (shape {value.shape}) has {int(bad.sum())} NaN or infinite entries, the "
        f"first at index {first}: {value[first]}. Remove or replace them before calling."
      )


def parameters(name: str, tree: PyTree) -> jnp.dtype:
  """Check that a pytree of parameters has arrays, all finite and of one floating dtype.

  Args:
    name: the name of the argument, for the error message.
    tree: the parameters that the caller passed.

  Returns:
    The dtype of the arrays.

  Raises:
    TypeError: if `tree` holds something other than arrays: see `parameter_tree`.
    ValueError: if there are no arrays, their dtypes differ or are not floating, or an entry is not
      finite.

  >>> parameters("phi", {"w": jnp.ones([2, 3])})
  dtype('float32')
  """
  parameter_tree(name, tree)
  leaves = leaves_with_names(tree, name)
  if not leaves:
    raise ValueError(f"{name} has no arrays; got {shown(tree)}. Pass the parameters of your model.")
  for leaf_name, leaf in leaves:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"{leaf_name} has dtype {dtype}; parameters must be floating. Keep counters, keys and "
        "integer tables out of the parameters: learner.init(params, constants=...)."
      )
    if dtype != jnp.result_type(leaves[0][1]):
      raise ValueError(
        f"{name} mixes dtypes: {leaves[0][0]} is {jnp.result_type(leaves[0][1])}, {leaf_name} is "
        f"{dtype}. Cast all to one, for example optax.tree.cast({name}, jnp.float32)."
      )
  finite(name, tree)
  return jnp.result_type(leaves[0][1])


def wide(dtype: jax.typing.DTypeLike, what: str) -> None:
  """Raise ValueError unless a dtype has at least 32 bits, as matrix factorisations need.

  Args:
    dtype: the dtype of the parameters.
    what: the name of the computation that factorises matrices, for the error message.

  Raises:
    ValueError: if the dtype has less than 32 bits.

  >>> wide(jnp.float32, "A posterior")
  """
  if jnp.dtype(dtype).itemsize < 4:
    raise ValueError(
      f"{what} factorises matrices, in float32 or float64; got {jnp.dtype(dtype)}. Keep parameters "
      "in float32, and compute the network in less by sm.in_precision(likelihood, jnp.bfloat16)."
    )


def same_shapes(name: str, tree: PyTree, other_name: str, other: PyTree, lead: int = 0) -> None:
  """Raise ValueError unless two pytrees have equal paths, dtypes and shapes.

  Args:
    name: the name of the first pytree, for the error message.
    tree: a pytree of arrays. Without their first `lead` axes, its arrays must have the shapes of
      `other`.
    other_name: the name of the second pytree, for the error message.
    other: a pytree of arrays [...].
    lead: the number of extra leading axes in `tree`; 1 for leaves [T, ...].

  Raises:
    ValueError: if the pytrees differ.

  >>> same_shapes("thetas", {"w": jnp.ones([5, 2])}, "phi", {"w": jnp.ones(2)}, lead=1)
  """
  a, b = dict(leaves_with_names(tree)), dict(leaves_with_names(other))
  for path in [*a, *b]:
    if path not in a or path not in b:
      has, lacks = (name, other_name) if path in a else (other_name, name)
      raise ValueError(
        f"{name} and {other_name} must have the same structure: {path!r} is in {has} and not in "
        f"{lacks}."
      )
  for path in a:
    shape, other_shape = jnp.shape(a[path])[lead:], jnp.shape(b[path])
    if shape != other_shape or jnp.ndim(a[path]) != len(other_shape) + lead:
      after = " after the leading axis T of tasks" if lead else ""
      raise ValueError(
        f"{_at(name, path)} has shape {jnp.shape(a[path])}, {_at(other_name, path)} has "
        f"{other_shape}; they must agree{after}."
      )
    if jnp.result_type(a[path]) != jnp.result_type(b[path]):
      raise ValueError(
        f"{_at(name, path)} is {jnp.result_type(a[path])}, {_at(other_name, path)} is "
        f"{jnp.result_type(b[path])}; they must have one dtype."
      )


def _at(name: str, path: str) -> str:
  """Return the name of the leaf at a path. The path is empty if the pytree is one array."""
  return f"{name}/{path}" if path else name
