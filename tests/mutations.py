"""Break the code on purpose, one small fault at a time. The test named beside a fault must fail.

    python -m tests.mutations              # all faults, several minutes on two idle cores
    python -m tests.mutations --only=cg    # those whose file or line contains "cg"

Each fault replaces one piece of text in a copy of the working tree, so the tree itself stays as it
is. CI does not run the faults; `mutations_test.py` checks that each still has its place.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).absolute().parents[1]
_ONLY = flags.DEFINE_string("only", "", "Runs the faults whose file or text contains this.")


class Fault(NamedTuple):
  """A fault: `old` becomes `new` in a file of shrinkmeta/, and a test must fail."""

  file: str  # below shrinkmeta/, without .py
  old: str  # occurs exactly once
  new: str
  test: str  # below tests/, without _test.py
  named: str  # pytest's -k


FAULTS = (
  # The mode and its model.
  Fault("mode/task_model", "lambda p, s, v: p + s * v, self.part",
        "lambda p, s, v: p + s * s * v, self.part", "gradients/implicit", "the_mode_is_the_closed"),
  Fault("mode/task_model", "0.0 if _is_none(p) else p * v / self.n",
        "0.0 if _is_none(p) else 1.02 * p * v / self.n",
        "gradients/implicit", "the_mode_is_the_closed_form"),
  Fault("mode/task_model", "share, with_prior = self._share(batch), ",
        "share, with_prior = 1.0, ", "mode/optimise",
        "mini_batches_with_weights"),
  Fault("mode/task_model", "(of_data + c * s * of_prior) / (1.0 + c * s * s)",
        "(of_data + c * s * of_prior) / (1.0 + c * s)", "mode/whitening", "balance"),
  Fault("mode/whitening", "jnp.exp(0.5 * jnp.where(jnp.isposinf(v), 0.0, v))",
        "jnp.exp(0.5 * v)", "mode/whitening", "gradients_at_the_limits"),
  Fault("mode/optimise", "done = norm <= inner.tol if", "done = norm <= 2 * inner.tol if",
        "mode/optimise", "stops_exactly"),
  Fault("mode/optimise", "score = jnp.where(mask != 0, jax.random.uniform(key, mask.shape), -1.0)",
        "score = jax.random.uniform(key, mask.shape)", "mode/optimise", "draw"),
  Fault("mode/optimise", "draw(jax.random.fold_in(key, step), batch", "draw(key, batch",
        "mode/optimise", "mini_batches"),
  Fault("quasi_newton", "found.learning_rate > 0, new, old", "found.learning_rate >= 0, new, old",
        "quasi_newton", "without_a_step"),
  Fault("quasi_newton", "value=value.astype(state.value.dtype), grad=tree(grad)",
        "value=value.astype(state.value.dtype)", "quasi_newton", "stored_value_and_gradient"),
  Fault("mode/optimise", "return _judged(inner, at, known.value, known.grad, True), (",
        "return _judged(inner, at, known.value, measured[1], True), (",
        "mode/optimise", "lbfgs_evaluates_only or evaluates_no_point_twice or stops_exactly"),
  Fault("mode/task_model", "if not wide or not set(", "if not set(", "mode/whitening",
        "narrow_float or bfloat16"),
  Fault("mode/optimise", "known = not info_at_end or (task.measures and end is None)",
        "known = not info_at_end", "mode/optimise", "no_point_twice"),
  Fault("gradients/total", 'spec.has_mode or algorithm.phi == "pooled" or', "",
        "gradients/failed_tasks", "infinite_loss"),
  Fault("gradients/total", "jnp.where(jnp.isfinite(value), a + b, jnp.nan)",
        "a + jnp.where(jnp.isfinite(b), b, 0.0)",
        "gradients/failed_tasks", "reml_of_a_phi"),
  Fault("choice/losses", "if spec.inner.tol is None else False", "",
        "choice/choose", "infinite_training_loss_at_phi"),
  Fault("devices/batching", "1 < size == count", "size == count",
        "devices/batching", "one_task_is_not_batched"),
  # The norm of a task's gradient.
  Fault("gradients/per_task", "most / jnp.where(larger, norm, 1.0)",
        "1.02 * most / jnp.where(larger, norm, 1.0)", "learner/clipping", "mean_of_clipped"),
  Fault("gradients/per_task", 'followed = grad if spec.algorithm.sigma == "learned" else grad.phi',
        "followed = grad", "learner/clipping", "mean_of_clipped"),
  Fault("gradients/per_task", "scale = jnp.where(largest > 0, largest, 1.0)",
        "scale = 1.0", "learner/clipping", "square_overflows"),
  # Uncertainty.
  Fault("uncertainty/inverse_root", "return root(*primals), slope * _once(point)",
        "return root(*primals), 1.02 * slope * _once(point)", "uncertainty/derivatives", "draws"),
  Fault("uncertainty/inverse_root", "in_basis = along @ (f * inner) + back * f_mixed",
        "in_basis = along @ (f * inner)", "uncertainty/derivatives", "draws"),
  Fault("uncertainty/laplace", "held = jnp.sum(along * by_example(factor.lam, along), 0)",
        "held = jnp.sum(along * along, 0)", "uncertainty/derivatives", "draws_have"),
  Fault("uncertainty/laplace", "at_mode, batch, taken)", "at_mode, batch, frozenset())",
        "uncertainty/posterior", "named_under_jit"),
  Fault("curvature/one_by_one", "(*args, cpu=in_turn,", "(*args, cpu=jax.vmap(f),",
        "curvature/lapack", "dual_solves"),
  Fault("curvature/lanczos", "vectors @ turn)", "vectors @ turn.T)",
        "uncertainty/derivatives", "lanczos"),
  # Gradients through the mode.
  Fault("gradients/evidence", "balance(g, z, curvature_at_mode(implicit, model, z))",
        "balance(g, z, model.count)", "gradients/precise_data", "empirical_bayes"),
  Fault("gradients/per_task", "along = curvature_at_mode(spec.implicit, model, mode.z, key)",
        "along = model.count", "gradients/precise_data", "sigma_reptile"),
  Fault("gradients/twice/newton", "fori_loop(0, 2, lambda", "fori_loop(0, 1, lambda",
        "gradients/twice", "a_network_against_differences"),
  Fault("gradients/implicit", "direct = optax.tree.sub(g, curved)",
        "direct = optax.tree.sub(optax.tree.scale(1.02, g), curved)", "gradients/implicit",
        "the_jacobian_of_the_mode"),
  Fault("gradients/implicit", "direct = optax.tree.sub(g, curved)", "direct = g",
        "gradients/free_modules", "gradients_and_losses_are_the_limit"),
  Fault("gradients/implicit", "lambda p, w, z: p * w * z, precision",
        "lambda p, w, z: 0.5 * p * w * z, precision", "gradients/implicit",
        "the_jacobian_of_the_mode"),
  Fault("gradients/implicit", "optax.tree.scale(-1.0, w))", "optax.tree.scale(1.0, w))",
        "gradients/implicit", "the_derivative_in_the_data"),
  Fault("gradients/implicit", "share = counted(weights(batch)) / divisor(counted(mask))",
        "share = 1.0", "gradients/implicit", "scaled_to_all_examples"),
  Fault("gradients/implicit", "return model.count  # it takes", "pass  # it takes",
        "curvature/custom_vjp", "identity"),
  Fault("gradients/evidence", "return fit - 0.5 * value, grad", "return fit - value, grad",
        "gradients/evidence", "the_learner_follows and restricted0-vmap"),
  Fault("gradients/evidence", "0.5 * s * g * z, model.white.scale", "s * g * z, model.white.scale",
        "gradients/evidence", "linear_gaussian_value"),
  Fault("gradients/log_det", "value = jnp.sum(jnp.log1p(square))",
        "value = 1.001 * jnp.sum(jnp.log1p(square))", "gradients/log_det", "exact_value"),
  Fault("gradients/log_det", "of_rows = 2.0 * by_example", "of_rows = by_example",
        "gradients/log_det", "exact_value"),
  Fault("gradients/per_task", "lambda s, v: -s * v, model.white.scale, mode.z",
        "lambda s, v: s * v, model.white.scale, mode.z", "learner/learner",
        "reptile_is_the_mean_way_back"),
  Fault("gradients/per_task", "return total / divisor(jnp.asarray(sum(counts)))",
        "return total / 2", "learner/learner", "the_pooled_rows"),
  # The step of phi and sigma.
  Fault("learner/meta_step", "optax.tree.add_scale(grad.phi, -weight, prior)",
        "optax.tree.add_scale(grad.phi, weight, prior)", "learner/learner_priors",
        "each_prior_is_added and imaml"),
  Fault("learner/meta_step", "count = jnp.maximum(sums.sound, 1)",
        "count = jnp.maximum(sums.tasks, 1)", "gradients/failed_tasks",
        "the_step_is_that_of_the_other_tasks and maml and vmap"),
  Fault("gradients/total", "ok = jnp.all(jnp.stack(finite)) & jnp.all(counts > 0)",
        "ok = jnp.all(counts > 0)", "gradients/failed_tasks",
        "the_step_is_that_of_the_other_tasks and maml and vmap"),
  Fault("gradients/total", "x.astype(jnp.promote_types(dtype, jnp.float32))", "x.astype(dtype)",
        "training/fit", "add_up_in_sixteen_bits"),
  # Curvature and solvers.
  Fault("curvature/products", "lambda v: vjp(output_hessian(jvp(v)))",
        "lambda v: vjp(jvp(v))", "curvature/products", "gauss_newton_is_the_dense"),
  Fault("curvature/solvers", "negative, broken = curvature <= 0, ",
        "negative, broken = curvature < -1e30, ", "curvature/solvers", "negative_curvature_two"),
  Fault("curvature/solvers", "where(square < s.best.square, _At(w, beside",
        "where(square == square, _At(w, beside", "curvature/solvers", "keeps_the_iterate"),
  Fault("curvature/solvers", "alpha, (s.direction, beside))", "alpha, (s.direction, s.beside))",
        "curvature/solvers", "the_value_beside_the_product"),
  Fault("curvature/solvers", "sums = optax.tree.add(sums, (residual, beside))",
        "sums = optax.tree.add(sums, (residual, residual))",
        "curvature/solvers", "the_value_beside_the_product"),
  Fault("gradients/implicit", "direct = optax.tree.sub(g, curved)",
        "direct = optax.tree.sub(g, curved if model.frozen else product(u))",
        "gradients/implicit", "costs_no_product"),
  Fault("curvature/solvers", "(s.square > tol**2 * norm2)", "(s.square > tol * norm2)",
        "curvature/solvers", "stops_at_the_first_step"),
  Fault("curvature/vectors", "[x * y for x, y in group]", "[x * x for x, y in group]",
        "curvature/vectors", "one_vector"),
  Fault("curvature/vectors", "if x.size <= _SMALL else i]", "if x.size <= 2**40 else i]",
        "curvature/vectors", "split_over_devices"),
  Fault("curvature/lanczos", "for _ in range(2):", "for _ in range(0):", "curvature/lanczos",
        "orthonormal"),
  # Likelihoods and densities.
  Fault("model/likelihood", "jnp.sum(jnp.where(mask != 0, mask * log_prob, 0.0))",
        "jnp.sum(mask * log_prob)", "model/likelihood", "padding_without_a_density"),
  Fault("model/likelihood", "y * jnp.log(small) - small - gammaln(jnp.where(y < 20, y, 0.0) + 1)",
        "y * jnp.log(small) - small", "model/likelihood", "poisson"),
  Fault("model/likelihood", "1 / (12 * large)", "1 / (13 * large)", "model/likelihood", "poisson"),
  Fault("model/density", "jnp.square(z) + safe + jnp.log(2 * jnp.pi)",
        "jnp.square(z) + jnp.log(2 * jnp.pi)", "model/density", "log_prior"),
  # Choice, serving, data, adapters.
  Fault("choice/path", "np.std(difference, ddof=1)", "np.std(losses, ddof=1)", "choice/choose",
        "the_paired_error"),
  Fault("choice/path", "if mean == best or mean - best <= most", "if mean == best",
        "choice/choose", "the_paired_error or tolerance_is_in_nats"),
  Fault("serving/predict", "jnp.asarray(x).at[index].get(", "jnp.asarray(x).at[0 * index].get(",
        "serving/predict", "rows_are_those"),
  Fault("adapters/rewrite", "index * layers + number]", "index * layers + 0 * number]",
        "serving/predict", "one_layer"),
  Fault("adapters/rewrite", "  return primals[1], tangents[0]", "  return primals[1], tangents[1]",
        "serving/predict", "one_layer"),
  Fault("adapters/rewrite", "_also(arrays[name], row.layer(number))", "arrays[name]",
        "serving/predict", "one_layer"),
  Fault("data/source", "out = np.zeros((len(leaves), n", "out = np.ones((len(leaves), n",
        "data/source", "padding_is_zero"),
  Fault("data/source", "most = np.maximum.accumulate(ordered)", "most = ordered", "data/source",
        "a_shape_fits_both"),
  Fault("adapters/trees", "return layers <= inputs and", "return layers <= 9 * inputs and",
        "adapters/lora", "wrong_rules"),
  Fault("adapters/trees", "bias[:1] in ((), (layers,))", "bias[:1] in ((), (layers,), (8,))",
        "adapters/lora", "kernels_of_attention"),
  Fault("adapters/tensors_file", "ascontiguousarray(array).reshape(array.shape)",
        "ascontiguousarray(array)", "adapters/export", "a_whole_network"),
  Fault("adapters/trees", "if len(shapes := {", "if not len(shapes := {", "adapters/lora",
        "labels_name_kernels"),
  Fault("adapters/low_rank", "b = b.reshape(groups, -1, b.shape[-1])",
        "b = b[::-1].reshape(groups, -1, b.shape[-1])", "adapters/attach",
        "attached_equals_merged_in_float32 and conv"),
  Fault("learner/statistics", "ok = num_examples(batch, jnp.float32) > 0",
        "ok = num_examples(batch, jnp.float32) >= 0", "learner/statistics", "do_not_count"),
  # Programs and devices.
  Fault("learner/kept", "build(learner_of(spec))", "build(learner)", "learner/kept",
        "go_with_their_learner and evaluate"),
  Fault("gradients/total", "judged = (norm, result.val_nll) if", "judged = (result.val_nll,) if",
        "gradients/failed_tasks", "gradient_alone"),
  Fault("devices/batching", "jax.jit(block, inline=True)", "block",
        "devices/batching", "traced_once"),
  Fault("devices/batching", "jnp.sum(jnp.asarray(x)[None], 0)", "jnp.asarray(x)",
        "devices/batching", "a_mesh_is"),
  Fault("model/outputs", "if any(isinstance(x, Tracer) for x in jax.tree.leaves(phi)):",
        "if not validate.readable(phi):", "devices/processes", "two_processes"),
  # Mixed models.
  Fault("mixed/compare", "math.comb(v, i) / 2**v", "1 / (v + 1)", "mixed/intervals",
        "the_mixture"),
  Fault("mixed/compare", "p = (1 + above) / (1 + draws)", "p = above / draws",
        "mixed/intervals", "bootstrap"),
  Fault("mixed/compare", "fit.residual / np.sqrt(weights)", "fit.residual", "mixed/intervals",
        "moments"),
  Fault("mixed/criteria/laplace", "(other := at(given, u))[1] > height:",
        "(other := at(given, u))[1] < np.inf:", "mixed/laplace", "start_far_away"),
  Fault("mixed/answers/model", "if all(checks.outside(columns, part) for part in parts)",
        "if False", "mixed/answers/model", "covariances_are_not_nested"),
  Fault("mixed/answers/predict", "known, missing = groups[j] >= 0, groups[i] == -1",
        "known, missing = groups[j] >= 0, groups[i] < 0", "mixed/answers/predict", "its_school"),
  Fault("diagnostics/evaluation", "jnp.all(classes | (weight == 0)), share,", "True, share,",
        "diagnostics/evaluation", "counts_have_no_accuracy"),
  Fault("learner/statistics", "256 * rest + byte", "byte",
        "learner/statistics", "sum_of_integers"),
  Fault("learner/statistics", "return x.astype(jnp.promote_types(x.dtype, jnp.float32))",
        "return x", "learner/statistics", "sum_of_sixteen_bits"),
  Fault("training/checkpoint_format", "jnp.stack([leaf.real, leaf.imag], axis=-1)", "leaf.real",
        "training/checkpoints", "complex_constants"),
  Fault("training/checkpoint_format", "named(state).items() if leaf.size}",
        "named(state).items()}", "training/checkpoints", "without_an_entry"),
  Fault("serving/deltas", "lengths != {(len(deltas.ids),)}:", "lengths == set():",
        "serving/predict", "lost_tasks"),
  Fault("serving/rounding", "finite = finite and", "_ = finite and", "serving/rounding",
        "rounds_to_infinity"),
)  # fmt: skip


def copy(folder: pathlib.Path) -> None:
  """Copy what git tracks, and new files that it does not ignore, to `folder`."""
  listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
  for name in filter(None, names.split("\0")):
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)


def outcome(folder: pathlib.Path, fault: Fault) -> int:
  """Return pytest's exit status with the fault in the copy: 1 if a test failed."""
  path = folder / "shrinkmeta" / f"{fault.file}.py"
  right = path.read_text()
  path.write_text(right.replace(fault.old, fault.new))
  try:
    test = [f"tests/{fault.test}_test.py", "-k", fault.named]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=1200).returncode
  finally:
    path.write_text(right)


def main(argv: Sequence[str]) -> None:
  """Run the faults, and exit with 1 if one was not noticed."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  chosen = [f for f in FAULTS if any(_ONLY.value in text for text in f)]
  missed = 0
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    copy(folder)
    for fault in chosen:
      code = outcome(folder, fault)
      missed += code != 1
      told = {0: "NOT NOTICED", 1: "noticed"}.get(code, f"pytest ended with {code}")
      print(f"{told:12} {fault.file}: {fault.old.strip()}  ->  {fault.new.strip()}", flush=True)
  logging.info("%d of %d faults were noticed.", len(chosen) - missed, len(chosen))
  sys.exit(bool(missed))


if __name__ == "__main__":
  app.run(main)
