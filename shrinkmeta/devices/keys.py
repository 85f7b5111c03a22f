"""Keys of random numbers that give the same numbers however a program is batched.

Keys of the kind "rbg", usual on TPUs, are faster. But what such a key draws under `jax.vmap`
depends on the other keys of the batch: task i would draw other numbers in another batch. Keys of
the kind "threefry2x32", JAX's default, depend on nothing else.
"""

from typing import overload

import jax
import jax.numpy as jnp


@overload
def same_in_any_batch(key: None) -> None: ...
@overload
def same_in_any_batch(key: jax.Array) -> jax.Array: ...
def same_in_any_batch(key: jax.Array | None) -> jax.Array | None:
  """Return a key whose draws and folds are the same in any batch of tasks.

  A threefry key is returned as it is. A threefry key is made from the words of any other key, once,
  where the key comes in: before a task's number is folded into it, and before anything is drawn.

  Args:
    key: of `jax.random.key`, or the uint32 array of `jax.random.PRNGKey`; None is returned.

  >>> key = jax.random.key(0)
  >>> same_in_any_batch(key) is key
  True
  >>> jax.random.key_impl(same_in_any_batch(jax.random.key(0, impl="rbg")))
  'threefry2x32'
  """
  if key is None:
    return None
  typed = key
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    typed = jax.random.wrap_key_data(key)
  if str(jax.random.key_impl(typed)) == "threefry2x32":
    return key
  words = jax.random.key_data(typed)
  made = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for word in words[2:]:
    made = jax.random.fold_in(made, word)
  return made
