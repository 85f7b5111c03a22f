"""L-BFGS whose line search always ends: the default optimiser of an inner loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from shrinkmeta.checks import validate

PyTree = Any

_MOST_HALVINGS = 20
_ROUNDING = 8  # units in the last place by which rounding may raise the objective
_ONE_VECTOR = (
  2**20
)  # entries; a tree of more stays as it is, since its leaves may be on many devices


class LbfgsState(NamedTuple):
  """The state of `lbfgs`; `optax.value_and_grad_from_state` reads the last two fields."""

  memory: optax.OptState  # of the past steps
  value: jax.Array  # [] J after the step; inf if the update was not told to store it
  grad: PyTree  # its gradient there; 0 if the update was not told to store it


def lbfgs(memory_size: int = 10) -> optax.GradientTransformationExtraArgs:
  """Return L-BFGS with a backtracking line search, for objectives without noise.

  The direction of a step is u = -H g, where H is the limited-memory estimate of the inverse
  Hessian. The step a u begins at a = 1 and is halved, at most 20 times, until J falls enough:

      J(z + a u) <= J(z) + 1e-4 a <u, g> + 8 eps |J(z)|,   a = 1, 1/2, 1/4, ...

  The last term accepts a step whose gain is smaller than the rounding error of J. So the gradient
  still shrinks close to the mode. If u is not a direction of descent, for example because of
  negative curvature, the step follows -g instead.

  `optax.lbfgs()` has another line search, which under `jax.vmap` on a CPU may not end
  (docs/hazards.md#line-search).

  Args:
    memory_size: the number of past steps from which H is estimated.

  Returns:
    An optax transformation whose update wants `value`, `grad` and `value_fn`. With
    `store_grad=True` the new state has the value and the gradient after the step, for the price of
    the gradient alone, because the line search has computed the value. A loop with it cannot be
    differentiated backwards through its steps.

  Raises:
    TypeError, ValueError: `memory_size` is no whole number of at least 1.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> linear = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> batch = sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  >>> inner = sm.Inner(sm.lbfgs(), steps=10)
  >>> theta, _ = sm.map_estimate(
  ...   linear, {"w": "w"}, {"w": jnp.zeros(2)}, {"w": 0.0}, batch, inner
  ... )
  >>> [round(float(v), 4) for v in theta["w"]]
  [0.5, 1.0]

  References: Nocedal, Wright, Numerical Optimization, 2006, sections 3.1 and 7.2.
  """
  direction = optax.scale_by_lbfgs(validate.integer("memory_size", memory_size, least=1))

  def unknown(params: PyTree, memory: Any) -> LbfgsState:
    inf = jnp.full([], jnp.inf, jnp.result_type(*jax.tree.leaves(params) or [float]))
    return LbfgsState(memory, inf, optax.tree.zeros_like(params))

  def init(params: PyTree) -> LbfgsState:
    return unknown(params, direction.init(_one_vector(params)[0](params)))

  def update(
    updates: PyTree,
    state: LbfgsState,
    params: PyTree = None,
    *,
    value: Any,
    grad: PyTree,
    value_fn: Callable[[PyTree], Any],
    store_grad: bool = False,
  ) -> tuple[PyTree, LbfgsState]:
    flat, tree = _one_vector(params)
    state = unknown(params, state.memory)
    params, updates, grad = flat(params), flat(updates), flat(grad)
    updates, memory = direction.update(updates, state.memory, params)
    along = optax.tree.vdot(updates, grad)  # positive where -updates descends
    plain = optax.tree.scale(1 / jnp.maximum(1.0, optax.tree.norm(grad)), grad)
    downhill = optax.tree.scale(-1.0, optax.tree.where(along > 0, updates, plain))
    slack = _ROUNDING * jnp.finfo(jnp.asarray(value).dtype).eps * jnp.abs(value)
    # A new state begins the search at a = 1, whatever the last one found.
    search = optax.scale_by_backtracking_linesearch(
      _MOST_HALVINGS, decrease_factor=0.5, atol=slack, store_grad=store_grad
    )
    # With `store_grad` optax's search takes only objectives in JAX's default float
    # (findings/optax_store_grad_dtype.sh).
    objective = lambda params: jnp.asarray(value_fn(tree(params)), float)
    given: Any = {"value": value, "grad": grad, "value_fn": objective}
    step, last = search.update(_no_reverse_mode(downhill), search.init(params), params, **given)
    state = state._replace(memory=memory)
    if store_grad:
      found: Any = last
      new, old = (found.value, found.grad), (value, grad)
      value, grad = optax.tree.where(found.learning_rate > 0, new, old)  # 0: no step was found
      state = state._replace(value=value.astype(state.value.dtype), grad=tree(grad))
    return tree(step), state

  # To optax, `value`, `grad` and `value_fn` are optional; without them there is no search.
  return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _one_vector(like: PyTree) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
  """Return (flat, tree): `flat` makes one vector of a tree like `like`, and `tree` undoes this.

  L-BFGS takes some forty operations on each array, and a small array costs as much time as a large
  one. Both functions return large trees as they are.
  """
  if sum(leaf.size for leaf in jax.tree.leaves(like)) > _ONE_VECTOR:
    return lambda whole: whole, lambda whole: whole
  return lambda whole: ravel_pytree(whole)[0], ravel_pytree(like)[1]


def _no_reverse_mode(direction: PyTree) -> PyTree:
  """Return `direction`, through a loop of one turn that JAX refuses to differentiate backwards.

  H has a factor 1 / <s, y>, 0 where a past step is missing, whose reverse derivative is NaN.
  """
  # JAX looks through a loop that leaves a value as it is, hence the factor.
  once = lambda carry: (carry[0] + 1, optax.tree.scale(1.0, carry[1]))
  return jax.lax.while_loop(
    lambda carry: carry[0] < 1, once, (jnp.zeros([], jnp.int32), direction)
  )[1]
