"""The mode and its derivative agree with closed forms, and with differences on networks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from shrinkmeta.gradients.implicit import implicit_gradient
from shrinkmeta.mode import optimise as inner_lib
from shrinkmeta.mode.task_model import task_model

pytestmark = pytest.mark.usefixtures("x64")

# D = 45 parameters in five modules, one of them frozen; N = 70 examples.
SIZES = {"a": (4, 3), "b": (10,), "c": (9,), "d": (8,), "e": (6,)}
LOG_SIGMA2 = {
  "a": np.log(1e-6), "b": np.log(1e-2), "c": 0.3, "d": np.log(1e2), "e": -np.inf
}  # fmt: skip
D, N, SCALE = 45, 70, 0.7
# Heavy ball with the best constants for a curvature of J / N from 1 / 70 to 10; seconds less to
# compile than L-BFGS, and as exact as rounding lets it.
MODE = sm.Inner(optax.sgd(0.37, momentum=0.86), steps=3000, tol=1e-13)
LBFGS = sm.Inner(sm.lbfgs(), steps=1000, tol=1e-11)
# CG ends in at most D + 1 steps but for rounding; all solvers here are exact to 1e-12 or so.
SOLVERS = {
  "cg": sm.Implicit(solver="cg", max_steps=400, tol=1e-13),
  "cg, hessian": sm.Implicit(solver="cg", curvature="hessian", max_steps=400, tol=1e-13),
  "dual": sm.Implicit(solver="dual"),
}


def model_of(likelihood, labels, phi, log_sigma2, batch, frozen=frozenset()):
  return task_model(likelihood, labels, sm.MetaParams(phi, log_sigma2), batch, frozen)


def solve_of(implicit, likelihood, labels, frozen=frozenset()):
  """(phi, log_sigma2, batch, z, g, key) -> (the gradient, w, the SolveInfo)."""

  def solve(phi, log_sigma2, batch, z, g, key=None):
    model = model_of(likelihood, labels, phi, log_sigma2, batch, frozen)
    return implicit_gradient(implicit, model, z, g, key=key)[:3]

  return solve


@functools.cache
def linear_solve(implicit, frozen=frozenset()):
  return jax.jit(solve_of(implicit, LINEAR, {m: m for m in SIZES}, frozen))


def flat(tree):
  return ravel_pytree(tree)[0]


def by_module(vector):
  ends = np.cumsum([np.prod(shape) for shape in SIZES.values()])
  parts = zip(SIZES.items(), np.split(np.asarray(vector), ends[:-1]), strict=True)
  return {m: part.reshape(shape) for (m, shape), part in parts}


def linear_predict(theta, inputs):
  return inputs @ flat(theta)


LINEAR = sm.gaussian(linear_predict, SCALE)


def linear_problem(seed=0, n=N):
  """(labels, phi, batch); every module is one leaf."""
  rng = np.random.default_rng(seed)
  phi = {m: jnp.asarray(rng.normal(size=shape)) for m, shape in SIZES.items()}
  inputs = jnp.asarray(rng.normal(size=(n, D)) / np.sqrt(D))
  targets = inputs @ flat(phi) + jnp.asarray(rng.normal(size=n))
  return {m: m for m in SIZES}, phi, sm.Batch(inputs, targets)


def sigma2_of_entries(log_sigma2):
  full = {m: jnp.full(shape, jnp.exp(log_sigma2[m])) for m, shape in SIZES.items()}
  return flat(full)


def closed_form(phi, log_sigma2, batch):
  """phi + S X^T (X S X^T + scale^2 W^-1)^-1 (y - X phi): finite at sigma = 0. phi a vector."""
  s = sigma2_of_entries(log_sigma2)
  weights = jnp.ones(len(batch.targets)) if batch.mask is None else batch.mask
  a = batch.inputs * jnp.sqrt(weights)[:, None] / SCALE
  r = (batch.targets - batch.inputs @ phi) * jnp.sqrt(weights) / SCALE
  gram = (a * s) @ a.T + jnp.eye(len(r))
  return phi + s * (a.T @ jnp.linalg.solve(gram, r))


def dense_gradient(batch, log_sigma2, z, g, damping=0.0):
  """What `implicit_gradient` returns first, with K a dense matrix; z, g and w are vectors."""
  each = np.concatenate([np.full(np.prod(SIZES[m]), log_sigma2[m]) for m in SIZES])
  s, x = np.exp(0.5 * each), np.asarray(batch.inputs)
  mask = np.ones(len(x)) if batch.mask is None else np.asarray(batch.mask)
  h = (x * mask[:, None]).T @ x / SCALE**2
  w = np.linalg.solve((1.0 + damping) * np.eye(D) + s[:, None] * h * s, s * g)
  unravel = ravel_pytree({m: jnp.zeros(shape) for m, shape in SIZES.items()})[1]
  d_sigma = {m: jnp.sum(x) for m, x in unravel(jnp.asarray(w * z)).items()}
  return sm.MetaParams(unravel(jnp.asarray(g - h @ (s * w))), d_sigma), unravel(jnp.asarray(w))


def assert_relative(got, want, error, name=""):
  """Norm of the difference over the norm of what is right, for every leaf."""
  chex.assert_trees_all_equal_shapes(got, want)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    off = float(jnp.linalg.norm(a - b)) / max(float(jnp.linalg.norm(b)), 1e-300)
    assert off <= error or bool(jnp.all(a == b)), f"{name}{path}: {off}"


def log_sigma2_arrays():
  return {m: jnp.asarray(v) for m, v in LOG_SIGMA2.items()}


@functools.cache
def mode_and_pullback(implicit=SOLVERS["cg"], inner=MODE):
  """jit of (g, phi, log_sigma2, batch) -> (g^T d theta_hat / d (phi, log_sigma2), theta, info)."""

  def run(g, phi, log_sigma2, batch):
    def mode(phi, log_sigma2):
      labels = {m: m for m in SIZES}
      return sm.map_estimate(LINEAR, labels, phi, log_sigma2, batch, inner, implicit)

    theta, pullback, info = jax.vjp(mode, phi, log_sigma2, has_aux=True)
    return pullback(ravel_pytree(phi)[1](g)), theta, info

  return jax.jit(run)


@pytest.mark.parametrize("inner", (MODE, LBFGS), ids=("heavy_ball", "lbfgs"))
def test_the_mode_is_the_closed_form(inner):
  _, phi, batch = linear_problem()
  run = mode_and_pullback(inner=inner)
  _, theta, info = run(jnp.ones(D), phi, log_sigma2_arrays(), batch)
  assert bool(info.converged)
  unravel = ravel_pytree(phi)[1]
  assert_relative(theta, unravel(closed_form(flat(phi), LOG_SIGMA2, batch)), 1e-8)
  # The part that moved, too: sigma^2 = 1e-6 moves theta by 1e-5, which 1e-8 of theta would hide.
  moved = jax.tree.map(jnp.subtract, theta, phi)
  want = closed_form(flat(phi), LOG_SIGMA2, batch) - flat(phi)
  # L-BFGS stops at 1e-11, which leaves 1e-8 or so of the smallest z.
  assert_relative(moved, unravel(want), 1e-8 if inner is MODE else 1e-6)
  np.testing.assert_array_equal(theta["e"], phi["e"])  # frozen: to the bit


def test_info_reports_the_objective_at_the_mode():
  _, phi, batch = linear_problem()
  _, theta, info = mode_and_pullback()(jnp.ones(D), phi, log_sigma2_arrays(), batch)
  residual = batch.targets - batch.inputs @ flat(theta)
  moving = [m for m in SIZES if m != "e"]
  prior = sum(jnp.sum((theta[m] - phi[m]) ** 2) / np.exp(LOG_SIGMA2[m]) for m in moving)
  nll = 0.5 * jnp.sum((residual / SCALE) ** 2) + N * np.log(SCALE * np.sqrt(2 * np.pi))
  np.testing.assert_allclose(info.objective, (nll + 0.5 * prior) / N, rtol=1e-10)
  assert float(info.grad_norm) <= 1e-13 and 0 < int(info.steps) < 3000


@functools.cache
def jacobians(solver):
  """jit of (phi, log_sigma2, batch) -> (d theta_hat / d each of them, info)."""

  def mode(phi, log_sigma2, batch):
    labels = {m: m for m in SIZES}
    return sm.map_estimate(LINEAR, labels, phi, log_sigma2, batch, MODE, SOLVERS[solver])

  return jax.jit(jax.jacrev(mode, (0, 1, 2), has_aux=True))


@jax.jit
def right_jacobians(phi, log_sigma2, batch):
  unravel = ravel_pytree(phi)[1]
  right = lambda phi, log_sigma2, batch: unravel(closed_form(flat(phi), log_sigma2, batch))
  # The closed form has no derivative at a sigma or a weight of 0.
  log_sigma2 = log_sigma2 | {"e": jnp.asarray(-1e3)}
  batch = batch._replace(mask=jnp.maximum(batch.mask, 1e-30))
  return jax.jacrev(right, (0, 1, 2))(phi, log_sigma2, batch)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("padded", (False, True))
def test_the_jacobian_of_the_mode_is_the_closed_forms(solver, padded):
  """d theta_hat / d (phi, log sigma^2): all 45 x (45 + 5) entries, by jax.jacrev.

  Relative to the norm of each block d theta_m / d (phi_k or log sigma_k^2): the blocks of
  sigma^2 = 1e-6 are themselves that small, and would hide behind the others.
  """
  _, phi, batch = linear_problem()
  mask = np.random.default_rng(1).integers(2, size=N) if padded else np.ones(N)
  batch = batch._replace(mask=jnp.asarray(mask, float))
  got, info = jacobians(solver)(phi, log_sigma2_arrays(), batch)
  assert bool(info.converged)
  want = right_jacobians(phi, log_sigma2_arrays(), batch)
  for m in SIZES:
    for k in SIZES:
      assert_relative(got[m][0][k], want[m][0][k], 1e-8, f"d theta_{m} / d phi_{k}")
      assert_relative(got[m][1][k], want[m][1][k], 1e-8, f"d theta_{m} / d log_sigma2_{k}")
  for k in SIZES:  # the frozen module: theta_e = phi_e, and its log sigma^2 moves nothing
    identity = np.eye(6) if k == "e" else np.zeros((6, *SIZES[k]))
    np.testing.assert_allclose(got["e"][0][k], identity, rtol=0.0, atol=1e-15)
    np.testing.assert_array_equal(got[k][1]["e"], np.zeros(SIZES[k]))
    np.testing.assert_array_equal(got["e"][1][k], np.zeros(6))


def test_free_modules_follow_least_squares():
  """sigma = inf for two modules: no prior there, the closed form's limit."""
  labels, phi, batch = linear_problem()
  log_sigma2 = {m: jnp.asarray(v) for m, v in LOG_SIGMA2.items()} | {
    "c": jnp.asarray(jnp.inf), "d": jnp.asarray(jnp.inf)
  }  # fmt: skip
  precision = 1.0 / sigma2_of_entries(log_sigma2)  # 0 where free, inf where frozen

  def limit(phi, batch):
    moving = jnp.flatnonzero(jnp.isfinite(precision), size=D - 6)
    x, r = batch.inputs[:, moving] / SCALE, (batch.targets - batch.inputs @ phi) / SCALE
    step = jnp.linalg.solve(x.T @ x + jnp.diag(precision[moving]), x.T @ r)
    return phi.at[moving].add(step)

  unravel = ravel_pytree(phi)[1]
  implicit = sm.Implicit(solver="cg", max_steps=1000, tol=1e-13)

  def mode(p):
    theta, _ = sm.map_estimate(LINEAR, labels, unravel(p), log_sigma2, batch, MODE, implicit)
    return (flat(theta),) * 2

  def right(p):
    return (limit(p, batch),) * 2

  got, want = (jax.jit(jax.jacrev(f, has_aux=True))(flat(phi)) for f in (mode, right))
  for a, b in zip(got, want, strict=True):
    assert_relative(a, b, 1e-8)


