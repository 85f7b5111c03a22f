"""Turn what a likelihood's functions close over into an argument of these functions.

JAX differentiates a function with a custom derivative rule only with respect to its arguments. The
scale of `sm.gaussian(predict, scale)` is not an argument of predict or log_prob: log_prob closes
over it. If the scale is traced, as under `jax.grad`, it must become an argument. So must all other
traced values: when `jax.grad` differentiates a compiled function, the rule runs after the trace of
that function has ended.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch
from shrinkmeta.model.variants import WithConstants

PyTree = Any


class Consts(NamedTuple):
  """What a likelihood depends on beside its arguments."""

  floats: Sequence[jax.Array]  # traced floats, with a derivative
  fixed: PyTree = None  # other traced values and traced constants, without a derivative


Opened = Callable[[Consts], Likelihood]


def open_likelihood(likelihood: Likelihood, theta: PyTree, batch: Batch) -> tuple[Consts, Opened]:
  """Return the traced values that a likelihood closes over, and a function that replaces them.

  Args:
    likelihood: the network and the density of the targets given its outputs.
    theta: parameters. Only their shapes and dtypes are read.
    batch: examples, leaves [N, ...]. Only their shapes and dtypes are read.

  Returns:
    (values, rebuild). `rebuild(new)` is the likelihood with `new` in place of `values`.

  >>> def scaled(scale):
  ...   likelihood = Likelihood(lambda t, x: t * x, lambda f, y: -0.5 * ((y - f) / scale) ** 2)
  ...   values, rebuild = open_likelihood(likelihood, 1.0, Batch(jnp.ones(2), jnp.ones(2)))
  ...   doubled = Consts([2.0 * v for v in values.floats], values.fixed)
  ...   return rebuild(doubled).log_prob(jnp.zeros(2), jnp.ones(2))[0]
  >>> jax.vmap(scaled)(jnp.ones(1))  # -(1 / 2)^2 / 2: a traced scale, doubled
  Array([-0.125], dtype=float32)
  """
  predict, log_prob = likelihood.predict, likelihood.log_prob
  constants = None
  is_traced = lambda x: isinstance(x, jax.core.Tracer)
  if isinstance(predict, WithConstants) and any(map(is_traced, jax.tree.leaves(predict.constants))):
    predict, constants = predict.predict, predict.constants
  given = () if constants is None else (constants,)
  both = lambda theta, x, y, *constants: log_prob(predict(theta, x, *constants), y)
  held = jax.make_jaxpr(both)(theta, batch.inputs, batch.targets, *given).consts
  traced = [c for c in held if is_traced(c)]
  is_float = lambda c: jnp.issubdtype(c.dtype, jnp.inexact)
  floats = [c for c in traced if is_float(c)]
  others = [c for c in traced if not is_float(c)]
  places = {id(value): i for i, value in enumerate((*floats, *others))}

  def rebuild(now: Consts) -> Likelihood:
    others, constants = now.fixed
    values = (*now.floats, *others)

    def opened(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
      def g(*args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        consts = [values[places[id(c)]] if id(c) in places else c for c in closed.consts]
        flat = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

      return g if places else f

    network = opened(predict)
    network = network if constants is None else WithConstants(network, constants)
    return Likelihood(network, opened(log_prob))

  return Consts(floats, (others, constants)), rebuild
