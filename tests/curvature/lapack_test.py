"""No two factorisations of a compiled program can run at the same time: see `solvers.after`."""

import jax
import jax.numpy as jnp
import optax
import pytest

import shrinkmeta as sm
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


def update(make, solver):
  learner = make(
    LIKELIHOOD,
    LABELS,
    inner=sm.Inner(optax.sgd(0.1), steps=3),
    implicit=sm.Implicit(solver=solver),
    phi_optimizer=optax.sgd(0.1),
    sigma_optimizer=optax.sgd(0.1),
    batching="vmap",
  )
  return jax.jit(learner.update).lower(learner.init(PARAMS), sm.Task(BATCH, BATCH)).compile()


@pytest.mark.parametrize("solver", ("cg", "dual"))
def test_evidence(solver):
  count, pairs = factorisations(update(sm.empirical_bayes, solver))
  assert count == {"cg": 4, "dual": 8}[solver]  # eigh, geqrf, orgqr, gesdd
  assert not pairs


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
  count, pairs = factorisations(program.compile())
  assert count > 8
  assert not pairs


def test_dual_solves():
  assert factorisations(update(sm.sigma_imaml, "dual")) == (4, [])


def test_predictive():
  @jax.vmap
  def variance(batch):
    log_sigma2 = {"a": 0.0, "b": 0.0}
    found = sm.posterior(LIKELIHOOD, LABELS, PARAMS, log_sigma2, PARAMS, batch)
    return found.predictive(batch.inputs).variance

  assert factorisations(jax.jit(variance).lower(BATCH).compile()) == (4, [])


def test_side_by_side_is_found():
  both = jax.jit(lambda a: (jnp.linalg.svd(a), jnp.linalg.eigh(a))).lower(jnp.ones((3, 4, 4)))
  count, pairs = factorisations(both.compile())
  assert count == 2
  assert len(pairs) == 1