@pytest.mark.parametrize("solver", ("cg", "neumann"))
@pytest.mark.parametrize("curvature", ("gauss_newton", "hessian"))
def test_phi_costs_no_product_with_the_curvature_after_the_solve(solver, curvature):
  """The network's operations: all linear ones of a product are in the loop, and only there."""
  model = lambda phi: model_of(
    sm.gaussian(lambda theta, x: jnp.sin(x @ theta["w"])),
    {"w": "w"}, {"w": phi}, {"w": 0.0}, sm.Batch(jnp.ones([7, 3]), jnp.ones(7)),
  )  # fmt: skip
  implicit = sm.Implicit(curvature, solver, max_steps=9)
  v = jnp.ones(3)
  gradient = jax.make_jaxpr(lambda phi: implicit_gradient(implicit, model(phi), {"w": v}, {"w": v}))
  product = jax.make_jaxpr(lambda phi: model(phi).product(curvature)({"w": v}))(v).jaxpr
  matrix_products = lambda jaxpr: sum(
    eqn.primitive.name == "dot_general" and max(x.aval.ndim for x in eqn.invars) == 2
    for eqn in jaxpr.eqns
  )
  outside, loops = gradient(v).jaxpr, []
  for eqn in outside.eqns:
    if eqn.primitive.name == "while":
      loops.append(matrix_products(eqn.params["body_jaxpr"].jaxpr))
  assert loops == [2]  # J v, then J^T u; the gradient's own, in the Hessian, are linear in the same
  assert matrix_products(outside) + sum(loops) == matrix_products(product)


