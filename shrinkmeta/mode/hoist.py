"""Compute once, before the inner loop, everything that does not depend on task-specific parameters.

If the first modules of a network are frozen and the batch is fixed, their outputs are constant
features of the batch. `predict` is traced, and each operation that needs no task-specific parameter
is evaluated before the loop. So the user need not say where the network splits, and branches that
depend on the inputs alone are found too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

PyTree = Any

# The primitives of compiled calls, and the parameter that holds the jaxpr of each. `hoist` splits
# the operations inside these calls. Any other call counts as one operation. The names depend on the
# version of JAX (docs/hazards.md#jaxpr-names).
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
# The outputs of these primitives are larger than their inputs. To save memory, g computes them
# again instead of keeping them as features.
_INFLATING = ("broadcast_in_dim", "iota")


class _Later:
  """A placeholder for a value that g receives or computes."""


class _Step(NamedTuple):
  """One operation of g."""

  eqn: JaxprEqn
  inputs: list[Any]  # arrays if they are known now, otherwise _Later
  outputs: list[_Later]


class _Cut(NamedTuple):
  """The operations of g, and the known values that g computes again."""

  later: list[_Step]  # in the order of evaluation
  inflated: dict[int, tuple[JaxprEqn, list[Any], Any]]  # id of a value -> (eqn, inputs, the value)


def hoist(
  f: Callable[[PyTree, PyTree], PyTree], moving: PyTree, inputs: PyTree
) -> tuple[Callable[[PyTree, PyTree], PyTree], list[jax.Array]]:
  """Split f into features and a function g with g(moving, features) = f(moving, inputs).

  Args:
    f: a function of arrays. Arrays that it closes over count as fixed, like `inputs`.
    moving: the first argument of f, the task-specific parameters. g takes any values of these
      shapes and dtypes.
    inputs: the second argument of f, which stays fixed.

  Returns:
    (g, features), with features a list of arrays. They are differentiable in `inputs` and in the
    arrays that f closes over.
  """
  closed, shape = jax.make_jaxpr(f, return_shape=True)(moving, inputs)
  slots = [_Later() for _ in jax.tree.leaves(moving)]
  cut = _Cut([], {})
  outputs = _run(closed.jaxpr, closed.consts, [*slots, *jax.tree.leaves(inputs)], cut)
  used = [x for step in cut.later for x in step.inputs] + outputs
  features = {id(x): x for x in used if isinstance(x, jax.Array)}
  structure = jax.tree.structure(moving)

  def g(moving: PyTree, features_now: list[jax.Array]) -> PyTree:
    if jax.tree.structure(moving) != structure:
      raise ValueError(f"Expected parameters {structure}; got {jax.tree.structure(moving)}.")
    env: dict[int, Any] = dict(zip(features, features_now, strict=True))
    env |= {id(s): x for s, x in zip(slots, jax.tree.leaves(moving), strict=True)}
    read = lambda x: env.get(id(x), x)
    for step in cut.later:
      values = _evaluate(step.eqn, [read(x) for x in step.inputs])
      env |= {id(s): v for s, v in zip(step.outputs, values, strict=True)}
    return jax.tree.unflatten(jax.tree.structure(shape), [read(x) for x in outputs])

  return g, list(features.values())


def _run(jaxpr: Jaxpr, consts: list[Any], args: list[Any], cut: _Cut) -> list[Any]:
  """Evaluate the operations whose inputs are known, and append the others to `cut.later`.

  Operations with side effects are appended too.

  Returns:
    the outputs of `jaxpr`, each an array or a _Later.
  """
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda v: v.val if isinstance(v, Literal) else env[v]
  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    unknown = any(isinstance(x, _Later) for x in inputs)
    if unknown and (name := _CALLS.get(eqn.primitive.name)):
      inner = eqn.params[name]
      outputs = _run(inner.jaxpr, inner.consts, inputs, cut)
    elif unknown or eqn.effects:
      inputs = [_inflate(x, cut) for x in inputs]
      outputs = [_Later() for _ in eqn.outvars]
      cut.later.append(_Step(eqn, inputs, outputs))
    else:
      outputs = _evaluate(eqn, inputs)
      if eqn.primitive.name in _INFLATING:
        # `cut` keeps the value alive, so that Python cannot give its id to another object.
        cut.inflated[id(outputs[0])] = eqn, inputs, outputs[0]
    env |= dict(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _inflate(x: Any, cut: _Cut) -> Any:
  """Return x, or a placeholder if g computes x again; append that operation to `cut.later`."""
  if id(x) not in cut.inflated:
    return x
  eqn, inputs, _ = cut.inflated[id(x)]
  output = _Later()
  cut.later.append(_Step(eqn, [_inflate(i, cut) for i in inputs], [output]))
  return output


def _evaluate(eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
  """Evaluate one equation, and return its outputs."""
  with eqn.ctx.manager:  # the context of the trace: device placement and metadata
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
  return list(outputs) if eqn.primitive.multiple_results else [outputs]
