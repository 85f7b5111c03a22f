"""The comparison of adapters in miniature: our side against loops, and PEFT's if installed."""

import importlib.util
import sys

import jax
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from experiments.benchmarks.adapters import ours
from experiments.benchmarks.adapters.compare import compare
from experiments.benchmarks.adapters.problem import Problem, Sizes, document
from experiments.networks import llama

TINY = Sizes(vocabulary=11, width=8, hidden=12, layers=2, heads=2, rank=2, tasks=3, tokens=4)


@pytest.fixture(scope="module")
def problem():
  return Problem(TINY)


def test_the_model_has_the_size_that_is_said():
  shapes = llama.shapes(llama.config_of(document(Sizes())))
  leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
  assert sum(map(np.prod, leaves)) == pytest.approx(26e6, rel=0.02)


def test_every_call_is_the_loop_over_tasks(problem):
  found = {name: call() for name, call in ours.calls(problem).items()}
  network = jax.jit(lambda params, tokens: llama.apply(problem.config, params, tokens))
  own = lambda i: jax.tree.map(lambda x: x[i], problem.adapters)
  merged = [sm.lora.merge(problem.base, own(i)) for i in range(TINY.tasks)]
  want = np.stack([network(w, r[None])[0] for w, r in zip(merged, problem.rows, strict=True)])
  np.testing.assert_allclose(found["mixed"], want, atol=1e-5)
  np.testing.assert_allclose(found["mixed, one token"], want[:, :1], atol=1e-5)
  np.testing.assert_allclose(found["base"], network(problem.base, problem.rows), atol=1e-5)
  assert np.abs(found["mixed"] - found["base"]).max() > 1e-3

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradient(adapters, batch):
    logits = network(sm.lora.merge(problem.base, adapters), batch[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

  losses = []
  for batch in problem.data:
    theta = problem.start
    for _ in range(TINY.steps):
      theta = optax.tree.add_scale(theta, -TINY.rate, loss_and_gradient(theta, batch)[1])
    losses.append(loss_and_gradient(theta, batch)[0])
  np.testing.assert_allclose(found["adapt"], np.mean(losses), rtol=1e-5)


def test_the_table_of_one_side():
  rows = compare(TINY, 1, None)
  assert [row["call"] for row in rows][:2] == ["base", "mixed"]
  assert rows[1]["ours / our base"]["median"] > 0


def test_peft_finds_the_same():
  if not all(map(importlib.util.find_spec, ("torch", "transformers", "peft"))):
    pytest.skip("torch, transformers and peft are not installed")
  assert all(row["peft / ours"]["median"] > 0 for row in compare(TINY, 1, sys.executable))