def test_what_the_data_leave_open_of_a_free_module_stays_at_phi():
  """d theta / d phi is 1 there, and 0 where the data determine theta."""
  x = jnp.zeros((5, 3)).at[:, 0].set(jnp.arange(5.0)).at[1, 1].set(2.0)
  batch = sm.Batch(x, jnp.arange(5.0) ** 2)
  linear = sm.gaussian(lambda theta, x: x @ theta["w"], 0.5)
  implicit = sm.Implicit(max_steps=50, tol=1e-12)

  def mode(w, value):
    log_sigma2 = {"w": jnp.asarray(value)}
    return sm.map_estimate(linear, {"w": "w"}, {"w": w}, log_sigma2, batch, MODE, implicit)[0]["w"]

  start, run = jnp.array([0.3, -1.0, 0.7]), jax.jit(jax.jacrev(mode))
  for value, tol in ((np.inf, 1e-9), (2 * np.log(1e4), 1e-6)):
    np.testing.assert_allclose(run(start, value), np.diag([0.0, 0.0, 1.0]), atol=tol)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_derivative_in_the_data_is_the_closed_forms(solver, masked):
  _, phi, batch = linear_problem()
  weights = np.random.default_rng(1).uniform(0.2, 2.0, size=N) if masked else np.ones(N)
  weights[::5] = 0.0 if masked else 1.0
  batch = batch._replace(mask=jnp.asarray(weights))
  v = np.random.default_rng(2).normal(size=D)

  def along(jacobian):
    each = by_module(v)
    rows = [jax.tree.map(lambda x, m=m: np.tensordot(each[m], x, each[m].ndim), jacobian[m][2])
            for m in SIZES]  # fmt: skip
    return jax.tree.map(lambda *x: sum(x), *rows)

  args = phi, log_sigma2_arrays(), batch
  have, want = along(jacobians(solver)(*args)[0]), along(right_jacobians(*args))
  assert_relative(have.inputs, want.inputs, 1e-8)
  assert_relative(have.targets, want.targets, 1e-8)
  kept = weights > 0
  assert_relative(have.mask[kept], want.mask[kept], 1e-8)
  if masked:
    np.testing.assert_array_equal(have.inputs[::5], 0.0)
    np.testing.assert_array_equal(have.targets[::5], 0.0)


