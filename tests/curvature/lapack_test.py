"""On a CPU no factorisation of a compiled program takes a batch: see `one_by_one`."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.curvature.one_by_one import eigh, one_by_one
from tests.compiled import factorisations

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="LAPACK is the CPU's.")
TASKS, N = 6, 5
PARAMS = {"a": {"w": jnp.ones((3, 8))}, "b": {"w": jnp.ones((8, 4))}}
LABELS = sm.by_path(PARAMS, {"a": "a", "b": "b"})
LIKELIHOOD = sm.categorical(lambda t, x: jnp.tanh(x @ t["a"]["w"]) @ t["b"]["w"])
BATCH = sm.Batch(
  jax.random.normal(jax.random.key(0), (TASKS, N, 3)),
  jnp.zeros((TASKS, N), jnp.int32),
  jnp.ones((TASKS, N)),
)


def update(make, solver="cg", **settings):
  learner = make(
    LIKELIHOOD,
    LABELS,
    inner=sm.Inner(optax.sgd(0.1), steps=3),
    implicit=sm.Implicit(solver=solver),
    phi_optimizer=optax.sgd(0.1),
    sigma_optimizer=optax.sgd(0.1),
    batching="vmap",
    **settings,
  )
  return jax.jit(learner.update).lower(
    learner.init(PARAMS), sm.Task(BATCH, BATCH), jax.random.key(0)
  )


@pytest.mark.parametrize("solver", ("cg", "dual"))
@pytest.mark.parametrize("method", ("exact", "lanczos"))
def test_evidence(solver, method):
  program = update(sm.empirical_bayes, solver, log_det=sm.LogDet(method))
  assert set(factorisations(program.compile())) == {1}


def test_restricted_evidence():
  learner = sm.empirical_bayes(
    sm.gaussian(lambda t, x: x @ t["a"] + x[:, :2] @ t["b"]),
    {"a": "a", "b": "b"},
    restricted=("a",),
    inner=sm.Inner(optax.sgd(0.1), steps=3),
    batching="vmap",
  )
  state = learner.init({"a": jnp.zeros(3), "b": jnp.zeros(2)})
  batch = BATCH._replace(targets=jnp.zeros((TASKS, N)))
  program = jax.jit(learner.update).lower(state, sm.Task(batch, None))
  assert set(factorisations(program.compile())) == {1}


def test_dual_solves():
  assert set(factorisations(update(sm.sigma_imaml, "dual").compile())) == {1}


@pytest.mark.parametrize("rank", (None, 4))
def test_predictive_twice_in_one_program(rank):
  @jax.vmap
  def variance(batch):
    log_sigma2 = {"a": 0.0, "b": 0.0}
    found = sm.posterior(LIKELIHOOD, LABELS, PARAMS, log_sigma2, PARAMS, batch, rank=rank)
    return found.predictive(batch.inputs).variance

  two = jax.jit(lambda one, other: (variance(one), variance(other)))
  assert set(factorisations(two.lower(BATCH, BATCH).compile())) == {1}


def test_adapters_of_stacked_kernels():
  params = {"q": jnp.zeros((3, 8, 8)), "v": jnp.zeros((3, 8, 8)), "o": jnp.zeros((8, 8))}
  init = jax.jit(lambda key: sm.lora.init(key, params, {".": 2}))
  assert factorisations(init.lower(jax.random.key(0)).compile()) == 6 * [1]  # geqrf and orgqr


def test_a_batch_is_found():
  both = jax.jit(lambda a: (jnp.linalg.svd(a), jnp.linalg.eigh(a[0]))).lower(jnp.ones((3, 4, 4)))
  assert sorted(factorisations(both.compile())) == [1, 3]


def test_one_by_one_is_vmap(rng=np.random.default_rng(0)):
  a, b = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(3, 4))
  solve = lambda a, b: jnp.linalg.solve(a, b)
  axes = ((0, None), (0, 0))
  run = lambda f: jax.vmap(jax.vmap(f, axes[1]), axes[0])(jnp.asarray(a), jnp.asarray(b))
  np.testing.assert_allclose(run(one_by_one(solve)), run(solve), rtol=1e-4)


@pytest.mark.parametrize(("platform", "loops"), (("cpu", 1), ("cuda", 0)))
def test_a_gpu_takes_the_whole_batch(platform, loops):
  f = jax.vmap(eigh)
  lowered = jax.jit(f).trace(jnp.ones((3, 4, 4))).lower(lowering_platforms=(platform,))
  assert lowered.as_text().count("stablehlo.while") == loops


def test_two_devices_factorise_large_matrices_at_once():
  """It ends: each device factorises one matrix after another."""
  code = """
    import jax, jax.numpy as jnp, optax
    import shrinkmeta as sm
    learner = sm.empirical_bayes(
      sm.gaussian(lambda theta, x: x @ theta["w"]),
      {"w": "w"},
      inner=sm.Inner(optax.sgd(0.1), steps=1),
      batching="vmap",
      mesh=sm.task_mesh(),
    )
    x = jax.random.normal(jax.random.key(0), (16, 100, 100))
    tasks = sm.Task(sm.Batch(x, x[:, 0]), None)
    update, state = jax.jit(learner.update), learner.init({"w": jnp.zeros(100)})
    for _ in range(20):
      state, metrics = jax.block_until_ready(update(state, tasks))
    assert jax.device_count() == 2 and int(metrics.num_failed) == 0, metrics
  """
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  command = [sys.executable, "-c", textwrap.dedent(code)]
  subprocess.run(command, env=os.environ | flags, check=True, timeout=300)
