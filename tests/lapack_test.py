"""No two factorisations of a compiled program are free to run side by side: see `solvers.after`."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import shrinkmeta as sm

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


def factorisations(compiled):
  """(number of LAPACK's calls, pairs of them of which neither waits for the other)."""
  bodies, name = {}, ""
  for line in compiled.as_text().splitlines():
    if head := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      name = head[1]
      bodies[name] = []
    elif " = " in line and name:
      bodies[name].append(line)

  def inside(line):
    return "lapack_" in line or any(
      inside(inner)
      for word in re.findall(r"=\{?%?([\w.-]+)", line)
      for inner in bodies.get(word, ())
    )

  count, pairs = 0, []
  for lines in bodies.values():
    before = {}  # of every value, the factorisations that it waits for
    for line in lines:
      left, right = line.split(" = ", 1)
      waits = set().union(*(before.get(v, set()) for v in re.findall(r"%([\w.-]+)", right)))
      if inside(right):
        pairs += [(other, left) for other in before.get("", set()) - waits]
        waits.add(left.strip())
        before[""] = before.get("", set()) | {left.strip()}
        count += 1
      before[left.replace("ROOT", "").strip(" %")] = waits
  return count, pairs


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