def test_damping_and_the_identity_do_what_they_say():
  """damping: (1 + d) I + s C s; identity: d/d phi = g, d/d log sigma_m^2 = <s g, z>."""
  _, phi, batch = linear_problem()
  rng = np.random.default_rng(2)
  g, z = rng.normal(size=(2, D))
  s = np.sqrt(np.asarray(sigma2_of_entries(LOG_SIGMA2)))
  args = phi, log_sigma2_arrays(), batch, by_module(z), by_module(g)
  want = dense_gradient(batch, LOG_SIGMA2, z, g, damping=0.7)
  for implicit in (
    sm.Implicit(damping=0.7, max_steps=400, tol=1e-13), sm.Implicit(damping=0.7, solver="dual")
  ):  # fmt: skip
    assert_relative(linear_solve(implicit)(*args)[:2], want, 1e-8)
  d_sigma = {m: np.sum(x) for m, x in by_module(s * g * z).items()}
  want = sm.MetaParams(by_module(g), d_sigma), by_module(s * g)
  assert_relative(linear_solve(sm.Implicit(solver="identity"))(*args)[:2], want, 1e-8)


def test_phi_has_no_more_error_than_the_solve():
  """12 steps of CG for 45 parameters: w is off by a hundredth, g - C (s w) by all of itself.

  But for module b, so tight that d/d phi is g's part and w there, of size 1e-7, is off by all.
  """
  _, phi, batch = linear_problem()
  log_sigma2 = {m: jnp.asarray(-30.0 if m == "b" else 7.0) for m in SIZES}
  g = jnp.asarray(np.random.default_rng(2).normal(size=D))
  s = jnp.sqrt(sigma2_of_entries(log_sigma2))
  h = batch.inputs.T @ batch.inputs / SCALE**2
  w = jnp.linalg.solve(jnp.eye(D) + s[:, None] * h * s, s * g)
  unravel = ravel_pytree(phi)[1]
  at = jax.tree.map(jnp.zeros_like, phi)
  short = linear_solve(sm.Implicit(max_steps=12, tol=0.0))
  grad, got, info = short(phi, log_sigma2, batch, at, unravel(g))
  assert int(info.steps) == 12
  assert_relative(grad.phi, unravel(w / s), 0.01)
  for off in (flat(got) / s, g - h @ (s * flat(got))):  # neither form alone would do
    with pytest.raises(AssertionError):
      assert_relative(unravel(off), unravel(w / s), 0.01)


def test_phi_of_a_sharp_likelihood_has_no_more_error_than_the_solve():
  """Curvatures of 2e5 an example: in proportion to their number alone phi would be off by half."""
  _, phi, batch = linear_problem()
  sharp = sm.gaussian(linear_predict, 0.002)
  log_sigma2 = {m: jnp.asarray(0.0) for m in SIZES}
  g = jnp.asarray(np.random.default_rng(2).normal(size=D))
  h = batch.inputs.T @ batch.inputs / 0.002**2
  w = jnp.linalg.solve(jnp.eye(D) + h, g)
  unravel = ravel_pytree(phi)[1]
  at, labels = jax.tree.map(jnp.zeros_like, phi), {m: m for m in SIZES}
  short = jax.jit(solve_of(sm.Implicit(max_steps=20, tol=0.0), sharp, labels))
  grad, got, _ = short(phi, log_sigma2, batch, at, unravel(g))
  of_w, of_phi = (float(jnp.linalg.norm(flat(x) - w) / jnp.linalg.norm(w)) for x in (got, grad.phi))
  n_alone = (g - h @ flat(got) + N * flat(got)) / (1 + N)
  assert of_phi < 1.5 * of_w < 0.1 < float(jnp.linalg.norm(n_alone - w) / jnp.linalg.norm(w))


