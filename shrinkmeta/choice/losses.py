"""Compute the validation losses of sets of task-specific modules with one compiled program.

The program takes log sigma^2 as an argument. A module outside the set gets log sigma^2 = -inf, so
its scale in whitened coordinates is 0 and its theta stays at phi. The program is the same for every
set and compiles once. So it takes as long for small sets as for large ones. `seconds.py` measures
the time of each set with a program of its own.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.base import MetaLearner
from shrinkmeta.config import Frozen
from shrinkmeta.devices.batching import leading, map_tasks
from shrinkmeta.gradients.per_task import Item
from shrinkmeta.gradients.total import Shared, in_blocks, key_of, model_of, run_first
from shrinkmeta.learner.kept import kept
from shrinkmeta.mode.optimise import posterior_mode
from shrinkmeta.model.likelihood import mean_nll
from shrinkmeta.model.modules import gather
from shrinkmeta.model.tasks import Task

PyTree = Any
Program = Callable[[jax.Array, Shared, Task, tuple[str, ...]], tuple[jax.Array, jax.Array]]


class SetLosses:
  """The losses of T tasks for sets of task-specific modules, each computed only once.

  Attributes:
    candidates: the M modules that can be task-specific.
    losses: {set of modules: [T] mean validation negative log-likelihoods, nats per example}.
    squares: {set of modules: [T, M] sums of (theta_hat - phi)^2 over the parameters of a module}.
  """

  def __init__(self, learner: MetaLearner, candidates: Iterable[str], shared: Shared, tasks: Task):
    """Prepare the program, which compiles at the first call with a learner and shapes of tasks.

    Args:
      learner: the learner.
      candidates: the M modules that can be task-specific.
      shared: the parameters, the constants, and a random key for the mini-batches of the inner
        loop, or None. Every set gets the same draws.
      tasks: T tasks, leaves [T, N, ...], with validation data.
    """
    self.candidates = tuple(candidates)
    self.losses: dict[frozenset[str], np.ndarray] = {}
    self.squares: dict[frozenset[str], np.ndarray] = {}
    self._program = jax.jit(kept(learner, _program), static_argnums=3)
    self._arguments = (shared, tasks)

  def __call__(self, chosen: Iterable[str]) -> np.ndarray:
    """Return the losses of the set `chosen`, [T] float64 in nats per example.

    The loss of a failed task is NaN.

    Args:
      chosen: the task-specific modules, some of the candidates.
    """
    chosen = frozenset(chosen)
    if chosen not in self.losses:
      mask = jnp.array([m in chosen for m in self.candidates])
      loss, square = self._program(mask, *self._arguments, self.candidates)
      self.losses[chosen] = np.asarray(loss, np.float64)
      self.squares[chosen] = np.asarray(square, np.float64)
    return self.losses[chosen]

  def sound(self) -> np.ndarray:
    """Return for each task, [T] bool, whether its loss is finite for every set that has run."""
    return np.all(np.isfinite(np.stack([*self.losses.values()])), 0)


def _program(learner: MetaLearner) -> Program:
  """Build (mask [M], shared, tasks, candidates [M]) -> (losses [T], squares [T, M])."""
  # A free module (sigma = inf) is frozen in some sets. So the program must read at run time, from
  # log sigma^2, whether the module has a prior.
  spec = learner.spec._replace(free=frozenset())

  def one(
    candidates: tuple[str, ...], frozen: Frozen, both: tuple[Shared, jax.Array], item: Item
  ) -> tuple[tuple[()], Any]:
    shared, mask = both
    phi = shared.params.phi
    model = model_of(spec, shared, item.task.train, frozen)
    own = key_of(shared.key, item.number)
    mode = posterior_mode(spec.inner, model, key=own, end=item.end, info_at_end=False)
    moves = dict(zip(candidates, mask, strict=True)) | dict.fromkeys(frozen, jnp.array(False))
    # Scale 0 is not enough: 0 * z is NaN if z is not finite, which L-BFGS may return in frozen
    # modules.
    hold = lambda label, theta, p: jnp.where(moves[label], theta, p)
    theta = jax.tree.map(hold, spec.labels, mode.theta, phi)
    loss = mean_nll(model.likelihood, theta, item.task.val)
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # float16 overflows
    # The validation loss can be finite although the training objective is not, for example with a
    # training label out of range. Such a task failed. Without Inner.tol a loop of 0 steps measures
    # no objective.
    absent = mode.info.steps == 0 if spec.inner.tol is None else False
    sound = jnp.isfinite(mode.info.objective) | absent | ~jnp.any(mask)
    square = jax.tree.map(lambda t, p: jnp.sum(jnp.square(wide(t) - wide(p))), theta, phi)
    by_module = gather(square, spec.labels)
    return (), (jnp.where(sound, loss, jnp.nan), jnp.stack([by_module[m] for m in candidates]))

  def program(
    mask: jax.Array, shared: Shared, tasks: Task, candidates: tuple[str, ...]
  ) -> tuple[jax.Array, jax.Array]:
    frozen: Frozen = frozenset(spec.sigma) - frozenset(candidates)
    log_s2 = shared.params.log_sigma2
    now = {m: jnp.where(mask[i], log_s2[m], -jnp.inf) for i, m in enumerate(candidates)}
    shared = shared._replace(params=shared.params._replace(log_sigma2=log_s2 | now))
    first = None
    if in_blocks(spec):
      first = lambda both, items: run_first(spec, frozen, None, lambda key: key, both[0], items)
    items = Item(jnp.arange(leading(tasks)), tasks, None, None)
    run = functools.partial(one, candidates, frozen)
    return map_tasks(run, (shared, mask), items, spec.batching, spec.mesh, first)[1]

  return program
