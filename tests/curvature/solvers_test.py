"""Linear solves agree with dense ones, and report when there is no solution."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from shrinkmeta.curvature import lanczos, solvers

D = 60

pytestmark = pytest.mark.usefixtures("x64")


def symmetric(eigenvalues, seed=0):
  """A symmetric matrix with these eigenvalues and random eigenvectors."""
  q = np.linalg.qr(np.random.default_rng(seed).normal(size=2 * (len(eigenvalues),)))[0]
  return jnp.asarray((q * np.asarray(eigenvalues)) @ q.T)


def right_hand_side(seed=1, size=D):
  return jnp.asarray(np.random.default_rng(seed).normal(size=size))


def alone(solve):
  """The solver for an operator that returns nothing beside K v: (product, b, ...) -> (w, info)."""

  def of_products(product, *arguments):
    w, beside, info = solve(lambda v: (product(v), None), *arguments)
    assert beside is None
    return w, info

  return of_products


cg, neumann = alone(solvers.cg), alone(solvers.neumann)
# Compiled once for all cases: the limits are traced.
run_cg = jax.jit(lambda matrix, b, *limits: cg(lambda v: matrix @ v, b, *limits))
run_neumann = jax.jit(lambda matrix, b, *limits: neumann(lambda v: matrix @ v, b, *limits))


def relative_residual(matrix, w, b):
  return float(jnp.linalg.norm(b - matrix @ w) / jnp.linalg.norm(b))


# --- CG on positive definite matrices ------------------------------------------------------------


@pytest.mark.parametrize("condition", (10.0, 1e4))
def test_cg_agrees_with_a_dense_solve(condition):
  matrix, b = symmetric(np.geomspace(1.0, condition, D)), right_hand_side()
  w, info = run_cg(matrix, b, 20 * D, 1e-13)
  want = jnp.linalg.solve(matrix, b)
  assert float(jnp.linalg.norm(w - want) / jnp.linalg.norm(want)) < 1e-9
  assert bool(info.converged) and not bool(info.negative_curvature)
  assert float(info.residual) <= 1e-13


@pytest.mark.parametrize("condition", (10.0, 1e4))
@pytest.mark.parametrize("max_steps", (1, 5, 20))
def test_cg_cut_short_says_how_far_it_is(condition, max_steps):
  matrix, b = symmetric(np.geomspace(1.0, condition, D)), right_hand_side()
  w, info = run_cg(matrix, b, max_steps, 1e-13)
  assert int(info.steps) == max_steps and not bool(info.converged)
  np.testing.assert_allclose(float(info.residual), relative_residual(matrix, w, b), rtol=1e-9)
  assert relative_residual(matrix, w, b) <= 1.0


def test_cg_stops_at_the_first_step_within_tolerance():
  matrix, b = symmetric(np.geomspace(1.0, 10.0, D)), right_hand_side()
  _, info = run_cg(matrix, b, D, 1e-3)
  steps = int(info.steps)
  assert 1 < steps < D and bool(info.converged)
  _, before = run_cg(matrix, b, steps - 1, 1e-3)
  assert float(before.residual) > 1e-3 >= float(info.residual) and not bool(before.converged)


def test_cg_ends_in_as_many_steps_as_there_are_different_eigenvalues():
  eigenvalues = np.repeat([1.0, 7.0, 50.0], D // 3)
  matrix, b = symmetric(eigenvalues), right_hand_side()
  w, info = run_cg(matrix, b, D, 1e-11)
  assert int(info.steps) == 3 and bool(info.converged)
  np.testing.assert_allclose(w, jnp.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)


def test_cg_works_on_trees():
  matrix, b = symmetric(np.geomspace(1.0, 10.0, D)), right_hand_side()
  split = lambda v: {"a": v[:10].reshape(2, 5), "b": [v[10:]]}
  join = lambda t: jnp.concatenate([t["a"].reshape(-1), t["b"][0]])
  w, info = cg(lambda t: split(matrix @ join(t)), split(b), 20 * D, 1e-13)
  np.testing.assert_allclose(join(w), jnp.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)
  assert bool(info.converged)


# --- CG where it has no right to work ------------------------------------------------------------


def test_cg_stops_at_negative_curvature_two_by_two():
  matrix, b = jnp.diag(jnp.array([1.0, -1.0])), jnp.ones(2)
  w, info = run_cg(matrix, b, 50, 1e-8)
  assert bool(info.negative_curvature) and not bool(info.converged)
  assert int(info.steps) == 1  # p = b has p^T K p = 0
  assert np.isfinite(w).all() and np.isfinite(float(info.residual))
  np.testing.assert_allclose(float(info.residual), relative_residual(matrix, w, b), rtol=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_steps", (3, 20, 200))
def test_cg_on_an_indefinite_matrix_returns_its_best_iterate_and_says_so(seed, max_steps):
  eigenvalues = np.geomspace(1.0, 100.0, D)
  eigenvalues[:: D // 3] *= -1.0  # 3 of 60, 5 %
  matrix, b = symmetric(eigenvalues, seed), right_hand_side(seed + 100)
  w, info = run_cg(matrix, b, max_steps, 1e-10)
  assert np.isfinite(w).all()
  true = relative_residual(matrix, w, b)
  np.testing.assert_allclose(float(info.residual), true, rtol=1e-9)
  assert true <= 1.0  # never worse than w = 0
  assert bool(info.converged) == (true <= 1e-10)
  if max_steps == 200:
    assert bool(info.negative_curvature) or bool(info.converged)
    assert int(info.steps) < 200


def test_cg_flags_negative_curvature_on_most_indefinite_matrices():
  eigenvalues = np.geomspace(1.0, 100.0, D)
  eigenvalues[:: D // 3] *= -1.0
  infos = [
    run_cg(symmetric(eigenvalues, s), right_hand_side(s + 100), 200, 1e-10)[1] for s in range(8)
  ]
  assert sum(bool(info.negative_curvature) for info in infos) == 8


def test_cg_keeps_the_iterate_with_the_smallest_residual():
  """Ill conditioned, CG's residual is not monotone; what comes back must be the best so far."""
  matrix, b = symmetric(np.geomspace(1e-3, 1e3, D)), right_hand_side()
  residuals = []
  for max_steps in range(1, 30):
    w, info = run_cg(matrix, b, max_steps, 1e-14)
    residuals.append(relative_residual(matrix, w, b))
    np.testing.assert_allclose(float(info.residual), residuals[-1], rtol=1e-6)
  assert residuals[0] <= 1.0 and all(b <= a for a, b in zip(residuals, residuals[1:], strict=False))
  assert any(b == a for a, b in zip(residuals, residuals[1:], strict=False))  # some step was worse