def test_the_curvature_that_balances_counts_no_padding_and_none_that_is_held():
  """Two steps of CG leave an error in which the weight shows; a does not move, e has no prior."""
  _, phi, batch = linear_problem()
  mask = jnp.asarray(np.arange(N) % 3 > 0, float)
  batch = batch._replace(mask=mask)
  values = 0.0, 3.0, 1.0, -2.0, jnp.inf
  log_sigma2 = {m: jnp.asarray(v) for m, v in zip(SIZES, values, strict=True)}
  unravel = ravel_pytree(phi)[1]
  g = unravel(jnp.asarray(np.random.default_rng(2).normal(size=D)))
  at = jax.tree.map(jnp.zeros_like, phi)
  part = {m: x for m, x in at.items() if m != "a"} | {"a": None}
  short = linear_solve(sm.Implicit(max_steps=2, tol=0.0, damping=0.3), frozenset({"a"}))
  grad, w, _ = short(phi, log_sigma2, batch, part, g)
  s = {m: jnp.exp(0.5 * v) for m, v in log_sigma2.items()} | {"e": jnp.asarray(1.0)}
  u = unravel(jnp.concatenate([(s[m] * w[m] if m != "a" else at[m]).ravel() for m in SIZES]))
  h = (batch.inputs * mask[:, None]).T @ batch.inputs / SCALE**2
  curved = unravel(h @ flat(u))
  along = flat(u) @ flat(curved) / (flat(u) @ flat(u))
  c = jnp.maximum(jnp.sum(mask), along)
  assert float(along) < float(c)
  for m in SIZES:
    want = g[m] - curved[m]
    if m != "a":
      precision = 0.0 if m == "e" else 1.0
      want = (want + c * s[m] * (precision + 0.3) * w[m]) / (1 + c * s[m] ** 2)
    np.testing.assert_allclose(grad.phi[m], want, rtol=1e-9, err_msg=m)


def test_a_padded_task_is_the_task():
  _, phi, batch = linear_problem()
  rng = np.random.default_rng(3)
  order = rng.permutation(90)
  fill = lambda x: np.concatenate([x, 5.0 * rng.normal(size=(20, *x.shape[1:]))])[order]
  padded = sm.Batch(fill(batch.inputs), fill(batch.targets), (order < N).astype(float))
  g, run = jnp.asarray(rng.normal(size=D)), mode_and_pullback()
  short, long = (run(g, phi, log_sigma2_arrays(), b) for b in (batch, padded))
  assert bool(short[2].converged) and bool(long[2].converged)
  assert_relative(long[:2], short[:2], 1e-8)
  assert_relative(long[2].objective, short[2].objective, 1e-10)


@pytest.mark.parametrize("solver", ("cg", "dual"))
def test_vmap_is_a_loop(solver):
  _, phi, _ = linear_problem()
  batches = [linear_problem(seed=t)[2] for t in range(3)]
  gs = jnp.asarray(np.random.default_rng(2).normal(size=(3, D)))
  run, log_sigma2 = mode_and_pullback(), log_sigma2_arrays()
  stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
  many = jax.jit(jax.vmap(mode_and_pullback(SOLVERS[solver]), (0, None, None, 0)))
  got = many(gs, phi, log_sigma2, stacked)
  loop = [run(g, phi, log_sigma2, batch) for g, batch in zip(gs, batches, strict=True)]
  want = jax.tree.map(lambda *x: np.stack(x), *loop)
  assert bool(got[2].converged.all())
  assert_relative(got[:2], want[:2], 1e-8)


def sampled(size, **keywords):
  return sm.Implicit(max_steps=400, tol=1e-13, batch_size=size, **keywords)


@pytest.mark.parametrize("solver", ("cg", "dual"))
def test_a_sampled_curvature_is_scaled_to_all_examples(solver):
  """Rows alike up to sign and padding in between: every sample then has the curvature of all."""
  _, phi, batch = linear_problem()
  rng = np.random.default_rng(5)
  signs = jnp.asarray(rng.choice([-1.0, 1.0], size=(N, 1)))
  mask = jnp.asarray(rng.permutation(N) < 50, jnp.float64)
  inputs = jnp.where(mask[:, None] != 0, signs * batch.inputs[:1], 9.0)
  batch = batch._replace(inputs=inputs, mask=mask)
  z, g = rng.normal(size=(2, D))
  # 7 of 50, and 60, more than there are; then rows that count for a tenth each.
  for weight in (1.0, 0.1):
    batch = batch._replace(mask=weight * mask)
    want = dense_gradient(batch, LOG_SIGMA2, z, g)
    for size in (7, 60):
      run = linear_solve(sampled(size, solver=solver))
      args = phi, log_sigma2_arrays(), batch, by_module(z), by_module(g)
      assert_relative(run(*args, key=jax.random.key(3))[:2], want, 1e-6, size)


