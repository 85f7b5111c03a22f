import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from experiments.causes import crossed, kinks, linear, outliers
from experiments.runs import results


def test_closed_forms_are_those_of_the_library():
  with jax.enable_x64(True):
    few = linear.draw(jax.random.key(3), 4)
    phi = {name: jnp.zeros(linear.WIDTH) for name in linear.MODULES}
    log_sigma2 = {"fast": jnp.log(0.5), "slow": jnp.log(2.0)}

    def judge(inner):
      one = lambda task: linear.nats(
        sm.map_estimate(linear.LIKELIHOOD, linear.LABELS, phi, log_sigma2, task.train, inner=inner)[
          0
        ],
        task.val,
      )
      return jax.jit(lambda tasks: jnp.mean(jax.vmap(one)(tasks)))(few)

    solved = judge(sm.Inner(sm.lbfgs(), steps=200, tol=1e-10))
    np.testing.assert_allclose(linear.exact(log_sigma2, few), solved, rtol=1e-9)
    steps = judge(sm.Inner(optax.sgd(linear.RATE), steps=30))
    np.testing.assert_allclose(linear.exact(log_sigma2, few, 30), steps, rtol=1e-9)
    assert abs(steps - solved) > 0.1


def test_short_loops_learn_a_large_sigma():
  with jax.enable_x64(True):
    tasks = linear.draw(jax.random.key(0), 64)
    at_mode, of_steps = linear.best(tasks), linear.best(tasks, 50, start=4.0)
    implicit, unrolled = (linear.learn(f"sigma_{name}", 50, tasks) for name in ("imaml", "maml"))
    least = linear.judged("exact mode", None, at_mode, tasks).nats_at_mode
  logs = lambda sigma: np.log([sigma[name] for name in linear.MODULES])
  # The unrolled gradient is exact for its loop.
  np.testing.assert_allclose(logs(unrolled.sigma), logs(of_steps), atol=2e-4)
  # The length of the loop moves sigma by more than the error of the implicit gradient does.
  by_length = logs(of_steps) - logs(at_mode)
  by_gradient = logs(implicit.sigma) - logs(of_steps)
  assert by_length.min() > 1.5 and np.abs(by_gradient).max() < 0.25
  # Each sigma is best for what it was chosen by.
  assert implicit.nats_after_steps > unrolled.nats_after_steps + 0.01
  assert unrolled.nats_at_mode > least + 0.1


