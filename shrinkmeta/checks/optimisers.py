"""Find out what an optax optimiser needs, and whether JAX can differentiate its steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

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