def test_noise_and_bias_of_a_sample():
  """Against the solve with all examples, 45 parameters and 70 of them: see README."""
  _, phi, batch = linear_problem()
  val, s = linear_problem(seed=1)[2], np.sqrt(np.asarray(sigma2_of_entries(LOG_SIGMA2)))
  theta = np.asarray(closed_form(flat(phi), LOG_SIGMA2, batch))
  z = (theta - np.asarray(flat(phi))) / np.where(s > 0, s, 1.0)
  g = np.asarray(val.inputs).T @ (np.asarray(val.inputs) @ theta - val.targets) / (N * SCALE**2)
  args = phi, log_sigma2_arrays(), batch, by_module(z), by_module(g)
  solves = {size: solve_of(sampled(size), LINEAR, {m: m for m in SIZES}) for size in (20, 40, 60)}

  @jax.jit
  @jax.vmap
  def run(key):
    return {k: tuple(map(flat, solve(*args, key=key)[0])) for k, solve in solves.items()}

  gradients = run(jax.random.split(jax.random.key(0), 400))
  whole = [flat(x) for x in dense_gradient(batch, LOG_SIGMA2, z, g)[0]]
  noise, bias = {}, {}
  for size in (20, 40, 60):
    for name, found, want in zip(("phi", "sigma"), gradients[size], whole, strict=True):
      of, norm = (name, size), jnp.linalg.norm(want)
      noise[of] = float(jnp.linalg.norm(found - found.mean(0), axis=1).mean() / norm)
      bias[of] = float(jnp.linalg.norm(found.mean(0) - want) / norm)
  for name in ("phi", "sigma"):
    assert noise[name, 20] > 2 * noise[name, 40] > 3 * noise[name, 60] > 0
    assert bias[name, 20] > 2 * bias[name, 40] > 4 * bias[name, 60]
  assert 0.7 < bias["sigma", 20] and bias["sigma", 60] < 0.06 and bias["phi", 60] < 0.02


def test_a_sample_is_the_same_however_tasks_are_run():
  rng = np.random.default_rng(4)
  part = lambda: sm.Batch(
    *map(jnp.asarray, (rng.normal(size=(4, 20, 6)), rng.normal(size=(4, 20))))
  )
  tasks, likelihood = sm.Task(part(), part()), sm.gaussian(lambda theta, x: x @ theta["w"])
  inner = sm.Inner(optax.adam(0.1), steps=20, batch_size=9)

  def gradient(batching, key, implicit=sampled(8)):  # noqa: B008 (frozen)
    learner = sm.sigma_imaml(
      likelihood, {"w": "w"}, inner=inner, implicit=implicit, batching=batching
    )
    return learner.meta_gradient(learner.init({"w": jnp.ones(6)}), tasks, key)[0]

  @jax.jit
  def run(key):
    every = [gradient(batching, key) for batching in ("vmap", "sequential", 2)]
    return every, gradient("vmap", key, sampled(None))

  (want, *others), whole = run(jax.random.key(4))
  for got in others:
    assert_relative(got, want, 1e-8)
  assert optax.tree.norm(optax.tree.sub(whole, want)) > 1e-3 * optax.tree.norm(want)


def test_a_sample_is_none_of_the_mini_batches():
  _, _, batch = linear_problem()
  batch = batch._replace(targets=jnp.arange(N))
  key = jax.random.key(0)
  rows = inner_lib.draw_at_end(key, batch, 9, 1).targets[0]
  for step in range(50):
    mini = inner_lib.draw(jax.random.fold_in(key, step), batch, 9).targets
    assert sorted(np.asarray(mini)) != sorted(np.asarray(rows))


@pytest.mark.parametrize(
  ("size", "curvature", "frozen"),  # 8: the last of nine batches is filled up
  [
    (8, "gauss_newton", {"b"}),
    (8, "hessian", ()),
    (35, "gauss_newton", ()),
    (35, "hessian", {"b"}),
    (N, "gauss_newton", ()),
    (N, "hessian", {"b"}),
  ],
)
def test_batches_of_all_examples_in_turn_are_all_examples(size, curvature, frozen):
  _, phi, batch = linear_problem()
  rng = np.random.default_rng(7)
  mask = jnp.asarray(rng.uniform(0.2, 1.0, N) * (rng.permutation(N) < 61))
  batch = batch._replace(mask=mask)
  z, g = rng.normal(size=(2, D))
  moving = {m: None if m in frozen else v for m, v in by_module(z).items()}
  log_sigma2 = LOG_SIGMA2 | dict.fromkeys(frozen, -np.inf)
  implicit = sm.Implicit(curvature, max_steps=400, tol=1e-13, batch_size=size, num_batches=None)
  grad, w, _ = linear_solve(implicit, frozenset(frozen))(
    phi, log_sigma2_arrays(), batch, moving, by_module(g), key=jax.random.key(3)
  )
  want, want_w = dense_gradient(batch, log_sigma2, z, g)
  assert_relative(grad, want, 1e-8)
  assert_relative(w, {m: None if m in frozen else v for m, v in want_w.items()}, 1e-8)


def test_some_batches_in_turn_are_a_sample_of_as_many():
  """Without batch statistics it is the same whether 24 examples come at once or eight by eight."""
  _, phi, batch = linear_problem()
  z, g = (
    ravel_pytree(phi)[1](jnp.asarray(np.random.default_rng(8).normal(size=D))) for _ in range(2)
  )

  def gradient(size, count):
    run = linear_solve(sampled(size, num_batches=count))
    return run(phi, log_sigma2_arrays(), batch, z, g, key=jax.random.key(3))[:2]

  assert_relative(gradient(8, 3), gradient(24, 1), 1e-8)


