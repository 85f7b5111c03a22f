"""Linear-Gaussian tasks: which sigma is learned if the inner loop ends before the mode?

A task draws theta ~ N(0, SIGMA² I) for two modules of WIDTH features each. The features of "slow"
are SLOW times as large, so gradient descent needs 1 / SLOW² times as many steps for them. The
examples are y = x'theta + NOISE e. The mode and its validation likelihood have closed forms here:

    theta_hat = (X'X / NOISE² + diag(1 / sigma²))⁻¹ X'y / NOISE²

The sigma that maximises this likelihood on the same tasks is the reference. Every learner starts
from the true SIGMA, and takes the same T steps of gradient descent in z. phi stays at its true
value 0: by symmetry it would be learned right with any number of steps.
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
_RATE, _UPDATES = 0.002, 400  # step size in z; updates of sigma
STEPS = (5, 15, 50, 150, 500, 1_500)

LABELS = {name: name for name in MODULES}


class Learned(NamedTuple):
  """The sigma of one learner, and how well it predicts, in nats per validation example."""

  algorithm: str
  steps: int  # T
  sigma: dict[str, float]
  nats_after_steps: float  # of T steps, which is what the learner minimises
  nats_at_mode: float  # of the exact mode, which the reference minimises


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


def at_mode(log_sigma2: Any, tasks: sm.Task) -> jax.Array:
  """Return the mean of `nats` at the exact mode of each task."""
  precision = jnp.concatenate([jnp.full(WIDTH, jnp.exp(-log_sigma2[name])) for name in MODULES])

  def one(task: sm.Task) -> jax.Array:
    x, y = task.train.inputs, task.train.targets
    theta = jnp.linalg.solve(x.T @ x / NOISE**2 + jnp.diag(precision), x.T @ y / NOISE**2)
    return nats({"fast": theta[:WIDTH], "slow": theta[WIDTH:]}, task.val)

  return jnp.mean(jax.vmap(one)(tasks))


def reference(tasks: sm.Task) -> Learned:
  """Return the sigma that is best at the exact mode."""
  tree = lambda v: dict(zip(MODULES, v, strict=True))
  call = jax.jit(jax.value_and_grad(lambda v: at_mode(tree(v), tasks)))
  found = optimize.minimize(lambda v: [np.asarray(x) for x in call(v)], np.zeros(2), jac=True)
  sigma = {name: float(np.exp(0.5 * v)) for name, v in tree(found.x).items()}
  return Learned("exact mode", 0, sigma, float(found.fun), float(found.fun))


def learn(algorithm: str, steps: int, tasks: sm.Task) -> Learned:
  """Learn sigma with T = `steps` inner steps, by an implicit or an unrolled gradient."""
  implicit = {"implicit": sm.Implicit(tol=1e-12)} if algorithm == "sigma_imaml" else {}
  learner = getattr(sm, algorithm)(
    LIKELIHOOD,
    LABELS,
    inner=sm.Inner(optax.sgd(_RATE), steps),
    phi_optimizer=optax.sgd(0.0),
    sigma_optimizer=optax.adam(optax.linear_schedule(0.1, 0.001, _UPDATES)),
    init_sigma=SIGMA,
    batching="vmap",
    **implicit,
  )

  update = lambda state, _: (learner.update(state, tasks)[0], None)

  @jax.jit
  def run(state: sm.MetaState) -> tuple[sm.MetaState, jax.Array]:
    state, _ = jax.lax.scan(update, state, None, _UPDATES)
    after = lambda task: nats(learner.adapt(state, task.train, steps)[0], task.val)
    return state, jnp.mean(jax.vmap(after)(tasks))

  phi = {name: jnp.zeros(WIDTH) for name in MODULES}
  state, after = run(learner.init(phi))
  sigma = {name: float(jnp.exp(0.5 * state.log_sigma2[name])) for name in MODULES}
  mode = float(at_mode(state.log_sigma2, tasks))
  return Learned(algorithm, steps, sigma, float(after), mode)


def run(steps: tuple[int, ...] = STEPS, count: int = 256) -> list[Learned]:
  """Return the reference, then both learners for each number of steps; float64.

  Args:
    steps: numbers of inner steps.
    count: the number of tasks.
  """
  with jax.enable_x64(True):
    tasks = draw(jax.random.key(0), count)
    learners = [learn(name, t, tasks) for t in steps for name in ("sigma_imaml", "sigma_maml")]
    return [reference(tasks), *learners]


def record(found: Learned) -> dict[str, Any]:
  """Return a line of the table."""
  return {
    "algorithm": found.algorithm,
    "inner_steps": found.steps or "",
    **{f"sigma_{name}": f"{found.sigma[name]:.3g}" for name in MODULES},
    "nll_nats_per_example_after_these_steps": f"{found.nats_after_steps:.4g}",
    "nll_nats_per_example_at_the_mode": f"{found.nats_at_mode:.4g}",
  }
