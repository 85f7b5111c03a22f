"""Keys of random numbers whose draws do not depend on how the tasks are batched.

Keys of the kind "rbg", usual on TPUs, are faster. But under `jax.vmap` the numbers that such a key
draws depend on the other keys of the batch (docs/hazards.md#rbg-keys). Task i would then draw other
numbers in another batch. The draws of a key of the kind "threefry2x32", JAX's default, depend only
on this key.
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

  A threefry key is returned unchanged. Any other key is converted to a threefry key, made from the
  integers of that key. Call this function once, on the key that the user passes: before the number
  of a task is folded into the key, and before anything is drawn.

  Args:
    key: a key of `jax.random.key`, or the uint32 array of `jax.random.PRNGKey`, or None.

  Returns:
    A key, or None if `key` is None.

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
