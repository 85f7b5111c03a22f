"""Checks of the arguments: type, structure, shape, dtype and values. Each error names the leaf.

Types, shapes and dtypes are known while tracing and are always checked. Values are known only
outside jit: `known` returns None for a traced array, and checks of values skip it.
"""

import contextlib
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from shrinkmeta.checks.kinds import is_array, model_hint, parameter_tree, shown

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
  """Write a key path of `jax.tree_util` as "a/b/c".

  Args:
    path: the keys, from the root to the leaf.

  Returns:
    A text, empty for the root.

  >>> path_name((jax.tree_util.DictKey("head"), jax.tree_util.SequenceKey(0)))
  'head/0'
  """
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_names(tree: PyTree, name: str = "") -> list[tuple[str, Any]]:
  """List the leaves of a pytree with their paths, in the order of `jax.tree.leaves`.

  Args:
    tree: any pytree.
    name: put before every path.

  Returns:
    [(name/path, leaf)].

  Raises:
    ValueError: two paths read alike.

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
  """The value of an array, if it can be read.

  Args:
    x: an array or a number [...].

  Returns:
    A NumPy array [...], or None if x is traced, is on another host, or is a key of random numbers.

  >>> known(jnp.ones(2))
  array([1., 1.], dtype=float32)
  """
  if isinstance(x, Tracer):
    return None
  if isinstance(x, jax.Array) and (
    not x.is_fully_addressable or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  ):
    return None
  return np.asarray(x)


def instance(
  name: str, value: Any, kind: type | tuple[type, ...], wanted: str, hint: str = ""
) -> None:
  """Raise TypeError unless `value` is an instance of `kind`.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.
    kind: a class, or a tuple of classes.
    wanted: what the argument must be, in words.
    hint: a sentence that says what to do.

  Raises:
    TypeError: the value is of another type.

  >>> instance("steps", 2.5, int, "an integer", "Round it.")
  Traceback (most recent call last):
  TypeError: steps must be an integer; got 2.5. Round it.
  """
  if not isinstance(value, kind):
    raise TypeError(f"{name} must be {wanted}; got {shown(value)}. {hint}".rstrip())


def function(name: str, value: Any, wanted: str, hint: str = "") -> None:
  """Raise TypeError unless `value` is a function, or an object that acts as one.

  A whole model of flax or equinox is refused although it can be called: its parameters and its
  function are passed apart.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.
    wanted: the function's arguments and result, such as "(theta, inputs) -> outputs [N, ...]".
    hint: a sentence that says what to do.

  Raises:
    TypeError: the value cannot be called, or is a whole model.

  >>> function("predict", 3, "(theta, inputs) -> outputs [N, ...]")
  Traceback (most recent call last):
  TypeError: predict must be a function, (theta, inputs) -> outputs [N, ...]; got 3.
  """
  if came := model_hint(value):
    raise TypeError(f"{name} must be a function, {wanted}; got {came}")
  if not callable(value):
    raise TypeError(f"{name} must be a function, {wanted}; got {shown(value)}. {hint}".rstrip())


def integer(name: str, value: Any, least: int | None = None) -> int:
  """Return an integer of Python, NumPy or JAX as Python's, or raise an error.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed; a bool, 2.0 or a traced array is no integer.
    least: the smallest value allowed; None: any.

  Returns:
    The integer.

  Raises:
    TypeError: the value is no integer.
    ValueError: the value is less than `least`.

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
    name: the argument, as the caller knows it.
    value: what was passed; it may be traced.
    wanted: what the argument must be, with its shape.
    numbers: True to accept Python's numbers as arrays of shape [].

  Raises:
    TypeError: the value is a list, None, or another object without shape and dtype.

  >>> array("mask", [1, 0], "an array [N]")
  Traceback (most recent call last):
  TypeError: mask must be an array [N]; got a list of 2 items. Make an array of the \
numbers: jnp.asarray.
  """
  if isinstance(value, jax.Array):
    return
  number = isinstance(value, (bool, int, float, complex))
  if not is_array(value) or (number and not numbers):
    rows = number or isinstance(value, (list, tuple))
    hint = " Make an array of the numbers: jnp.asarray." if rows else ""
    raise TypeError(f"{name} must be {wanted}; got {shown(value)}.{hint}")


def labels(name: str, tree: PyTree) -> None:
  """Raise TypeError unless every leaf of `tree` is a string.

  Args:
    name: the argument, as the caller knows it.
    tree: what was passed for the labels.

  Raises:
    TypeError: the tree has no leaves, or a leaf is not a string, as when it is the parameters.

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
    name: the argument, as the caller knows it.
    tree: a pytree of arrays [...]; traced leaves are not checked.

  Raises:
    ValueError: an entry is NaN or infinite.

  >>> finite("phi", {"w": jnp.array([0.0, jnp.inf])})
  Traceback (most recent call last):
  ValueError: phi/w (shape (2,)) has 1 NaN or infinite entries, the first at index (1,): inf. \
Remove or replace them before calling.
  """
  for leaf_name, leaf in leaves_with_names(tree, name):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or (value := known(leaf)) is None:
      continue
    bad = ~np.isfinite(value.astype(np.float64))
    if bad.any():
      first = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(
        f"{leaf_name} (shape {value.shape}) has {int(bad.sum())} NaN or infinite entries, the "
        f"first at index {first}: {value[first]}. Remove or replace them before calling."
      )


def parameters(name: str, tree: PyTree) -> jnp.dtype:
  """Check a pytree of parameters: arrays of one floating dtype, not empty, finite.

  Args:
    name: the argument, as the caller knows it.
    tree: what was passed for the parameters.

  Returns:
    The dtype.

  Raises:
    TypeError: `tree` holds something other than arrays, see `parameter_tree`.
    ValueError: there are no arrays, they are not floating or of one dtype, or not finite.

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
        "integer tables out of the parameters and close over them in `predict`."
      )
    if dtype != jnp.result_type(leaves[0][1]):
      raise ValueError(
        f"{name} mixes dtypes: {leaves[0][0]} is {jnp.result_type(leaves[0][1])}, {leaf_name} is "
        f"{dtype}. Cast all to one, for example optax.tree.cast({name}, jnp.float32)."
      )
  finite(name, tree)
  return jnp.result_type(leaves[0][1])


def wide(dtype: jax.typing.DTypeLike, what: str) -> None:
  """Raise ValueError unless a computation that factorises matrices has float32 or float64.

  Args:
    dtype: of the parameters.
    what: what factorises matrices, for the message.

  Raises:
    ValueError: the dtype has 16 bits.

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
    name: of the first pytree, as the caller knows it.
    tree: a pytree of arrays; its leaves have `lead` leading axes and then the shapes of `other`.
    other_name: of the second pytree.
    other: a pytree of arrays [...].
    lead: the number of leading axes, 1 for [T, ...].

  Raises:
    ValueError: the pytrees differ.

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
  """The name of the leaf at a path, which is empty if the pytree is one array."""
  return f"{name}/{path}" if path else name
