import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.causes import crossed, kinks, linear
from experiments.runs import results


def test_closed_form_is_the_mode_of_the_library():
  with jax.enable_x64(True):
    few = linear.draw(jax.random.key(3), 4)
    phi = {name: jnp.zeros(linear.WIDTH) for name in linear.MODULES}
    log_sigma2 = {"fast": jnp.log(0.5), "slow": jnp.log(2.0)}

    @jax.jit
    def solved(tasks):
      inner = sm.Inner(sm.lbfgs(), steps=200, tol=1e-10)
      one = lambda task: linear.nats(
        sm.map_estimate(linear.LIKELIHOOD, linear.LABELS, phi, log_sigma2, task.train, inner=inner)[
          0
        ],
        task.val,
      )
      return jnp.mean(jax.vmap(one)(tasks))

    np.testing.assert_allclose(linear.at_mode(log_sigma2, few), solved(few), rtol=1e-9)


def test_longer_loops_learn_a_sigma_nearer_to_the_best_one():
  best, *found = linear.run((15, 150), count=64)
  assert [one.algorithm for one in found] == 2 * ["sigma_imaml", "sigma_maml"]
  distance = [abs(np.log(one.sigma["fast"] / best.sigma["fast"])) for one in found]
  assert max(distance[2:]) < min(distance[:2]) - 0.5
  # Both gradients learn much the same: the length of the loop decides, not the gradient.
  np.testing.assert_allclose(*(np.log(one.sigma["fast"]) for one in found[2:]), atol=0.3)
  with jax.enable_x64(True):
    tasks = linear.draw(jax.random.key(0), 64)
    log = lambda one: {name: 2 * np.log(value) for name, value in one.sigma.items()}
    moved = {"fast": log(best)["fast"] + 0.1, "slow": log(best)["slow"]}
    least, *others = (float(linear.at_mode(s, tasks)) for s in map(log, (best, *found)))
    assert min(others) > least and float(linear.at_mode(moved, tasks)) > least


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

  done = python("--factors=0", f"--out={out}", module="experiments.causes")
  assert done.returncode != 0 and "--factors wants numbers above 0" in done.stderr


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
  assert smooth.gradient_norm_at_mode < 1e-8 and kinked.gradient_norm_at_mode > 1e-3
  assert smooth.implicit_derivative == pytest.approx(smooth.difference, rel=1e-3)
  assert kinked.converged_percent == 0
