"""The posterior mode: `minimise` on the modules that move, the others held at phi."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.mode.frozen import Frozen, held, merge, moving, restrict
from shrinkmeta.mode.hoist import hoist
from shrinkmeta.mode.optimise import Descent, Inner, InnerInfo, Loop, loop, minimise
from shrinkmeta.mode.slots import drain
from shrinkmeta.mode.whitening import Whitening, to_theta, whitening
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch

PyTree = Any


class Mode(NamedTuple):
  """theta_hat of one task and how it was found."""

  theta: PyTree  # all of it
  z: PyTree  # of the modules that move; None for the others
  info: InnerInfo


class Moving(NamedTuple):
  """The smaller model that is left when the frozen modules are held."""

  phi: PyTree
  labels: modules.Labels
  white: Whitening
  likelihood: Likelihood


def moving_model(
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  frozen: Frozen,
  prior: bool = True,
) -> Moving:
  """phi, labels, coordinates and likelihood of the modules that move."""
  part, names = moving(phi, labels, frozen), moving(labels, labels, frozen)
  white = whitening(log_sigma2, names, jnp.result_type(jax.tree.leaves(part)[0]), prior)
  if frozen:
    likelihood = restrict(likelihood, held(phi, labels, frozen))
  return Moving(part, names, white, likelihood)


def posterior_mode(
  inner: Inner,
  likelihood: Likelihood,
  labels: modules.Labels,
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  batch: Batch,
  frozen: Frozen,
  steps: int | jax.Array | tuple[int, ...] | None = None,
  prior: bool = True,
  **keywords: Any,
) -> Mode:
  """theta_hat of one task; what the frozen modules make of a fixed batch is computed once.

  Args:
    frozen: modules held at phi.
    prior: see `whitening`. The other arguments are those of `minimise`.
  """
  model, data = moving_model(likelihood, labels, phi, log_sigma2, frozen, prior), batch
  if frozen and inner.batch_size is None:
    predict, features = hoist(model.likelihood.predict, model.phi, batch.inputs)
    model = model._replace(likelihood=likelihood._replace(predict=predict))
    data = batch._replace(inputs=features)
  z, info = minimise(inner, model.likelihood, model.phi, model.white, data, steps=steps, **keywords)
  theta, rest = to_theta(model.phi, model.white.scale, z), held(phi, labels, frozen)
  if isinstance(steps, tuple):  # every leaf leads with [S]
    rest = jax.tree.map(lambda p: jnp.broadcast_to(p, (len(steps), *p.shape)), rest)
  return Mode(merge(theta, rest), z, info)


def run_loops(
  inner: Inner,
  model: Moving,
  batches: Batch,
  keys: jax.Array | None,
  starts: PyTree | None,
  steps: int | jax.Array | None,
  slots: int,
) -> Descent:
  """The loops of T tasks, `slots` at a time; a task that meets inner.tol makes room for the next.

  What frozen modules make of a batch is computed in every step here, unlike in `posterior_mode`: a
  slot would have to keep it beside the batch.

  Args:
    batches, keys, starts: lead with [T].

  Returns:
    where each loop ended, without its optimiser's state; leaves lead with [T]. For the argument
    `end` of `minimise`.
  """
  until = inner.steps if steps is None else steps

  def loop_of(task: tuple[Any, ...]) -> Loop:
    batch, key, _ = task
    return loop(inner, model.likelihood, model.phi, model.white, batch, key)

  def begin(task: tuple[Any, ...]) -> Descent:
    return loop_of(task).begin(optax.tree.zeros_like(model.phi) if task[2] is None else task[2])

  return drain(
    begin,
    unfinished=lambda at: (at.step < until) & ~at.done,
    step=lambda task, at: loop_of(task).step(at),
    keep=lambda at: at._replace(opt_state=()),
    tasks=(batches, keys, starts),
    slots=slots,
  )[0]
