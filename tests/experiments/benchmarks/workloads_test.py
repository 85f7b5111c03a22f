"""Workloads have the stated sizes, and operations counted by hand equal XLA's count."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from experiments.benchmarks import flops, workloads
from experiments.networks import convnet

NAMES = tuple(workloads.WORKLOADS)


def parameters(name: str) -> int:
  workload = workloads.load(name, tasks=1)
  problem = jax.eval_shape(lambda: workloads.make_problem(workload, 0).params)
  return sum(x.size for x in jax.tree.leaves(problem))


def test_sizes():
  assert parameters("w1") == 640 + 3 * 36_928 + 4 * 128 + 325
  assert parameters("w3") == 80 + 1640 + 41
  assert 5e6 < parameters("w4") < 2e7


@pytest.mark.parametrize("name", NAMES)
def test_tasks_by_seed(name):
  workload = workloads.load(name, tiny=True)
  tasks = workloads.make_tasks(workload, 3)
  assert tasks.train.inputs.shape[:2] == (workload.tasks, workload.examples)
  assert tasks.val.targets.shape[:2] == (workload.tasks, workload.ways * workload.queries)
  again = workloads.make_tasks(workload, 3)
  np.testing.assert_array_equal(tasks.val.inputs, again.val.inputs)


def test_same_steps_as_with_a_proximal_term():
  """In z with sigma^2 = 1 / (prior N), or in theta on mean loss + prior |theta - phi|^2 / 2."""
  workload = workloads.load("w3", tasks=1)
  problem = workloads.make_problem(workload, 0)
  learner = workloads.make_learner(workload, "imaml", problem)
  train = jax.tree.map(lambda x: x[0], problem.tasks.train)
  theta, _ = jax.jit(learner.adapt)(learner.init(problem.params), train)

  def loss(theta):
    return jax.numpy.square(problem.likelihood.predict(theta, train.inputs) - train.targets).mean()

  gradient, other, phi = jax.jit(jax.grad(loss)), problem.params, problem.params
  for _ in range(workload.mode_steps):
    other = jax.tree.map(
      lambda q, d, p: q - workload.rate * (d + workload.prior * (q - p)),
      other,
      gradient(other),
      phi,
    )
  chex.assert_trees_all_close(theta, other, atol=1e-5)


@pytest.mark.parametrize("name, tolerance", [("w1", 0.15), ("w3", 0.06), ("w4", 0.06)])
def test_forward_operations(monkeypatch, name, tolerance):
  """XLA counts elementwise work too, and of a convolution not the products with padding.

  The convolution is XLA's own, which multiplies as often as the definition says.
  """
  layout = ("NHWC", "HWIO", "NHWC")
  conv = lambda x, kernel: jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=layout
  )
  monkeypatch.setattr(convnet, "conv3x3", conv)
  workload = workloads.load(name, tasks=1)
  inputs = workloads.make_tasks(workload, 0).train.inputs[0]
  net = workloads.network(workload)
  variables = jax.eval_shape(net.init, jax.random.key(0), inputs)
  costs = jax.jit(net.apply).lower(variables, inputs).cost_analysis()
  assert costs["flops"] == pytest.approx(len(inputs) * flops.forward(workload), rel=tolerance)


def test_operations_of_a_step():
  w = workloads.load("w1")
  f, train, val = flops.forward(w), 5, 75
  assert flops.step(w, "reptile") == 16 * 5 * 3 * train * f
  assert flops.step(w, "maml") == 16 * (5 * 9 * train + 3 * val) * f
  assert flops.step(w, "imaml") == 16 * (16 * 3 * train + 3 * train + 5 * 6 * train + 3 * val) * f
  less = flops.step(w, "imaml") - flops.step(w, "imaml", "gauss_newton")
  assert less == 16 * (2 + 5 * 2) * train * f
  few = workloads.load("w4")
  assert flops.step(few, "sigma_imaml") < 0.5 * flops.step(
    dataclasses.replace(few, moving=None), "sigma_imaml"
  )