def test_the_gradient_of_a_mean_over_keys_is_the_mean_of_the_gradients():
  """theta_hat is the same for all keys, w is not: its cotangent must not be summed over them."""
  labels, phi, batch = linear_problem()
  keys = jax.random.split(jax.random.key(1), 4)

  def entry(phi, key):
    theta, _ = sm.map_estimate(LINEAR, labels, phi, LOG_SIGMA2, batch, MODE, sampled(30), key=key)
    return jnp.sum(jnp.square(flat(theta)))

  mean = lambda phi: jax.vmap(entry, (None, 0))(phi, keys).mean()

  @jax.jit
  def run(phi):
    return jax.grad(mean)(phi), jax.lax.map(lambda key: jax.grad(entry)(phi, key), keys)

  got, each = run(phi)
  assert_relative(got, jax.tree.map(lambda x: x.mean(0), each), 1e-8)


def test_a_sample_costs_what_it_holds(optimising_jit):
  rng = np.random.default_rng(0)
  labels = {"w": "w", "v": "v"}
  phi = {"w": jnp.asarray(rng.normal(size=(8, 64))), "v": jnp.asarray(rng.normal(size=64))}
  likelihood = sm.gaussian(lambda theta, x: jnp.tanh(x @ theta["w"]) @ theta["v"])
  batch = sm.Batch(jnp.asarray(rng.normal(size=(4096, 8))), jnp.zeros(4096))

  def temporaries(size, count):
    implicit = sm.Implicit(max_steps=5, batch_size=size, num_batches=count)
    solve = solve_of(implicit, likelihood, labels)
    call = lambda phi, key: solve(phi, {"w": 0.0, "v": 0.0}, batch, phi, phi, key=key)
    compiled = optimising_jit(call).lower(phi, jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(128, 1) < 0.2 * temporaries(None, 1)
  assert temporaries(128, None) < 0.4 * temporaries(None, 1)  # order and shuffled copy are whole


def test_sampling_says_what_it_wants():
  labels, phi, batch = linear_problem()
  tasks = jax.tree.map(lambda x: x[None], sm.Task(batch, batch))
  short = sm.Inner(optax.sgd(0.1), steps=3)

  def step(size, key=None):
    implicit = sm.Implicit(batch_size=size)
    learner = sm.sigma_imaml(LINEAR, labels, inner=short, implicit=implicit)
    return jax.eval_shape(learner.meta_gradient, learner.init(phi), tasks, key)

  with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
    step(0)
  with pytest.raises(ValueError, match="Implicit.batch_size draws examples: pass key="):
    step(5)
  mode = lambda phi, key: sm.map_estimate(
    LINEAR, labels, phi, LOG_SIGMA2, batch, short, sampled(N), key=key
  )[0]["a"].sum()  # fmt: skip
  with pytest.raises(ValueError, match="Implicit.batch_size draws examples: pass key="):
    jax.eval_shape(jax.grad(mode), phi, None)
  none = lambda phi: sm.map_estimate(
    LINEAR, labels, phi, LOG_SIGMA2, batch, short, sampled(None)
  )[0]["a"].sum()  # fmt: skip
  both = jax.jit(lambda phi, key: (jax.grad(mode)(phi, key), jax.grad(none)(phi)))
  assert_relative(*both(phi, jax.random.key(0)), 1e-8)  # a sample of all examples
  with pytest.raises(ValueError, match=r"asks for 1 x 71 examples .* but the task has 70 rows"):
    step(71, jax.random.key(0))
  with pytest.raises(ValueError, match=r"asks for 3 x 30 examples .* but the task has 70 rows"):
    solve = sm.Implicit(batch_size=30, num_batches=3)
    learner = sm.sigma_imaml(LINEAR, labels, inner=short, implicit=solve)
    jax.eval_shape(learner.meta_gradient, learner.init(phi), tasks, jax.random.key(0))
  with pytest.raises(ValueError, match="num_batches must be at least 1; got 0"):
    sm.Implicit(batch_size=5, num_batches=0)
  for keywords in ({}, {"batch_size": 5, "solver": "dual"}):
    with pytest.raises(ValueError, match=r'goes with a batch_size, and .* "cg" and "neumann"'):
      sm.Implicit(num_batches=None, **keywords)
  whole = 'The evidence and .*"joint" need the curvature of all examples: leave .*batch_size None'
  with pytest.raises(ValueError, match=whole):
    sm.empirical_bayes(LINEAR, labels, implicit=sm.Implicit(batch_size=5))
  in_turn = sm.Implicit(batch_size=5, num_batches=None)
  diagonal = sm.sigma_reptile(LINEAR, labels, implicit=in_turn, sigma_gradient="diagonal")
  assert diagonal.spec.implicit.solver == "identity"  # which asks for no key
  with pytest.raises(ValueError, match="takes no curvature: leave"):
    sm.Implicit(solver="identity", batch_size=5)
  with pytest.raises(ValueError, match=whole):
    sm.sigma_reptile(LINEAR, labels, implicit=sm.Implicit(batch_size=5), sigma_gradient="joint")
  with pytest.raises(ValueError, match="needs solver=.cg.; implicit.solver is 'dual'"):
    sm.sigma_reptile(LINEAR, labels, implicit=sm.Implicit(solver="dual"), sigma_gradient="joint")
  with pytest.raises(ValueError, match=whole):
    sm.log_evidence(
      LINEAR, labels, phi, dict.fromkeys(SIZES, 0.0), batch, implicit=sm.Implicit(batch_size=5)
    )


# --- networks: differences of the whole procedure ------------------------------------------------


def mlp_predict(theta, x):
  h = jnp.tanh(x @ theta["layer_0"]["kernel"] + theta["layer_0"]["bias"])
  return h @ theta["layer_1"]["kernel"] + theta["layer_1"]["bias"]


def conv_predict(theta, x):
  """3 x 3 convolution, tanh, 2 x 2 mean: [N, 4, 4, 1] -> logits [N, 3]."""
  h = jax.lax.conv_general_dilated(
    x, theta["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  h = jnp.tanh(h + theta["conv"]["bias"]).reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
  return h.reshape(-1, 12) @ theta["head"]["kernel"] + theta["head"]["bias"]


DESCENT = sm.Inner(optax.sgd(0.1, momentum=0.9), steps=20_000, tol=1e-12)


def network_problem(name):
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape))
  if name == "tanh":
    phi = {
      "layer_0": {"kernel": array(3, 8), "bias": array(8)},
      "layer_1": {"kernel": array(8, 2), "bias": array(2)},
    }
    batch = sm.Batch(array(6, 3), 2.0 * array(6, 2))
    likelihood = sm.gaussian(mlp_predict, 0.5)
    sigma = {"layer_0": 0.4, "layer_1": 0.8}
  else:
    phi = {
      "conv": {"kernel": array(3, 3, 1, 3), "bias": array(3)},
      "head": {"kernel": array(12, 3), "bias": array(3)},
    }
    batch = sm.Batch(2.0 * array(6, 4, 4, 1), jnp.asarray(rng.integers(3, size=6)))
    likelihood = sm.categorical(conv_predict)
    sigma = {"conv": 0.4, "head": 0.8}
  log_sigma2 = {m: jnp.asarray(2 * np.log(s)) for m, s in sigma.items()}
  return likelihood, sm.by_layer(phi), phi, log_sigma2, batch


@pytest.mark.parametrize("name", ("tanh", "conv"))
def test_the_derivative_is_the_difference_quotients(name):
  """In random directions of phi, log sigma^2 and the inputs (targets too where they are real)."""
  likelihood, labels, phi, log_sigma2, batch = network_problem(name)
  implicit = sm.Implicit(curvature="hessian", max_steps=400, tol=1e-13)
  rng = np.random.default_rng(7)
  weight = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), phi)
  targets = batch.targets if name == "tanh" else jnp.zeros([])

  def value(args):
    phi, log_s2, inputs, targets = args
    data = batch._replace(inputs=inputs)
    data = data._replace(targets=targets) if name == "tanh" else data
    theta, info = sm.map_estimate(likelihood, labels, phi, log_s2, data, DESCENT, implicit)
    return optax.tree.vdot(weight, theta), info

  args = (phi, log_sigma2, batch.inputs, targets)
  at, unravel = ravel_pytree(args)
  points, directions = [at], []
  for i in range(4 if name == "tanh" else 3):
    for _ in range(2):
      of = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), args[i])
      v = flat((*optax.tree.zeros_like(args[:i]), of, *optax.tree.zeros_like(args[i + 1 :])))
      directions.append((i, v / np.linalg.norm(v)))
      points += [at + 3e-3 * step * directions[-1][1] for step in (-2, -1, 1, 2)]

  @jax.jit
  def run(points):
    of_flat = lambda v: value(unravel(v))
    return jax.grad(of_flat, has_aux=True)(points[0]), jax.lax.map(of_flat, points[1:])

  (grad, info), (values, infos) = run(jnp.stack(points))
  assert bool(info.converged) and bool(infos.converged.all())
  grad = unravel(grad)
  quotients = np.reshape(values, (-1, 4)) @ np.array([1, -8, 8, -1]) / (12 * 3e-3)
  for (i, v), want in zip(directions, quotients, strict=True):
    got = float(flat(grad) @ v)
    assert abs(got - want) <= 1e-6 * max(abs(want), 0.1 * float(optax.tree.norm(grad[i])))


def test_gauss_newton_is_an_approximation_on_a_network():
  """Else the test above could not tell the two curvatures apart."""
  likelihood, labels, phi, log_sigma2, batch = network_problem("tanh")

  def gradient(curvature):
    implicit = sm.Implicit(curvature=curvature, max_steps=400, tol=1e-13)
    value = lambda phi: optax.tree.norm(
      sm.map_estimate(likelihood, labels, phi, log_sigma2, batch, DESCENT, implicit)[0]
    )
    return flat(jax.grad(value)(phi))

  exact, approximate = jax.jit(lambda: [gradient(c) for c in ("hessian", "gauss_newton")])()
  off = float(jnp.linalg.norm(exact - approximate) / jnp.linalg.norm(exact))
  assert 1e-3 < off < 1.0
