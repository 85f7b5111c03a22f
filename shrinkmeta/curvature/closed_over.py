"""Turn floats in the closures of a likelihood's functions into arguments of these functions.

JAX differentiates a function with a custom derivative rule only with respect to its arguments. The
scale of `sm.gaussian(predict, scale)` is not an argument of predict or log_prob: log_prob closes
over it. If the scale is traced, as under `jax.grad`, it must become an argument.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch

PyTree = Any
Consts = list[jax.Array]
Opened = Callable[[Consts], Likelihood]


def open_likelihood(likelihood: Likelihood, theta: PyTree, batch: Batch) -> tuple[Consts, Opened]:
  """Return the traced floats that a likelihood closes over, and a function that replaces them.

  Args:
    likelihood: the network and the density of the targets given its outputs.
    theta: parameters. Only their shapes and dtypes are read.
    batch: examples, leaves [N, ...]. Only their shapes and dtypes are read.

  Returns:
    (values, rebuild). values is a list of the traced floats. `rebuild(new)` is the likelihood with
    the list `new` in place of `values`. If `values` is empty, `rebuild` returns the likelihood
    itself.

  >>> def scaled(scale):
  ...   likelihood = Likelihood(lambda t, x: t * x, lambda f, y: -0.5 * ((y - f) / scale) ** 2)
  ...   values, rebuild = open_likelihood(likelihood, 1.0, Batch(jnp.ones(2), jnp.ones(2)))
  ...   return rebuild([2.0 * v for v in values]).log_prob(jnp.zeros(2), jnp.ones(2))[0]
  >>> jax.vmap(scaled)(jnp.ones(1))  # -(1 / 2)^2 / 2: a traced scale, doubled
  Array([-0.125], dtype=float32)
  """
  both = lambda theta, x, y: likelihood.log_prob(likelihood.predict(theta, x), y)
  held = jax.make_jaxpr(both)(theta, batch.inputs, batch.targets).consts
  constant = {id(c) for c in jax.tree.leaves(getattr(likelihood.predict, "constants", None))}
  held = [c for c in held if isinstance(c, jax.core.Tracer) and id(c) not in constant]
  values: Consts = [c for c in held if jnp.issubdtype(c.dtype, jnp.inexact)]
  places = {id(value): i for i, value in enumerate(values)}

  def rebuild(now: Consts) -> Likelihood:
    def opened(f: Callable[..., PyTree]) -> Callable[..., PyTree]:
      def g(*args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        consts = [now[places[id(c)]] if id(c) in places else c for c in closed.consts]
        flat = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

      return g

    return Likelihood(opened(likelihood.predict), opened(likelihood.log_prob))

  return values, rebuild if values else lambda now: likelihood
