"""Check single values: numbers, flags, random keys, regular expressions, dtypes, optimisers."""

import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown


def number(name: str, value: Any) -> float:
  """Return a real number of Python, NumPy or JAX as a Python float, or raise an error.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument. A bool or a traced array does not count as a number.

  Returns:
    The number, which may be infinite or NaN.

  Raises:
    TypeError: if the value is not a real number.

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


def regex(name: str, value: Any) -> None:
  """Raise an error unless `value` is a regular expression, as a string.

  Raises:
    TypeError: if the value is not a string.
    ValueError: if the string is not a regular expression.
  """
  validate.instance(name, value, str, "a regular expression")
  try:
    re.compile(value)
  except re.error as error:
    raise ValueError(f"{name}: {value!r} is not a regular expression: {error}.") from error


def count(name: str, value: Any) -> int | jax.Array:
  """Return an integer of at least 0, or raise an error.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument: an integer, or an integer array [], which may be traced.

  Returns:
    A JAX array unchanged; any other integer as a Python int.

  Raises:
    TypeError: if the value is not an integer.
    ValueError: if the value is known and less than 0.

  >>> count("steps", np.int64(3))
  3
  """
  if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer) and not value.ndim:
    if (known := validate.known(value)) is not None and known < 0:
      raise ValueError(f"{name} must be at least 0; got {known}.")
    return value
  return validate.integer(name, value, least=0)


def flag(name: str, value: Any) -> bool:
  """Return True or False as a Python bool, or raise an error.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument.

  Returns:
    The bool.

  Raises:
    TypeError: if the value is not a bool of Python or NumPy; 0 and 1 are not accepted.

  >>> flag("remat", np.True_)
  True
  """
  validate.instance(name, value, (bool, np.bool_), "True or False")
  return bool(value)


def key(name: str, value: Any, optional: bool = True) -> None:
  """Raise an error unless `value` is one key of random numbers, or None if `optional`.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument; it may be traced.
    optional: whether None is accepted.

  Raises:
    TypeError: if the value is not a key.
    ValueError: if the value is an array of several keys.

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
    name: the name of the argument, for the error message.
    value: the value of the argument. None is refused, although NumPy reads None as float64.

  Returns:
    The dtype.

  Raises:
    TypeError: if the value is not a dtype.
    ValueError: if the dtype is not floating.

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
    name: the name of the argument, for the error message.
    value: the value of the argument.

  Raises:
    TypeError: if the value is something else, such as the function that makes an optimiser.

  >>> optimizer("phi_optimizer", optax.adam)
  Traceback (most recent call last):
  TypeError: phi_optimizer must be an optax optimiser; got the function adam. Call it with a \
learning rate, such as optax.adam(1e-3).
  """
  call = "Call it with a learning rate, such as" if callable(value) else "Write one, such as"
  wanted, hint = "an optax optimiser", f"{call} optax.adam(1e-3)."
  if isinstance(value, optax.MultiSteps):
    hint = "Pass its .gradient_transformation()."
  validate.instance(name, value, optax.GradientTransformation, wanted, hint)