def reptile_gradients(arm, state, count):
  """(norms of phi - theta_hat [count], their means over two halves of the tasks)."""
  keys = jax.random.split(jax.random.key(outliers._TASKS))
  tasks = arm.problem.train.sample(keys[0], 0, count)
  learner = sm.reptile(
    arm.model.likelihood, arm.learner.labels, inner=arm.learner.spec.inner
  )  # without the mesh of the run
  thetas, _ = learner.adapt_tasks(state, tasks.train)
  moved = jax.tree.map(lambda phi, theta: np.asarray(phi - theta, np.float64), state.phi, thetas)
  flat = np.concatenate([x.reshape(count, -1) for x in jax.tree.leaves(moved)], 1)
  return np.linalg.norm(flat, axis=1), [flat[: count // 2].mean(0), flat[count // 2 :].mean(0)]


def test_crossed_runs(tmp_path, command, python):
  flags = ["--table=sinusoid", "--size=smoke", "--seeds=0", f"--out={tmp_path}"]
  done = command("train", *flags, "--algorithms=reptile,sigma_imaml")
  assert done.returncode == 0, done.stderr
  assert command("evaluate", tmp_path).returncode == 0
  own = {
    arm: results.read_json(tmp_path / f"{arm}-0" / "test.json")[1][0].nll.mean(1)
    for arm in ("reptile", "sigma_imaml")
  }
  out = tmp_path / "out"
  folders = [tmp_path / "reptile-0", tmp_path / "sigma_imaml-0"]
  done = python(*folders, "--factors=1,3", f"--out={out}", module="experiments.causes")
  assert done.returncode == 0, done.stderr
  with (out / "crossed.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  get = lambda phi_of, adapted_as, factor: np.array(
    [
      float(row["nll_nats_per_example"])
      for row in rows
      if (row["phi_of"], row["adapted_as"], float(row["sigma_factor"]))
      == (phi_of, adapted_as, factor)
    ]
  )
  for arm in own:  # a run crossed with itself is that run
    np.testing.assert_allclose(get(f"{arm}-0", f"{arm}-0", 1), own[arm], rtol=1e-5)
  assert len(rows) == 3 * (2 + 4)  # reptile has no sigma to multiply
  mixed = get("reptile-0", "sigma_imaml-0", 1)
  assert abs(mixed[0] - own["reptile"][0]) < 1e-5 and abs(mixed[-1] - own["reptile"][-1]) > 1e-3
  wider = get("sigma_imaml-0", "sigma_imaml-0", 3)
  assert wider[0] == pytest.approx(own["sigma_imaml"][0], rel=1e-5)
  assert abs(wider[-1] - own["sigma_imaml"][-1]) > 1e-4
  assert json.loads((out / "crossed.json").read_text())["config"]["factors"] == [1, 3]

  done = python(
    *folders, "--experiment=outliers", "--tasks=6", f"--out={out}", module="experiments.causes"
  )
  assert done.returncode == 0, done.stderr
  with (out / "outliers.csv").open(newline="") as file:
    rows = {(row["phi_of"], row["gradient_of"]): row for row in csv.DictReader(file)}
  assert len(rows) == 3 * 2
  _, arms, states = crossed.restored(folders, None)
  norms, halves = reptile_gradients(arms[0], states[0], 6)
  row = rows["reptile-0", "reptile-0"]
  measured = [float(row[name]) for name in ("median_norm", "largest_over_median")]
  np.testing.assert_allclose(
    measured, [np.median(norms), norms.max() / np.median(norms)], rtol=1e-3
  )
  cosine = halves[0] @ halves[1] / np.prod([np.linalg.norm(half) for half in halves])
  assert float(row["cosine_of_halves"]) == pytest.approx(cosine, rel=1e-3)
  spread = np.mean(norms**2) / (halves[0] @ halves[1]) - 1
  assert float(row["tasks_until_signal"]) == pytest.approx(spread, rel=1e-3)

  other = shutil.copytree(tmp_path / "reptile-0", tmp_path / "other" / "reptile-0")
  text = (other / "run.json").read_text()
  (other / "run.json").write_text(text.replace('"shots": 10', '"shots": 5'))
  done = python(folders[1], other, module="experiments.causes")
  assert done.returncode != 0 and "have different problems or networks" in done.stderr

  (other / "run.json").write_text(json.dumps(json.loads(text) | {"checksums": {"train": "other"}}))
  done = python(folders[1], other, module="experiments.causes")
  assert done.returncode != 0 and "reptile-0 was trained by another protocol" in done.stderr


@pytest.mark.parametrize(
  "flags,told",
  (
    (["--factors=0"], "--factors wants numbers above 0"),
    (["--factors=2"], "name their folders"),
    (["--split=validation"], "--split and --factors are for crossed runs"),
    (["--data_dir=folder"], "--data_dir is for folders of runs"),
    (["--experiment=kinks", "folder"], "--experiment=kinks takes no folders of runs; got 1"),
    (["--experiment=outliers"], "--experiment=outliers takes the folders of runs; got 0"),
    (["--experiment=outliers", "folder", "--tasks=3"], "an even number"),
    (["runs", "--steps=3"], "leave --steps out"),
    (["runs", "--tasks=3"], "leave --tasks out"),
  ),
)
def test_flags_without_a_meaning_are_refused(tmp_path, python, flags, told):
  done = python(*flags, f"--out={tmp_path}", module="experiments.causes")
  assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr


def test_the_table_of_short_loops(tmp_path, python):
  done = python("--steps=5", f"--out={tmp_path}", module="experiments.causes")
  assert done.returncode == 0, done.stderr
  with (tmp_path / "linear.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  named = [(row["algorithm"], row["inner_steps"]) for row in rows]
  assert named == [("exact mode", ""), ("sigma_imaml", "5"), ("sigma_maml", "5")]
  mode, *short = (float(row["nll_nats_per_example_at_the_mode"]) for row in rows)
  assert mode < min(short) and "exact mode,,0.851,0.923,3.067,3.067" in done.stdout
  assert json.loads((tmp_path / "linear.json").read_text())["config"]["steps"] == [5]


def test_factors_leave_frozen_and_free_modules():
  state = sm.sigma_imaml(
    linear.LIKELIHOOD, linear.LABELS, init_sigma={"fast": 0.5, "slow": 0.0}
  ).init({name: jnp.zeros(linear.WIDTH) for name in linear.MODULES})
  found = crossed.scaled(state, 2.0).log_sigma2
  np.testing.assert_allclose(np.exp(0.5 * found["fast"]), 1.0, rtol=1e-6)
  assert found["slow"] == -np.inf


@pytest.mark.slow
def test_implicit_gradients_hold_at_modes_of_smooth_networks_alone():
  with jax.enable_x64(True):
    (smooth,) = kinks.solve("tanh", (2_000,), 3)
    (kinked,) = kinks.solve("relu", (2_000,), 3)
  assert smooth.gradient_norm_at_mode < 1e-8 and kinked.gradient_norm_at_mode > 0.05
  assert smooth.implicit_derivative == pytest.approx(smooth.difference, rel=1e-4)
  assert kinked.converged_percent == 0
  assert abs(kinked.implicit_derivative / kinked.difference - 1) > 0.1
