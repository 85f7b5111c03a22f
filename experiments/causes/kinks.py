"""Precise data: does the objective of a ReLU network have a gradient at its mode?

A ReLU network is linear in pieces. The mode of a task with precise data may lie where a hidden unit
is exactly 0 at an example. The gradient jumps there, so no optimiser brings it to 0, and the
implicit function theorem does not hold. With tanh the objective is smooth.

The network 1-WIDTH-WIDTH-1 is fitted to sinusoids with both, in float64, from the same shared
parameters. The table compares the derivative of the validation loss along log sigma² of all modules
by the implicit rule with central differences of solved modes.
"""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

import shrinkmeta as sm
from experiments.datasets import sinusoid
from experiments.networks import MLP

WIDTH, SHOTS, SIGMA, NOISE = 10, 20, 0.3, 0.3
STEPS = (100, 1_000, 5_000)  # of L-BFGS
_H = 1e-4  # of the differences


class Solved(NamedTuple):
  """Modes of some tasks, by their medians over tasks."""

  activation: str
  inner_steps: int
  converged_percent: float
  gradient_norm_at_mode: float
  implicit_derivative: float
  difference: float


def solve(
  activation: Literal["relu", "tanh"], all_steps: tuple[int, ...], count: int
) -> list[Solved]:
  """Find the modes of `count` tasks by each number of L-BFGS steps."""
  net = MLP(1, WIDTH, activation)
  predict = lambda theta, x: cast(jax.Array, net.apply({"params": theta}, x))[..., 0]
  likelihood = sm.gaussian(predict, NOISE)
  tasks = sinusoid.draw(jax.random.key(1), count, SHOTS, 0.0)
  params = net.init(jax.random.key(0), tasks.train.inputs[0])["params"]
  params = jax.tree.map(lambda p: p.astype(tasks.train.inputs.dtype), params)  # flax has float32
  labels = sm.by_layer(params)
  inner = sm.Inner(sm.lbfgs(), tol=1e-9)
  implicit = sm.Implicit(curvature="hessian", max_steps=300, tol=1e-10)

  def loss(
    shift: jax.Array, train: sm.Batch, val: sm.Batch, steps: jax.Array
  ) -> tuple[jax.Array, sm.InnerInfo]:
    log_sigma2 = {m: 2 * jnp.log(SIGMA) + shift for m in set(jax.tree.leaves(labels))}
    theta, info = sm.map_estimate(
      likelihood, labels, params, log_sigma2, train, inner, implicit, steps=steps
    )
    return -jnp.mean(likelihood.log_prob(likelihood.predict(theta, val.inputs), val.targets)), info

  @jax.jit
  def modes(steps: jax.Array) -> tuple[sm.InnerInfo, jax.Array, jax.Array]:
    def one(train: sm.Batch, val: sm.Batch) -> Any:
      at = lambda shift: loss(shift, train, val, steps)[0]
      slope, info = jax.grad(loss, has_aux=True)(jnp.zeros([]), train, val, steps)
      high, low = jax.lax.map(at, jnp.array([_H, -_H]))
      return info, slope, (high - low) / (2 * _H)

    return jax.vmap(one)(tasks.train, tasks.val)

  found = []
  middle = lambda x: float(jnp.median(x))
  for steps in all_steps:
    info, slope, difference = modes(jnp.asarray(steps))
    share = 100 * float(jnp.mean(info.converged))
    found.append(
      Solved(activation, steps, share, *map(middle, (info.grad_norm, slope, difference)))
    )
  return found


def run(steps: tuple[int, ...] = STEPS, count: int = 8) -> list[Solved]:
  """Return both networks for each number of steps; float64."""
  with jax.enable_x64(True):
    return [*solve("relu", steps, count), *solve("tanh", steps, count)]


def record(found: Solved) -> dict[str, Any]:
  """Return a line of the table."""
  return {
    "activation": found.activation,
    "inner_steps": found.inner_steps,
    "converged_percent": f"{found.converged_percent:.0f}",
    "gradient_norm_at_mode": f"{found.gradient_norm_at_mode:.2g}",
    "implicit_derivative": f"{found.implicit_derivative:.4g}",
    "difference_of_solved_modes": f"{found.difference:.4g}",
  }