@pytest.mark.parametrize("solve", (cg, neumann))
def test_a_nan_from_the_operator_is_reported(solve):
  b = right_hand_side()
  w, info = solve(lambda v: v.at[3].set(jnp.nan), b, 20, 1e-8)
  assert np.isnan(float(info.residual)) and not bool(info.converged)
  assert np.isfinite(w).all() and int(info.steps) == 1


def test_cg_reports_a_nan_that_comes_later():
  matrix, b = symmetric(np.geomspace(1.0, 1e3, D)), right_hand_side()

  def operator(v):  # NaN for any direction but the first
    return jnp.where(jnp.all(v == b), matrix @ v, jnp.nan)

  w, info = cg(operator, b, 20, 1e-8)
  assert np.isnan(float(info.residual)) and not bool(info.converged) and np.isfinite(w).all()


@pytest.mark.parametrize("solve", (cg, neumann))
def test_a_zero_right_hand_side_gives_zero(solve):
  matrix = symmetric(np.linspace(0.5, 1.5, D))
  w, info = solve(lambda v: matrix @ v, jnp.zeros(D), 20, 1e-8)
  np.testing.assert_array_equal(w, jnp.zeros(D))
  assert bool(info.converged) and float(info.residual) == 0.0 and int(info.steps) == 0


# --- Neumann -------------------------------------------------------------------------------------


def test_neumann_converges_where_the_eigenvalues_lie_in_0_2():
  matrix, b = symmetric(np.linspace(0.3, 1.7, D)), right_hand_side()
  w, info = run_neumann(matrix, b, 200, 1e-12)
  np.testing.assert_allclose(w, jnp.linalg.solve(matrix, b), rtol=1e-9, atol=1e-11)
  assert bool(info.converged) and 1 < int(info.steps) < 200


