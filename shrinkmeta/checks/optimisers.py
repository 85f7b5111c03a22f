"""Find out what an optax optimiser needs, and whether JAX can differentiate its steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

PyTree = Any
_NEEDS = ((), ("value", "grad"), ("value", "grad", "value_fn"))


def needs(optimizer: optax.GradientTransformation, params: PyTree) -> tuple[str, ...]:
  """Return the names of the keyword arguments that `optimizer.update` requires.

  They are found by tracing one update.

  Args:
    optimizer: any optax optimiser.
    params: a pytree of arrays with the structure that the optimiser will get.

  Returns:
    (), ("value", "grad") or ("value", "grad", "value_fn"). If the traced update fails for another
    reason, the result is (), and the first real update reports the error.

  >>> needs(optax.lbfgs(), jnp.ones(2))
  ('value', 'grad', 'value_fn')
  """
  for names in _NEEDS:
    try:
      jax.eval_shape(lambda p, names=names: _step(optimizer, p, names), params)
    except TypeError as error:
      if "keyword-only argument" not in str(error):
        return ()
    except Exception:  # noqa: BLE001 (an optimiser may refuse these params in any way)
      return ()
    else:
      return names
  return ()


def differentiable(optimizer: optax.GradientTransformation, params: PyTree) -> bool:
  """Tell whether JAX can differentiate in reverse mode through one step of the optimiser.

  Args:
    optimizer: any optax optimiser.
    params: a pytree of arrays with the structure that the optimiser will get.

  Returns:
    False if JAX refuses reverse mode. If the step fails for another reason, the result is True,
    and the first real update reports the error.

  >>> differentiable(optax.adam(0.1), jnp.ones(2)), differentiable(optax.lbfgs(), jnp.ones(2))
  (True, False)
  """
  try:
    jax.make_jaxpr(jax.grad(lambda p: _sum(_step(optimizer, p, _NEEDS[-1]))))(params)
  except ValueError as error:
    return "Reverse-mode differentiation" not in str(error)
  except Exception:  # noqa: BLE001 (an optimiser may refuse these params in any way)
    return True
  return True


def warn_if_endless(optimizer: optax.GradientTransformation, params: PyTree) -> None:
  """Log a warning if an inner optimiser has a line search that may never end on a CPU.

  It is optax's zoom line search: `docs/hazards.md#line-search`.

  Args:
    optimizer: any optax optimiser. If it raises an error for `params`, this function does nothing,
      and the first real update reports the error.
    params: a pytree of arrays with the structure that the optimiser will get.
  """
  is_zoom = lambda x: isinstance(x, optax.ScaleByZoomLinesearchState)
  try:
    state = jax.eval_shape(optimizer.init, params)
  except Exception:  # noqa: BLE001 (an optimiser may refuse these params in any way)
    return
  if any(map(is_zoom, jax.tree.leaves(state, is_leaf=is_zoom))):
    logging.warning(
      "Inner.optimizer has optax's zoom line search, which may never end on a CPU "
      "(docs/hazards.md#line-search): take Inner(sm.lbfgs())."
    )


def _step(
  optimizer: optax.GradientTransformation, params: PyTree, names: tuple[str, ...]
) -> PyTree:
  """Take one step on the loss |params|^2 / 2, with the keyword arguments `names`."""
  loss = lambda p: 0.5 * _sum(jax.tree.map(jnp.square, p))
  value, grad = jax.value_and_grad(loss)(params)
  given = {"value": value, "grad": grad, "value_fn": loss}
  optimizer = optax.with_extra_args_support(optimizer)
  keywords = {name: given[name] for name in names}
  return optimizer.update(grad, optimizer.init(params), params, **keywords)[0]


def _sum(tree: PyTree) -> jax.Array:
  """Return the sum [] of all entries of a tree."""
  return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), jnp.zeros([]))
