"""The validation losses of sets of task-specific modules, all by one compiled program.

A module outside the set has log sigma^2 = -inf as data: scale 0 in whitened coordinates, so that
theta stays at phi there. The program is the same for every set and compiles once. It costs as much
for small sets as for large ones; the cost of a set is measured in `seconds.py` instead.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.config import Frozen, Spec
from shrinkmeta.devices.batching import leading, map_tasks
from shrinkmeta.gradients.per_task import Item
from shrinkmeta.gradients.total import Shared, in_blocks, key_of, model_of, run_first
from shrinkmeta.mode.optimise import posterior_mode
from shrinkmeta.model.likelihood import mean_nll
from shrinkmeta.model.modules import gather
from shrinkmeta.model.tasks import Task

PyTree = Any
Program = Callable[[jax.Array, Shared, Task], tuple[jax.Array, jax.Array]]


class SetLosses:
  """The losses of T tasks for sets of task-specific modules; each set runs once.

  Attributes:
    candidates: the M modules that can be task-specific.
    losses: {set of modules: [T] mean validation negative log-likelihoods, nats per example}.
    squares: {set of modules: [T, M] sums of (theta_hat - phi)^2 over the parameters of a module}.
  """

  def __init__(self, spec: Spec, candidates: Iterable[str], shared: Shared, tasks: Task):
    """Prepare the program.

    Args:
      spec: the learner's.
      candidates: the M modules that can be task-specific.
      shared: the parameters, the constants, and a key for the mini-batches of the inner loop, the
        same draws for every set; or None.
      tasks: leaves [T, N, ...], with val.
    """
    self.candidates = tuple(candidates)
    self.losses: dict[frozenset[str], np.ndarray] = {}
    self.squares: dict[frozenset[str], np.ndarray] = {}
    self._program = jax.jit(_program(spec, self.candidates))
    self._arguments = (shared, tasks)

  def __call__(self, chosen: Iterable[str]) -> np.ndarray:
    """Return the losses [T] float64 with the modules `chosen` task-specific, NaN for failed tasks.

    Args:
      chosen: some of the candidates.
    """
    chosen = frozenset(chosen)
    if chosen not in self.losses:
      mask = jnp.array([m in chosen for m in self.candidates])
      loss, square = self._program(mask, *self._arguments)
      self.losses[chosen] = np.asarray(loss, np.float64)
      self.squares[chosen] = np.asarray(square, np.float64)
    return self.losses[chosen]

  def sound(self) -> np.ndarray:
    """Return the tasks [T] bool whose loss is finite for every set that has run."""
    return np.all(np.isfinite(np.stack([*self.losses.values()])), 0)


def _program(spec: Spec, candidates: tuple[str, ...]) -> Program:
  """Return (mask [M], shared, tasks) -> (losses [T], squares [T, M])."""
  # A free module (sigma = inf) can be held too, so that its prior is not known before compiling.
  spec = spec._replace(free=frozenset())
  frozen: Frozen = frozenset(spec.sigma) - frozenset(candidates)

  def one(both: tuple[Shared, jax.Array], item: Item) -> tuple[tuple[()], Any]:
    shared, mask = both
    phi = shared.params.phi
    model = model_of(spec, shared, item.task.train, frozen)
    own = key_of(shared.key, item.number)
    mode = posterior_mode(spec.inner, model, key=own, end=item.end, info_at_end=False)
    moves = dict(zip(candidates, mask, strict=True)) | dict.fromkeys(frozen, jnp.array(False))
    # 0 times a z that is not finite is not 0: L-BFGS may give one where nothing moves.
    hold = lambda label, theta, p: jnp.where(moves[label], theta, p)
    theta = jax.tree.map(hold, spec.labels, mode.theta, phi)
    loss = mean_nll(model.likelihood, theta, item.task.val)
    # A loss may be finite where the objective is not, as with a label out of range.
    sound = jnp.isfinite(mode.info.objective) | (mode.info.steps == 0) | ~jnp.any(mask)
    square = jax.tree.map(lambda t, p: jnp.sum(jnp.square(t - p)), theta, phi)
    by_module = gather(square, spec.labels)
    return (), (jnp.where(sound, loss, jnp.nan), jnp.stack([by_module[m] for m in candidates]))

  def program(mask: jax.Array, shared: Shared, tasks: Task) -> tuple[jax.Array, jax.Array]:
    log_s2 = shared.params.log_sigma2
    now = {m: jnp.where(mask[i], log_s2[m], -jnp.inf) for i, m in enumerate(candidates)}
    shared = shared._replace(params=shared.params._replace(log_sigma2=log_s2 | now))
    first = None
    if in_blocks(spec):
      first = lambda both, items: run_first(spec, frozen, None, lambda key: key, both[0], items)
    items = Item(jnp.arange(leading(tasks)), tasks, None, None)
    return map_tasks(one, (shared, mask), items, spec.batching, spec.mesh, first)[1]

  return program
