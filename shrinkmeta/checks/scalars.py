"""Checks of single values: numbers, flags, keys of random numbers, dtypes and optimisers."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown


def number(name: str, value: Any) -> float:
  """Return a real number of Python, NumPy or JAX as Python's float, or raise an error.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed; a bool or a traced array is no number here.

  Returns:
    The number; it may be infinite or NaN.

  Raises:
    TypeError: the value is no number.

  >>> number("tol", np.float32(0.5))
  0.5
  """
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  known = validate.known(value) if isinstance(value, (np.ndarray, np.generic, jax.Array)) else None
  if known is None or known.ndim or not jnp.issubdtype(known.dtype, jnp.number):
    raise TypeError(f"{name} must be a number; got {shown(value)}.")
  if jnp.issubdtype(known.dtype, jnp.complexfloating):
    raise TypeError(f"{name} must be a real number; got {shown(value)}.")
  return float(known)


def count(name: str, value: Any) -> int | jax.Array:
  """Return an integer of at least 0, which may be a traced array, or raise an error.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed: an integer, or an integer array [].

  Returns:
    The integer of Python; a JAX array stays as it is.

  Raises:
    TypeError: the value is no integer.
    ValueError: the value is known to be less than 0.

  >>> count("steps", np.int64(3))
  3
  """
  if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer) and not value.ndim:
    if (known := validate.known(value)) is not None and known < 0:
      raise ValueError(f"{name} must be at least 0; got {known}.")
    return value
  return validate.integer(name, value, least=0)


def flag(name: str, value: Any) -> bool:
  """Return True or False as Python's bool, or raise an error.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.

  Returns:
    The bool.

  Raises:
    TypeError: the value is another object; 0 and 1 are not accepted.

  >>> flag("remat", np.True_)
  True
  """
  validate.instance(name, value, (bool, np.bool_), "True or False")
  return bool(value)


def key(name: str, value: Any, optional: bool = True) -> None:
  """Raise an error unless `value` is one key of random numbers, or None.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed; it may be traced.
    optional: whether None is accepted.

  Raises:
    TypeError: the value is no key.
    ValueError: it is an array of several keys.

  >>> key("key", 0)
  Traceback (most recent call last):
  TypeError: key must be a key of random numbers, or None; got 0. Make one: jax.random.key(0).
  """
  if value is None and optional:
    return
  array = isinstance(value, (jax.Array, np.ndarray))
  typed = array and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
  make = f"got {shown(value)}. Make one: jax.random.key(0)."
  if not typed and not (array and value.dtype == jnp.uint32 and value.ndim > 0):
    wanted = "a key of random numbers, or None" if optional else "a key of random numbers"
    raise TypeError(f"{name} must be {wanted}; {make}")
  if np.ndim(cast(Any, value)) != (0 if typed else 1):
    raise ValueError(f"{name} must be one key of random numbers; {make}")


def floating_dtype(name: str, value: Any) -> jnp.dtype:
  """Return a floating dtype, or raise an error.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed; None, which NumPy takes for float64, is no dtype here.

  Returns:
    The dtype.

  Raises:
    TypeError: the value is no dtype.
    ValueError: the dtype is not floating.

  >>> floating_dtype("dtype", "float16")
  dtype('float16')
  """
  try:
    found = None if value is None else jnp.dtype(value)
  except (TypeError, ValueError):
    found = None
  if found is None or isinstance(value, Mapping):
    raise TypeError(f"{name} must be a dtype, such as jnp.bfloat16; got {shown(value)}.")
  if not jnp.issubdtype(found, jnp.floating):
    raise ValueError(f"{name} must be floating, such as jnp.bfloat16; got {found}.")
  return found


def optimizer(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is an optax optimiser.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.

  Raises:
    TypeError: the value is something else, such as the function that makes an optimiser.

  >>> optimizer("phi_optimizer", optax.adam)
  Traceback (most recent call last):
  TypeError: phi_optimizer must be an optax optimiser; got the function adam. Call it with a \
learning rate, such as optax.adam(1e-3).
  """
  call = "Call it with a learning rate, such as" if callable(value) else "Write one, such as"
  wanted, hint = "an optax optimiser", f"{call} optax.adam(1e-3)."
  validate.instance(name, value, optax.GradientTransformation, wanted, hint)
