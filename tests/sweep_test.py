"""Every public function that computes, on one linear-Gaussian model, for each kind of use.

The kinds are fractional weights, a module frozen at phi, parameters with a None leaf, a likelihood
that closes over a traced number, and second derivatives. The references are closed forms in NumPy.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(3)
N = 5
X, Y = RNG.normal(size=(N, 2)), RNG.normal(size=N)
WEIGHTS = np.array([0.3, 1.0, 2.5, 0.7, 1.4])
PHI = np.array([0.4, -0.7, 0.2])  # the slopes, then the level
MOVED = PHI + np.array([0.3, 0.1, -0.2])  # theta, where a function takes one
LOG_S2 = {"slope": np.log(0.6), "level": np.log(0.9)}
READ = np.array([1.0, -2.0, 0.5])  # theta_hat as one number
INNER = sm.Inner(optax.sgd(0.4, momentum=0.5), 2000, tol=1e-13)
IMPLICIT = sm.Implicit(tol=1e-13)


class Case(NamedTuple):
  """A problem: outputs are gain * (slope x + level), with noise of standard deviation 1."""

  phi: jax.Array  # [3]
  log_sigma2: dict
  weights: jax.Array  # [N]
  gain: jax.Array  # []
  held: bool = False  # whether the level is held
  none: bool = False  # whether the parameters have a None leaf

  def tree(self, vector):
    own = {"level": vector[2], "slope": vector[:2]}
    return own | {"unused": None} if self.none else own

  @property
  def labels(self):
    return sm.by_leaf(self.tree(jnp.zeros(3)))

  @property
  def batch(self):
    return sm.Batch(jnp.asarray(X), jnp.asarray(Y), self.weights)

  @property
  def batches(self):
    return jax.tree.map(lambda x: x[None], self.batch)

  @property
  def likelihood(self):
    return sm.gaussian(lambda p, x: self.gain * (x @ p["slope"] + p["level"]))

  @property
  def theta(self):
    return self.phi + (MOVED - PHI) * np.array([1.0, 1.0, 0.0 if self.held else 1.0])

  @property
  def frozen(self):
    return ("level",) if self.held else ()

  def learner(self, make):
    sigma = {"slope": 1.0, "level": 0.0 if self.held else 1.0}
    learner = make(self.likelihood, self.labels, inner=INNER, implicit=IMPLICIT, init_sigma=sigma)
    state = learner.init(self.tree(jnp.zeros(3)))
    return learner, state._replace(phi=self.tree(self.phi), log_sigma2=self.log_sigma2)


def read(theta):
  """theta as one number."""
  return READ[:2] @ theta["slope"] + READ[2] * theta["level"]


def mode(case):
  arguments = (case.likelihood, case.labels, case.tree(case.phi), case.log_sigma2, case.batch)
  return sm.map_estimate(*arguments, INNER, IMPLICIT, frozen=case.frozen)[0]


def evidence(case):
  arguments = (case.likelihood, case.labels, case.tree(case.phi), case.log_sigma2, case.batch)
  return sm.log_evidence(*arguments, INNER, IMPLICIT, frozen=case.frozen)[0]


def predictive(case):
  tree = case.tree(case.phi)
  at = (tree, case.log_sigma2, case.tree(case.theta), case.batch)
  return jnp.sum(sm.posterior(case.likelihood, case.labels, *at).predictive(case.batch[0]).variance)


def adapt(case):
  learner, state = case.learner(sm.sigma_imaml)
  return read(learner.adapt(state, case.batch)[0])


def adapt_tasks(case):
  learner, state = case.learner(sm.sigma_imaml)
  thetas = learner.adapt_tasks(state, case.batches)[0]
  return read(sm.merge(jax.tree.map(lambda x: x[0], thetas), state.phi))


def metrics(case, make):
  learner, state = case.learner(make)
  return learner.meta_gradient(state, sm.Task(case.batches, case.batches))[1]


def restricted(case):
  arguments = (case.likelihood, case.labels, case.tree(case.phi), case.log_sigma2, case.batches)
  return sm.restriction(*arguments, ("slope",), case.frozen)


def thetas(case):
  return jax.tree.map(lambda x: x[None], case.tree(case.theta))


LIBRARY = {
  "log_prior": lambda c: sm.log_prior(c.tree(c.theta), c.tree(c.phi), c.log_sigma2, c.labels),
  "log_likelihood": lambda c: sm.log_likelihood(c.likelihood, c.tree(c.theta), c.batch),
  "log_predictive": lambda c: sm.log_predictive(c.likelihood, thetas(c), c.batches),
  "log_joint": lambda c: sm.log_joint(
    c.likelihood, c.labels, c.tree(c.phi), thetas(c), c.log_sigma2, c.batches
  ),
  "posterior": predictive,
  "restriction": restricted,
  "map_estimate": lambda c: read(mode(c)),
  "log_evidence": evidence,
  "adapt": adapt,
  "adapt_tasks": adapt_tasks,
  "sigma_imaml": lambda c: metrics(c, sm.sigma_imaml).loss,
  "empirical_bayes": lambda c: metrics(c, sm.empirical_bayes).phi_loss,
}
# What goes through the mode has first derivatives only; metrics are values.
REFUSED, VALUES = ("map_estimate", "log_evidence", "adapt", "adapt_tasks"), tuple(LIBRARY)[-2:]
SMOOTH = tuple(name for name in LIBRARY if name not in (*REFUSED, *VALUES))


def exact(case):
  """All values in closed form, in NumPy."""
  phi, theta, m = (np.asarray(v, float) for v in (case.phi, case.theta, case.weights))
  gain = float(case.gain)
  s2 = np.exp([float(case.log_sigma2[k]) for k in ("slope", "slope", "level")])
  s2[2] *= not case.held
  a, half_log = gain * np.column_stack([X, np.ones(N)]), 0.5 * np.log(2 * np.pi)
  moves = s2 > 0
  root = np.diag(np.sqrt(s2))
  k = np.eye(3) + root @ a.T @ (m[:, None] * a) @ root
  posterior = root @ np.linalg.solve(k, root)
  hat = phi + posterior @ a.T @ (m * (Y - a @ phi))
  of = lambda theta: np.sum(m * (-0.5 * (Y - a @ theta) ** 2 - half_log))
  prior = np.sum(-0.5 * (theta - phi)[moves] ** 2 / s2[moves] - 0.5 * np.log(s2[moves]) - half_log)
  # An example of weight m is an example with noise variance 1 / m, up to the normaliser.
  total = np.diag(1 / m) + a @ np.diag(s2) @ a.T
  r = Y - a @ phi
  log_normal = -0.5 * (r @ np.linalg.solve(total, r) + np.linalg.slogdet(total)[1]) - N * half_log
  marginal = log_normal + np.sum((1 - m) * half_log - 0.5 * np.log(m))
  x = a[:, :2]
  information = x.T @ np.linalg.solve(total, x)
  return {
    "log_prior": prior,
    "log_likelihood": of(theta),
    "log_predictive": of(theta),
    "log_joint": prior + of(theta),
    "posterior": np.sum((a @ posterior) * a),
    "restriction": 2 * half_log - 0.5 * np.linalg.slogdet(information)[1],
    "map_estimate": READ @ hat,
    "log_evidence": marginal,
    "adapt": READ @ hat,
    "adapt_tasks": READ @ hat,
    "sigma_imaml": -of(hat) / np.sum(m),
    "empirical_bayes": -marginal,
  }


def case(weights=WEIGHTS, gain=1.3, **kind):
  sigma = dict(LOG_S2) | ({"level": -np.inf} if kind.get("held") else {})
  return Case(jnp.asarray(PHI), sigma, jnp.asarray(weights), jnp.asarray(gain), **kind)


@functools.cache
def compiled(held=False, none=False):
  """All functions as one program: weights and gain are arguments, so the likelihood closes over a
  traced number."""
  return jax.jit(
    lambda weights, gain: {
      name: f(case(weights, gain, held=held, none=none)) for name, f in LIBRARY.items()
    }
  )


KINDS = {
  "plain": {"weights": np.ones(N)},
  "fractional weights": {},
  "a closed-over number": {"gain": 0.6},
  "a held module": {"held": True},
  "a None leaf": {"none": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind):
  one = case(**KINDS[kind])
  got, want = compiled(one.held, one.none)(one.weights, one.gain), exact(one)
  wrong = {
    name: (float(got[name]), want[name])
    for name in LIBRARY
    if not np.isclose(got[name], want[name], rtol=1e-9, atol=1e-11)
  }
  assert not wrong, wrong


def line(t, **kind):
  """A case on a line in phi, log sigma^2 and the gain."""
  one = case(**kind)
  sigma = {name: value + (0.3 if name == "slope" else -0.2) * t for name, value in LOG_S2.items()}
  return one._replace(
    phi=one.phi + t * jnp.array([0.2, -0.5, 0.3]), log_sigma2=sigma, gain=one.gain + 0.4 * t
  )


def along(names):
  return lambda t: jnp.stack([LIBRARY[name](line(t)) for name in names])


def differences(names, h, order):
  values = [np.array([exact(line(i * h))[name] for name in names]) for i in (-2, -1, 0, 1, 2)]
  weights = {1: np.array([1, -8, 0, 8, -1]) / (12 * h), 2: np.array([-1, 16, -30, 16, -1]) / 12}
  return np.tensordot(weights[order] / (h**2 if order == 2 else 1), np.array(values), 1)


def test_first_derivatives_also_in_a_closed_over_number():
  names = (*SMOOTH, *REFUSED)
  got = jax.jit(jax.jacrev(along(names)))(0.0)
  np.testing.assert_allclose(got, differences(names, 1e-3, 1), rtol=1e-8, atol=1e-9)


def test_second_derivatives_are_right_where_they_exist():
  got = jax.jit(jax.hessian(along(SMOOTH)))(0.0)
  np.testing.assert_allclose(got, differences(SMOOTH, 1e-2, 2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("twice", [jax.hessian, lambda f: jax.grad(jax.grad(f))])
def test_second_derivatives_through_the_mode_are_refused(name, twice):
  with pytest.raises(NotImplementedError, match="differentiated once"):
    jax.eval_shape(twice(lambda t: LIBRARY[name](line(t))), jnp.asarray(0.0))


def test_what_is_reported_and_served_of_a_held_module_and_a_none_leaf():
  one = case(held=True, none=True)
  learner, state = one.learner(sm.sigma_imaml)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), one.batch)
  thetas, _ = jax.jit(learner.adapt_tasks)(state, two)
  slope = np.asarray(thetas["slope"][0])
  assert thetas["level"] is None and thetas["unused"] is None
  np.testing.assert_allclose(READ[:2] @ slope + READ[2] * PHI[2], exact(one)["adapt"], rtol=1e-9)
  summary = {
    s.name: s for s in sm.module_summary(learner.labels, state.phi, state.log_sigma2, thetas)
  }
  np.testing.assert_allclose(summary["slope"].moved, np.sqrt(np.mean((slope - PHI[:2]) ** 2)))
  assert summary["level"].moved == summary["level"].sigma == 0
  stored = sm.deltas(learner, state, thetas, ["ann", "bob"])
  rows = sm.predict_tasks(one.likelihood, state, stored, jnp.array([1, 0, 1, 0, 1]), jnp.asarray(X))
  np.testing.assert_allclose(rows, 1.3 * (X @ slope + PHI[2]), rtol=1e-9)


def test_fractional_weights_in_what_is_reported():
  log_p = np.log(np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))
  targets, m = np.array([0, 0, 1, 1, 1]), WEIGHTS
  right, share = log_p.argmax(1) == targets, m / m.sum()
  found = sm.calibration(jnp.asarray(log_p), jnp.asarray(targets), jnp.asarray(m))
  np.testing.assert_allclose(found.accuracy, share @ right)
  np.testing.assert_allclose(found.nll, -share @ log_p[np.arange(N), targets])
  inside = np.abs(Y) <= 1.959963984540054
  within = sm.coverage(jnp.zeros(N), jnp.ones(N), jnp.asarray(Y), mask=jnp.asarray(m))
  np.testing.assert_allclose(within, share @ inside)


def test_the_sweep_leaves_no_function_out():
  """Functions of numbers are above. The others hold no closed form of this model."""
  settings = {
    "Algorithm",
    "Implicit",
    "Inner",
    "LogDet",
    "Checkpoints",
    "priors",
    "FAMILY",
    "lbfgs",
  }
  types = {
    *("Batch", "Task", "Likelihood", "Labels", "ModuleSummary", "MetaLearner", "MetaParams"),
    *("MetaState", "Metrics", "WarmStart", "EvidenceInfo", "InnerInfo", "SolveInfo", "Callback"),
    *("Calibration", "Posterior", "Predictive", "Difference", "Evaluation", "Interval"),
    *("ProgramCost", "Choice", "Deltas", "GradientCheck"),
  }
  likelihoods = {
    *("bernoulli", "categorical", "gaussian_with_scale", "in_precision", "mean_and_scale"),
    *("poisson", "with_constants", "with_randomness"),
  }
  other_algorithms = {*sm.FAMILY, "make_learner"} - set(LIBRARY)
  no_arithmetic = {
    *("num_tasks", "source", "stack_batches", "stack_tasks", "by_layer", "by_path", "task_axes"),
    *("format_summary", "restore", "json_lines", "progress_bar", "read_json_lines", "recorder"),
    *("tensorboard", "check_alike", "check_shared", "over_tasks", "place_state", "place_tasks"),
    *(
      "share_of_tasks",
      "task_mesh",
      "program_cost",
      "export",
      "load_deltas",
      "save_deltas",
      "save_state",
      "plots",
    ),
  }
  built_on_these = {
    *("fit", "evaluate", "paired", "choose_modules", "lora", "rounding_loss"),
    *("check_meta_gradient", "lbfgs", "clip_tasks"),
  }
  here = {*LIBRARY, "gaussian", "by_leaf", "merge", "module_summary", "deltas", "predict_tasks"}
  here |= {"calibration", "coverage"}
  named = settings | types | likelihoods | other_algorithms | no_arithmetic | built_on_these | here
  assert set(sm.__all__) == named - {"adapt", "adapt_tasks"}
