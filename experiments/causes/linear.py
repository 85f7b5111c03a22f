"""Linear-Gaussian tasks: which sigma is learned if the inner loop ends before the mode?

A task draws theta ~ N(0, SIGMA² I) for two modules of WIDTH features each. The features of "slow"
are SLOW times as large, so for equal sigma gradient descent needs about 1 / SLOW² times as many
steps for them. The examples are y = x'theta + NOISE e. The mode of a task has a closed form, and so
has the point at which T steps of gradient descent end: see `exact`. So the best sigma of the mode,
and that of T steps, are known for the same tasks.

Every learner starts from the true SIGMA, and takes T steps of gradient descent in z. phi stays at
its true value 0. By symmetry the expected gradient of phi is 0 there for any number of steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

import shrinkmeta as sm

WIDTH, TRAIN, VAL = 4, 6, 20
SIGMA, NOISE, SLOW = 1.0, 0.5, 0.3
MODULES = ("fast", "slow")
_SCALE = {"fast": 1.0, "slow": SLOW}
RATE = 0.002  # of gradient descent in z
_UPDATES = 400  # of sigma
STEPS = (5, 15, 50, 150, 500, 1_500)

LABELS = {name: name for name in MODULES}


class Learned(NamedTuple):
  """The sigma of one learner, and how well it predicts, in nats per validation example."""

  algorithm: str
  steps: int | None  # T; None: the mode
  sigma: dict[str, float]
  nats_after_steps: float  # of T steps, which the learner tries to minimise
  nats_at_mode: float


def predict(theta: Any, x: jax.Array) -> jax.Array:
  """Return x'theta [N] for x [N, 2 WIDTH]."""
  return x @ jnp.concatenate([theta[name] for name in MODULES])


LIKELIHOOD = sm.gaussian(predict, NOISE)


def draw(key: jax.Array, count: int) -> sm.Task:
  """Return `count` tasks."""

  def one(key: jax.Array) -> sm.Task:
    of_x, of_theta, of_noise = jax.random.split(key, 3)
    scale = jnp.concatenate([jnp.full(WIDTH, _SCALE[name]) for name in MODULES])
    x = scale * jax.random.normal(of_x, (TRAIN + VAL, 2 * WIDTH))
    y = x @ (SIGMA * jax.random.normal(of_theta, (2 * WIDTH,)))
    y = y + NOISE * jax.random.normal(of_noise, (TRAIN + VAL,))
    return sm.Task(sm.Batch(x[:TRAIN], y[:TRAIN]), sm.Batch(x[TRAIN:], y[TRAIN:]))

  return jax.vmap(one)(jax.random.split(key, count))


def nats(theta: Any, batch: sm.Batch) -> jax.Array:
  """Return the mean negative log-likelihood."""
  return -jnp.mean(LIKELIHOOD.log_prob(predict(theta, batch.inputs), batch.targets))


def exact(log_sigma2: Any, tasks: sm.Task, steps: int | None = None) -> jax.Array:
  """Return the mean of `nats` after T = `steps` steps, by their formula; None: at the mode.

  K = I + s X'X s / NOISE² and b = s X'y / NOISE² give the mode z = K⁻¹ b, where s has the sigma of
  every parameter. Gradient descent is on J / TRAIN, so T steps of the size RATE end at
  z_T = (I - (I - RATE K / TRAIN)^T) z.
  """
  s = jnp.concatenate([jnp.full(WIDTH, jnp.exp(0.5 * log_sigma2[name])) for name in MODULES])

  def one(task: sm.Task) -> jax.Array:
    x, y = task.train.inputs * s, task.train.targets
    k = jnp.eye(2 * WIDTH) + x.T @ x / NOISE**2
    z = jnp.linalg.solve(k, x.T @ y / NOISE**2)
    if steps is not None:
      left = jnp.eye(2 * WIDTH) - RATE * k / TRAIN
      z = z - jnp.linalg.matrix_power(left, steps) @ z
    theta = s * z
    return nats({"fast": theta[:WIDTH], "slow": theta[WIDTH:]}, task.val)

  return jnp.mean(jax.vmap(one)(tasks))


def best(tasks: sm.Task, steps: int | None = None, start: float = SIGMA) -> dict[str, float]:
  """Return the sigma that minimises `exact`, by descent from `start`."""
  tree = lambda v: dict(zip(MODULES, v, strict=True))
  call = jax.jit(jax.value_and_grad(lambda v: exact(tree(v), tasks, steps)))
  at = np.full(len(MODULES), 2 * np.log(start))
  found = optimize.minimize(lambda v: [np.asarray(x) for x in call(v)], at, jac=True)
  return {name: float(np.exp(0.5 * v)) for name, v in tree(found.x).items()}


def judged(algorithm: str, steps: int | None, sigma: dict[str, float], tasks: sm.Task) -> Learned:
  """Measure a sigma after T steps and at the mode, in nats per validation example."""
  log_sigma2 = {name: jnp.asarray(2 * np.log(value)) for name, value in sigma.items()}
  both = (float(exact(log_sigma2, tasks, t)) for t in (steps, None))
  return Learned(algorithm, steps, sigma, *both)


def learn(algorithm: str, steps: int, tasks: sm.Task) -> Learned:
  """Learn sigma with T = `steps` inner steps, by an implicit or an unrolled gradient."""
  implicit = {"implicit": sm.Implicit(tol=1e-12)} if algorithm == "sigma_imaml" else {}
  learner = getattr(sm, algorithm)(
    LIKELIHOOD,
    LABELS,
    inner=sm.Inner(optax.sgd(RATE), steps),
    phi_optimizer=optax.sgd(0.0),
    sigma_optimizer=optax.adam(optax.linear_schedule(0.1, 0.001, _UPDATES)),
    init_sigma=SIGMA,
    batching="vmap",
    **implicit,
  )

  update = lambda state, _: (learner.update(state, tasks)[0], None)

  phi = {name: jnp.zeros(WIDTH) for name in MODULES}
  run = jax.jit(lambda state: jax.lax.scan(update, state, None, _UPDATES)[0])
  state = run(learner.init(phi))
  sigma = {name: float(jnp.exp(0.5 * state.log_sigma2[name])) for name in MODULES}
  return judged(algorithm, steps, sigma, tasks)


def run(steps: tuple[int, ...] = STEPS, count: int = 256) -> list[Learned]:
  """Return the best sigma of the mode, then both learners for each number of steps; float64.

  Args:
    steps: numbers of inner steps.
    count: the number of tasks.
  """
  with jax.enable_x64(True):
    tasks = draw(jax.random.key(0), count)
    learners = [learn(name, t, tasks) for t in steps for name in ("sigma_imaml", "sigma_maml")]
    return [judged("exact mode", None, best(tasks), tasks), *learners]


def record(found: Learned) -> dict[str, Any]:
  """Return a line of the table."""
  return {
    "algorithm": found.algorithm,
    "inner_steps": found.steps or "",
    **{f"sigma_{name}": f"{found.sigma[name]:.3g}" for name in MODULES},
    "nll_nats_per_example_after_these_steps": f"{found.nats_after_steps:.4g}",
    "nll_nats_per_example_at_the_mode": f"{found.nats_at_mode:.4g}",
  }
