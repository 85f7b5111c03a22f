"""The verdict of `check_meta_gradient` on every kind of algorithm and of model.

It is "fine" if the gradient is that of the loss. It is "off", with the module and the reason, if
the algorithm leaves out a term on purpose. It is "unsure" if there is no loss to compare with.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.gradients import per_task

pytestmark = pytest.mark.usefixtures("x64")

T, N = 2, 6
STEPS = sm.Inner(optax.sgd(0.1), 3)
MODE = sm.Inner(optax.sgd(0.2, momentum=0.8), 3000, tol=1e-9)
EXACT = sm.Implicit("hessian", max_steps=200, tol=1e-11)
AT_THE_MODE = {"inner": MODE, "implicit": EXACT, "init_sigma": 0.3}
# Each of the table's kinds: anil stands for every hand-picked mask.
LEARNERS = {
  "maml": (sm.maml, {"inner": STEPS}),
  "fomaml": (sm.fomaml, {"inner": STEPS}),
  "imaml": (sm.imaml, AT_THE_MODE),
  "reptile": (sm.reptile, {"inner": STEPS}),
  "sigma_maml": (sm.sigma_maml, {"inner": STEPS}),
  "sigma_imaml": (sm.sigma_imaml, AT_THE_MODE),
  "sigma_reptile": (sm.sigma_reptile, AT_THE_MODE),
  "meta_sgd": (sm.meta_sgd, {"inner": sm.Inner(optax.sgd(1.0), 3)}),
  "empirical_bayes": (sm.empirical_bayes, AT_THE_MODE),
  "anil": (sm.anil, {"inner": STEPS, "head": "head"}),
  "fine_tuning": (sm.fine_tuning, {}),
  "no_adaptation": (sm.no_adaptation, {}),
}


class MLP(nn.Module):
  outputs: int

  @nn.compact
  def __call__(self, x):
    x = jnp.tanh(nn.Dense(4, name="body")(x))
    return nn.Dense(self.outputs, name="head")(x)


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(3, (3, 3), name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))
    return nn.Dense(3, name="head")(x.mean((1, 2)))


def stacked(rng, shape, targets):
  """Tasks whose val part has one example more than the train part."""
  batch = lambda n: sm.Batch(jnp.asarray(rng.normal(size=(T, n, *shape))), targets((T, n)))
  return sm.Task(batch(N), batch(N + 1))


@functools.cache
def problem(name):
  """(likelihood, parameters, tasks); the module that ANIL adapts is called head."""
  rng = np.random.default_rng(0)
  counts = lambda shape: jnp.asarray(rng.poisson(2.0, size=shape))
  classes = lambda shape: jnp.asarray(rng.integers(3, size=shape))
  if name == "linear-gaussian":
    params = {"slope": jnp.asarray(rng.normal(size=2)), "head": jnp.asarray(0.3)}
    tasks = stacked(rng, (2,), lambda shape: jnp.asarray(rng.normal(size=shape)))
    return sm.gaussian(lambda p, x: x @ p["slope"] + p["head"]), params, tasks
  if name == "CNN, batch norm, categorical":
    net, tasks, make = CNN(), stacked(rng, (5, 5, 1), classes), sm.categorical
  elif name == "MLP, categorical":
    net, tasks, make = MLP(3), stacked(rng, (2,), classes), sm.categorical
  else:
    net, tasks, make = MLP(1), stacked(rng, (2,), counts), sm.poisson
  rest = dict(net.init(jax.random.key(0), tasks.train.inputs[0]))
  params = rest.pop("params")
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0.4, 0.4, p.shape)), params)
  # The norm takes the statistics of the batch; the running ones that it returns are dropped.
  predict = lambda theta, x: net.apply({"params": theta} | rest, x, mutable=["batch_stats"])[0]
  if name == "MLP, poisson":
    return make(lambda theta, x: predict(theta, x)[..., 0]), params, tasks
  return make(predict), params, tasks


MODELS = ("linear-gaussian", "MLP, categorical", "CNN, batch norm, categorical", "MLP, poisson")


def checked(model, algorithm, likelihood=None, **changes):
  own, params, tasks = problem(model)
  make, keywords = LEARNERS[algorithm]
  learner = make(likelihood or own, sm.by_layer(params), **(keywords | changes))
  return sm.check_meta_gradient(learner, learner.init(params), tasks)


# One algorithm for each way to a gradient runs on all models in CI: through the steps, implicit,
# l_MAP, the evidence. The whole table takes twenty minutes: python -m pytest -m study.
EVERY_WAY = {"maml", "sigma_imaml", "sigma_reptile", "empirical_bayes"}
LONG = {name: pytest.mark.slow if name in EVERY_WAY else pytest.mark.study for name in LEARNERS}
CASES = [
  pytest.param(model, name, marks=() if model == MODELS[0] else LONG[name])
  for model in MODELS
  for name in LEARNERS
]


@pytest.mark.parametrize(("model", "algorithm"), CASES)
def test_the_verdict_on_every_algorithm_and_model(model, algorithm):
  check = checked(model, algorithm)
  print(f"{model}, {algorithm}: {check.verdict}")
  if algorithm == "fomaml":
    assert check.verdict.startswith("off: phi of module "), check
    assert "leaves out second derivatives" in check.verdict
  elif algorithm == "reptile":
    assert check.verdict.startswith("unsure: no derivative could be compared."), check
    assert "the gradient of no loss" in check.verdict
  else:
    assert check.verdict.startswith("fine: "), check


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"damping": 1.0}, "Implicit.damping=1.0 adds to the curvature."),
    ({"solver": "identity"}, 'solver="identity" leaves the curvature out.'),
    ({"max_steps": 1}, "the linear solves of 2 of 2 tasks are short of Implicit.tol"),
  ],
)
def test_settings_that_leave_a_term_out_are_named(changes, reason):
  implicit = dataclasses.replace(EXACT, **changes)
  verdict = checked("linear-gaussian", "sigma_imaml", implicit=implicit).verdict
  assert verdict.startswith("off: ") and f"Likely reason: {reason}" in verdict


@pytest.mark.slow
def test_gauss_newton_is_named_for_a_network():
  verdict = checked("MLP, poisson", "sigma_imaml", implicit=sm.Implicit(tol=1e-11)).verdict
  assert verdict.startswith("off: ") and "Gauss-Newton leaves out" in verdict


NO_SETTING = "none of the settings explains it: the gradient is wrong, or the loss has a kink here."


def test_a_module_whose_gradient_is_stopped_is_named():
  stop = jax.lax.stop_gradient
  cut = sm.gaussian(lambda p, x: x @ stop(p["slope"]) + p["head"])
  verdict = checked("linear-gaussian", "anil", cut).verdict
  assert verdict.startswith("off: phi of module 'slope' along 'random' by 100 %")
  assert verdict.endswith(NO_SETTING)


def test_an_operation_with_a_wrong_derivative_is_named():
  @jax.custom_vjp
  def dot(x, w):
    return x @ w

  dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (None, 1.1 * g @ kept[0]))
  wrong = sm.gaussian(lambda p, x: dot(x, p["slope"]) + p["head"])
  check = checked("linear-gaussian", "maml", wrong)
  # Forward mode differentiates the operation itself.
  assert all(abs(row.unrolled - row.differences) < 1e-8 for row in check.rows), check
  assert check.verdict.startswith("off: phi of module 'slope' along ")
  assert "by 9.3 %" in check.verdict and check.verdict.endswith(NO_SETTING)


def test_a_dropped_sign_of_the_implicit_term_is_found(monkeypatch):
  right = per_task.implicit_gradient

  def wrong(*args, **keywords):
    grad, w, info = right(*args, **keywords)
    direct = args[3]  # the gradient is g - C s w; here it is g + C s w
    flipped = jax.tree.map(lambda g, total: 2 * g - total, direct, grad.phi)
    return grad._replace(phi=flipped), w, info

  monkeypatch.setattr(per_task, "implicit_gradient", wrong)
  verdict = checked("linear-gaussian", "sigma_imaml").verdict
  assert verdict.startswith("off: phi of module ") and verdict.endswith(NO_SETTING)
