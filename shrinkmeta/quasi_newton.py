"""L-BFGS whose line search always ends: the default optimiser of an inner loop."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.checks import validate

PyTree = Any

_MOST_HALVINGS = 20
_ROUNDING = 8  # units in the last place by which rounding may raise the objective


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
    An optax transformation whose update wants `value`, `grad` and `value_fn`. A loop with it cannot
    be differentiated backwards through its steps.

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

  def search(slack: jax.Array | float) -> optax.GradientTransformationExtraArgs:
    # The large factor begins every search at a = 1, whatever the last one found.
    return optax.scale_by_backtracking_linesearch(
      _MOST_HALVINGS, decrease_factor=0.5, increase_factor=2.0**_MOST_HALVINGS, atol=slack
    )

  def init(params: PyTree) -> tuple[Any, Any]:
    return direction.init(params), search(0.0).init(params)

  def update(
    updates: PyTree, state: Any, params: PyTree = None, *, value: Any, grad: PyTree, value_fn: Any
  ) -> tuple[PyTree, Any]:
    updates, memory = direction.update(updates, state[0], params)
    along = optax.tree.vdot(updates, grad)  # positive where -updates descends
    plain = optax.tree.scale(1 / jnp.maximum(1.0, optax.tree.norm(grad)), grad)
    downhill = optax.tree.scale(-1.0, optax.tree.where(along > 0, updates, plain))
    slack = _ROUNDING * jnp.finfo(jnp.asarray(value).dtype).eps * jnp.abs(value)
    given: Any = {"value": value, "grad": grad, "value_fn": value_fn}
    step, last = search(slack).update(_no_reverse_mode(downhill), state[1], params, **given)
    return step, (memory, last)

  # To optax, `value`, `grad` and `value_fn` are optional; without them there is no search.
  return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _no_reverse_mode(direction: PyTree) -> PyTree:
  """Return `direction`, through a loop of one turn that JAX refuses to differentiate backwards.

  H has a factor 1 / <s, y>, 0 where a past step is missing, whose reverse derivative is NaN.
  """
  # JAX looks through a loop that leaves a value as it is, hence the factor.
  once = lambda carry: (carry[0] + 1, optax.tree.scale(1.0, carry[1]))
  return jax.lax.while_loop(
    lambda carry: carry[0] < 1, once, (jnp.zeros([], jnp.int32), direction)
  )[1]