@pytest.mark.parametrize("max_steps", (1, 4, 20))
def test_neumann_is_the_truncated_series(max_steps):
  matrix, b = symmetric(np.linspace(0.3, 1.7, D)), right_hand_side()
  w, info = run_neumann(matrix, b, max_steps, 1e-14)
  want, term = jnp.zeros(D), b
  for _ in range(max_steps):
    want, term = want + term, term - matrix @ term
  np.testing.assert_allclose(w, want, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(float(info.residual), relative_residual(matrix, w, b), rtol=1e-8)
  assert int(info.steps) == max_steps


def test_neumann_reports_that_it_diverges():
  matrix, b = symmetric(np.linspace(0.5, 5.0, D)), right_hand_side()
  w, info = run_neumann(matrix, b, 300, 1e-10)
  assert not bool(info.converged) and np.isfinite(w).all()
  np.testing.assert_allclose(float(info.residual), relative_residual(matrix, w, b), rtol=1e-9)
  assert float(info.residual) <= 1.0


def test_neumann_that_overflows_returns_its_best_and_says_how_good_it_is():
  with jax.enable_x64(False):
    matrix, b = 30.0 * jnp.eye(3, dtype=jnp.float32), jnp.ones(3, jnp.float32)
    w, info = neumann(lambda v: matrix @ v, b, 60, 1e-3)
  np.testing.assert_array_equal(w, 0.0)
  assert float(info.residual) == 1.0 and int(info.steps) < 30 and not bool(info.converged)


# --- dual ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", (1.0, 1.5))
def test_dual_is_the_dense_solve(shift):
  rng = np.random.default_rng(0)
  a = jnp.asarray(3.0 * rng.normal(size=(12, D)))
  b, matrix = right_hand_side(), shift * jnp.eye(D) + a.T @ a
  split = lambda v: {"a": v[..., :10].reshape(*v.shape[:-1], 2, 5), "b": v[..., 10:]}
  join = lambda t: jnp.concatenate([t["a"].reshape(-1), t["b"]])
  operator = lambda t: split(matrix @ join(t))
  w, beside, info = solvers.dual(a, lambda t: (operator(t), join(t)), split(b), shift, 1e-10)
  np.testing.assert_array_equal(beside, join(w))
  np.testing.assert_allclose(join(w), jnp.linalg.solve(matrix, b), rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(
    float(info.residual), relative_residual(matrix, join(w), b), rtol=0.0, atol=1e-13
  )
  assert bool(info.converged) and float(info.residual) < 1e-12


def test_dual_reports_rows_that_do_not_belong_to_the_operator():
  a = jnp.asarray(np.random.default_rng(0).normal(size=(12, D)))
  b, matrix = right_hand_side(), jnp.eye(D) + 1.1 * a.T @ a
  w, _, info = solvers.dual(a, lambda v: (matrix @ v, None), b, 1.0, 1e-6)
  assert not bool(info.converged)
  np.testing.assert_allclose(float(info.residual), relative_residual(matrix, w, b), rtol=1e-9)


# --- what an operator returns beside the product --------------------------------------------------


@pytest.mark.parametrize(
  ("solve", "eigenvalues", "moves"),
  (
    (solvers.cg, np.geomspace(1.0, 10.0, D), True),
    (solvers.cg, np.geomspace(1e-3, 1e3, D), False),  # the best iterate is 0
    (solvers.cg, np.r_[-np.ones(3), np.linspace(1.0, 1.9, D - 3)], True),  # negative curvature
    (solvers.neumann, np.linspace(0.3, 1.7, D), True),
    (solvers.neumann, np.linspace(0.5, 5.0, D), False),  # diverges
  ),
)
@pytest.mark.parametrize("max_steps", (0, 1, 7, 40))
def test_the_value_beside_the_product_is_that_of_the_solution(solve, eigenvalues, moves, max_steps):
  matrix, b = symmetric(eigenvalues), right_hand_side()
  other = jnp.asarray(np.random.default_rng(3).normal(size=(4, D)))
  operator = lambda v: (matrix @ v, {"other": other @ v})
  w, beside, info = jax.jit(lambda b: solve(operator, b, max_steps, 1e-13))(b)
  assert int(info.steps) <= max_steps and bool(jnp.any(w != 0)) == (moves and max_steps > 0)
  scale = float(jnp.linalg.norm(other) * jnp.linalg.norm(w))
  np.testing.assert_allclose(beside["other"], other @ w, rtol=0.0, atol=1e-9 * scale)


@pytest.mark.parametrize("near", (True, False))
def test_the_value_beside_the_product_counts_the_start(near):
  matrix, b = symmetric(np.geomspace(1.0, 1e2, D)), right_hand_side()
  exact = jnp.linalg.solve(matrix, b)
  start = exact + 1e-3 if near else -3.0 * exact
  w, beside, _ = solvers.cg(lambda v: (matrix @ v, v[:5]), b, 6, 1e-13, start)
  np.testing.assert_allclose(beside, w[:5], rtol=1e-12, atol=1e-14)


def test_the_value_beside_a_product_that_is_not_finite_does_not_count():
  matrix, b = symmetric(np.geomspace(1.0, 5.0, D)), right_hand_side()

  def operator(v):
    return jnp.where(jnp.all(v == b), matrix @ v, jnp.nan), jnp.where(jnp.all(v == b), v, jnp.nan)

  w, beside, _ = solvers.cg(operator, b, 20, 1e-8)
  assert jnp.any(w != 0)
  np.testing.assert_array_equal(beside, w)


# --- transformations -----------------------------------------------------------------------------


def solve_by(name, matrix, a, b):
  if name == "dual":
    w, _, info = solvers.dual(a, lambda v: (v + a.T @ (a @ v), None), b, 1.0, 1e-10)
    return w, info
  return {"cg": cg, "neumann": neumann}[name](lambda v: matrix @ v, b, 40, 1e-10)


@pytest.mark.parametrize("name", ("cg", "neumann", "dual"))
def test_jit_and_vmap_are_a_loop(name):
  """Systems that end after different numbers of steps, for different reasons, in one batch."""
  spectra = [
    np.linspace(0.9, 1.1, D),  # converges soon
    np.linspace(0.3, 1.7, D),  # converges late
    np.r_[-np.ones(3), np.linspace(1.0, 1.9, D - 3)],  # indefinite
    np.geomspace(1e-2, 1e2, D),  # hits the limit
  ]
  matrices = jnp.stack([symmetric(e, s) for s, e in enumerate(spectra)])
  rows = jnp.asarray(np.random.default_rng(5).normal(size=(4, 12, D)))
  bs = jnp.stack([right_hand_side(s) for s in range(4)])
  bs = bs.at[1].multiply(1e3)
  solve = lambda *args: solve_by(name, *args)
  loop = [solve(matrices[t], rows[t], bs[t]) for t in range(4)]
  w, info = jax.jit(jax.vmap(solve))(matrices, rows, bs)
  want_w, want_info = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
  np.testing.assert_array_equal(info.negative_curvature, want_info.negative_curvature)
  np.testing.assert_array_equal(info.converged, want_info.converged)
  np.testing.assert_array_equal(info.steps, want_info.steps)
  if name != "dual":
    assert len(set(info.steps.tolist())) > 1
  # 1e-7: rounding differs under vmap, and CG amplifies it on the ill-conditioned system.
  for got, want in zip(w, want_w, strict=True):
    chex.assert_trees_all_close(got, want, rtol=0.0, atol=1e-7 * float(jnp.linalg.norm(want)))
  chex.assert_trees_all_close(info.residual, want_info.residual, rtol=1e-6, atol=1e-12)


def test_results_keep_float32():
  with jax.enable_x64(False):
    matrix, b = symmetric(np.linspace(1.0, 3.0, D)).astype(jnp.float32), jnp.ones(D, jnp.float32)
    for solve in (cg, neumann):
      w, info = solve(lambda v: matrix @ v, b, 50, 1e-5)
      assert w.dtype == jnp.float32 and info.residual.dtype == jnp.float32


def precisions(jaxpr):
  """Of all products of matrices, those inside calls and loops too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      yield eqn.params["precision"]
    for inner in jaxprs_in_params(eqn.params):
      yield from precisions(inner)


def test_products_with_a_basis_are_not_rounded_on_accelerators():
  """The operator's are the caller's, as a network's are."""
  eye = jnp.eye(8)

  def operator(v):
    return jax.lax.dot_general(eye, v, (((1,), (0,)), ((), ())), jax.lax.Precision.DEFAULT)

  for f, others in (
    (lambda a, b: solvers.dual(a, lambda v: (operator(v), None), b, 1.0, 1e-3).w, 1),
    (lambda a, b: lanczos.lanczos(operator, b, 4).basis, 1),
    (lambda a, b: solvers.split(a @ eye, a)[1], 1),
  ):
    found = list(precisions(jax.make_jaxpr(f)(jnp.ones([3, 8]), jnp.ones(8)).jaxpr))
    highest = [p for p in found if p is not None and set(p) == {jax.lax.Precision.HIGHEST}]
    assert len(highest) >= 4 and len(found) - len(highest) == others, found


@pytest.mark.parametrize("width", (3, 60))  # fewer and more entries than the 20 rows
@pytest.mark.parametrize("size", (1.0, 1e2, 1e4))
def test_dual_in_float32_where_the_rows_are_large(size, width):
  """w along the rows is 1e-8 of b there, which a difference of two numbers like b cannot show."""
  rng = np.random.default_rng(0)
  rows, b = size * rng.normal(size=(20, width)), rng.normal(size=width)
  _, singular, basis = np.linalg.svd(rows, full_matrices=False)
  exact = np.linalg.solve(np.eye(width) + rows.T @ rows, b)
  narrow = lambda x: jnp.asarray(x, jnp.float32)
  a = narrow(rows)
  operator = lambda v: ({"w": v["w"] + a.T @ (a @ v["w"])}, None)
  w, _, _ = solvers.dual(a, operator, {"w": narrow(b)}, 1.0, 1e-3)
  np.testing.assert_allclose(w["w"], exact, rtol=1e-3, atol=2e-5 * np.linalg.norm(exact))
  along = basis @ np.asarray(w["w"], np.float64)
  np.testing.assert_allclose(along, basis @ exact, rtol=2e-3, atol=2e-7 * np.linalg.norm(exact))
