"""Describe an object in words, and check whether it is a pytree of parameters.

Models of flax and equinox are recognised by the names of their classes. So neither library has to
be imported.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def is_key(x: Any) -> bool:
  """Return whether x is an array of random keys, such as `jax.random.key(0)`, or its shape.

  >>> is_key(jax.random.key(0)), is_key(jax.eval_shape(jax.random.key, 0)), is_key(jnp.zeros(2))
  (True, True, False)
  """
  array = isinstance(x, jax.Array | jax.ShapeDtypeStruct)
  return array and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def shown(value: Any) -> str:
  """Describe a value by its type and its shape or first parts, in about 80 characters at most.

  Args:
    value: any object. Arrays may be traced: their elements are not read.

  Returns:
    The description, which follows the word "got" in an error message.

  >>> shown(jnp.zeros([2, 3])), shown([1, 2]), shown({"a": 1}), shown(len)
  ('an array float32[2, 3]', 'a list of 2 items', "a dict with the keys ['a']", 'the function len')
  """
  kind = type(value)
  if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
    return _cut(repr(value), 60)
  if isinstance(value, type):
    return f"the class {_cut(value.__name__, 60)}"
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"an array {value.dtype}{list(value.shape)}"
  if isinstance(value, tuple) and (fields := getattr(value, "_fields", ())):
    return _cut(f"{kind.__name__}({', '.join(f'{f}=...' for f in fields)})", 80)
  if dataclasses.is_dataclass(value):
    fields = ", ".join(f"{f.name}=..." for f in dataclasses.fields(value))
    return _cut(f"{kind.__name__}({fields})", 80)
  if isinstance(value, Mapping):
    return f"a {kind.__name__} with the keys {_cut(str([*value]), 60)}"
  if isinstance(value, (list, tuple, set, frozenset)):
    return f"a {kind.__name__} of {len(value)} items"
  if callable(value) and hasattr(value, "__name__"):
    return f"the function {_cut(value.__name__, 60)}"
  return f"an object of type {_cut(f'{kind.__module__}.{kind.__qualname__}', 70)}"


def _cut(text: str, most: int) -> str:
  """Shorten a text to `most` characters; "..." marks the cut."""
  return text if len(text) <= most else f"{text[: most - 3]}..."


def is_array(value: Any) -> bool:
  """Tell whether a value is a number, an array, a traced array or a jax.ShapeDtypeStruct.

  Args:
    value: any object.

  Returns:
    True or False. It is False for an array of objects or of text.

  >>> is_array(jnp.ones(2)), is_array(1.0), is_array([1.0]), is_array(np.array(["a"]))
  (True, True, False, False)
  """
  if isinstance(value, (bool, int, float, complex)):
    return True
  if not hasattr(value, "shape") or not hasattr(value, "dtype"):
    return False
  return not (isinstance(value.dtype, np.dtype) and value.dtype.kind in "OSUVmM") or (
    jnp.issubdtype(value.dtype, jnp.number)  # NumPy gives bfloat16 the kind V too
  )


def parameter_tree(name: str, tree: PyTree) -> None:
  """Raise TypeError unless every leaf of `tree` is an array or a number.

  The error message says what to do about common mistakes: a whole flax or equinox model, the
  `variables` of flax.linen, an nnx.State with batch statistics or keys of random numbers, a list of
  lists, labels, None.

  Args:
    name: the name of the argument, for the error message.
    tree: the parameters that the caller passed.

  Raises:
    TypeError: if `tree` is not a pytree of arrays.

  >>> parameter_tree("params", {"kernel": jnp.ones([2, 3]), "bias": None})
  >>> parameter_tree("params", {"kernel": "head"})
  Traceback (most recent call last):
  TypeError: params/kernel must be an array; got 'head'. Pass the parameters, not their labels.
  """
  wanted = "a pytree of arrays, the parameters"
  if tree is None:
    raise TypeError(f"{name} must be {wanted}; got None. Pass the parameters of your model.")
  if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
    if state := sorted(set(tree) & _LINEN_STATE):
      raise TypeError(
        f"{name} has the collections {state} beside 'params', which are state and not parameters: "
        'pass variables["params"], and close over the others in `predict`.'
      )
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_special):
    where = "/".join(filter(None, (name, _name(path))))
    if _is_special(node):
      _check_special(where, node)
    elif not is_array(node):
      what = "an array" if path else wanted
      raise TypeError(f"{where} must be {what}; got {shown(node)}. {_hint(node)}")


# Collections of flax.linen's `variables` that hold no parameters.
_LINEN_STATE = frozenset(
  ("batch_stats", "cache", "intermediates", "losses", "params_axes", "perturbations")
)


def is_nnx_variable(node: Any) -> bool:
  """Tell whether a node is an nnx.Variable, without importing flax.nnx, which takes a second."""
  return _derives(node, "flax.nnx", "Variable")


def _is_special(node: Any) -> bool:
  """Tell whether `_check_special` must look at this node of a pytree."""
  return (
    _derives(node, "flax.nnx", "Module")
    or is_nnx_variable(node)
    or _derives(node, "equinox", "Module")
    or _is_rows(node)
  )


def _check_special(where: str, node: Any) -> None:
  """Raise TypeError if a node for which `_is_special` is true is not made of parameters."""
  if _derives(node, "flax.nnx", "Module"):
    raise TypeError(f"{where} must be a pytree of arrays; got {model_hint(node)}")
  if is_nnx_variable(node):
    if not _derives(node, "flax.nnx", "Param"):
      raise TypeError(
        f"{where} is an nnx.{type(node).__name__}, not a parameter. Take the parameters alone: "
        "graphdef, params, rest = nnx.split(model, nnx.Param, ...), and pass rest as constants: "
        "learner.init(params, constants=rest)."
      )
    parameter_tree(where, jax.tree.leaves(node))
  elif _is_rows(node):
    raise TypeError(
      f"{where} must be an array; got a list of lists of numbers, each a parameter of its own. "
      f"Make it one array: jnp.asarray({where.split('/')[-1]})."
    )
  elif bad := [x for x in jax.tree.leaves(node) if not is_array(x)]:
    raise TypeError(
      f"{where} must be a pytree of arrays; it holds {shown(bad[0])}, and is {model_hint(node)}"
    )


def _is_rows(node: Any) -> bool:
  """Tell whether a node is a list of lists of numbers: probably a matrix not made an array."""
  number = lambda x: isinstance(x, (int, float)) or (isinstance(x, (list, tuple)) and _all(x))
  _all = lambda items: len(items) > 0 and all(map(number, items))
  return (
    type(node) in (list, tuple)
    and _all(node)
    and all(isinstance(x, (list, tuple)) and not hasattr(x, "_fields") for x in node)
  )


def _derives(value: Any, library: str, name: str) -> bool:
  """Tell whether the type of `value` derives from the class `name` of a library.

  The library need not be imported: only names are compared.
  """
  return any(
    base.__name__ == name and f"{base.__module__}.".startswith(f"{library}.")
    for base in type(value).__mro__
  )


def _hint(leaf: Any) -> str:
  """Say what to do about a leaf that is not an array."""
  if hint := model_hint(leaf):
    return f"It is {hint}"
  if isinstance(leaf, str):
    return "Pass the parameters, not their labels."
  if callable(leaf):
    return "Keep functions out of the parameters, and close over them in `predict`."
  return "Make it one with jnp.asarray, or close over it in `predict`."


def model_hint(value: Any) -> str:
  """Say how to get the parameters and `predict` from a flax or equinox model.

  Args:
    value: any object.

  Returns:
    Words that name the model and say how to get both. "" if `value` is not such a model.

  >>> model_hint({"kernel": jnp.ones([2, 3])})
  ''
  """
  kind = type(value).__name__
  if _derives(value, "flax.nnx", "Module"):
    return (
      f"an nnx module, {kind}. Pass its parameters: graphdef, params, rest = "
      "nnx.split(model, nnx.Param, ...); `predict` is then "
      "lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)."
    )
  if _derives(value, "flax.linen", "Module"):
    return (
      f"a flax.linen module, {kind}. Pass its parameters: params = module.init(key, inputs)"
      '["params"]; `predict` is then lambda params, x: module.apply({"params": params}, x).'
    )
  if _derives(value, "equinox", "Module"):
    return (
      f"an equinox module, {kind}. Pass its arrays: params, static = "
      "eqx.partition(model, eqx.is_inexact_array); `predict` is then "
      "lambda params, x: jax.vmap(eqx.combine(params, static))(x)."
    )
  return ""


def _name(path: tuple[Any, ...]) -> str:
  """Write a key path as "a/b/c"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
