"""The methods: how each learns from languages, and how it adapts to a new language.

Every kernel of attention and MLP has an adapter, whose A stays at its random draw. A module is the
B of one kernel in one layer. Its sigma has the units of the kernel's update.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.datasets.text import windows
from experiments.datasets.text.declarations import Version
from experiments.languages import model
from experiments.runs import learners, training
from experiments.runs.learners import MakeLearner
from experiments.settings.schema import Config

PyTree = Any
LEARNED = ("sigma_imaml", "fomaml", "reptile")  # those that learn from languages


class Arm(NamedTuple):
  """One method with its parameters, on one trained base."""

  make: MakeLearner  # inner loop -> learner
  params: PyTree  # what may move, at the start
  constants: PyTree  # what never moves, or None


def make_arms(config: Config, base: PyTree, seed: int) -> dict[str, Arm]:
  """Return {method: arm} of all methods except sigma_imaml_chosen, which needs a choice first.

  Args:
    config: the settings.
    base: parameters of the trained network.
    seed: fixes the draws of A.
  """
  predict, meta = model.predict(config), config.meta
  plain = model.likelihood(predict)
  adapted = model.likelihood(sm.lora.attach(predict))
  draw = lambda n: jax.random.fold_in(jax.random.key(seed), n)
  every = sm.lora.split_layers(sm.lora.init(draw(1), base, {"_proj": config.rank}))
  own, held = sm.lora.hold_A(every)
  kernels, constants = sm.lora.labels(own), sm.lora.Base(base, held)
  qv = sm.lora.init(draw(2), base, {"[qv]_proj": config.qv_rank})
  of_head = {name: "head" if name == "head" else "body" for name in base}
  head = {name: jax.tree.map(lambda _, n=name: of_head[n], base[name]) for name in base}
  whole = jax.tree.map(lambda _: "network", base)
  phi_rate = optax.cosine_decay_schedule(meta.phi_rate, meta.steps, 0.1)
  on_kernels = lambda make, **more: Arm(
    learners.by_inner(make, adapted, kernels, **more), own, constants
  )
  fine = lambda likelihood, labels: learners.by_inner(sm.fine_tuning, likelihood, labels)
  return {
    "sigma_imaml": on_kernels(
      sm.sigma_imaml,
      implicit=sm.Implicit(max_steps=meta.cg_steps, tol=1e-2),
      phi_optimizer=optax.adam(phi_rate),
      sigma_optimizer=optax.adam(meta.sigma_rate),
      init_sigma=meta.init_sigma,
    ),
    "fine_tuning": Arm(fine(plain, whole), base, None),
    "qv": Arm(fine(adapted, sm.lora.labels(qv)), qv, base),
    "head": Arm(
      learners.by_inner(sm.hand_picked, plain, head, task_specific=("head",)),
      base,
      None,
    ),
    "reptile": on_kernels(
      sm.reptile, phi_optimizer=optax.sgd(optax.linear_schedule(1.0, 0.1, meta.steps))
    ),
    "fomaml": on_kernels(sm.fomaml, phi_optimizer=optax.adam(phi_rate)),
  }


def with_frozen(config: Config, arm: Arm, chosen: Sequence[str]) -> Arm:
  """Return sigma_imaml that adapts the chosen modules only, with sigma from the state."""
  labels = sm.lora.labels(arm.params)
  sigma = {name: float(name in chosen) for name in jax.tree.leaves(labels)}
  adapted = model.likelihood(sm.lora.attach(model.predict(config)))
  make = learners.by_inner(sm.sigma_imaml, adapted, labels, init_sigma=sigma)
  return arm._replace(make=make)


def learner_in_training(config: Config, name: str, arm: Arm) -> sm.MetaLearner:
  """Return the learner of a method in LEARNED; each inner step sees all windows of a language."""
  rate = config.meta.z_rate if name == "sigma_imaml" else config.meta.theta_rate
  decaying = lambda t: rate / (1.0 + t / 10.0)
  return arm.make(sm.Inner(optax.adam(decaying), steps=config.meta.inner_steps))


def train(
  config: Config,
  name: str,
  arm: Arm,
  versions: Sequence[Version],
  seed: int,
  folder: pathlib.Path,
) -> sm.MetaState:
  """Learn phi and sigma from languages; continue from a checkpoint in `folder`.

  A task is a language. Its train part is some consecutive articles of the first twenty. Its val
  part is windows of the last ten.
  """
  learner, own = learner_in_training(config, name, arm), config.meta

  def tasks(first: int, count: int) -> sm.Task:
    drawn = [_episode(config, versions, (seed, 4, i)) for i in range(first, first + count)]
    train, val = (windows.padded(part, own.windows) for part in zip(*drawn, strict=True))
    return jax.tree.map(jnp.asarray, sm.Task(train, val))

  return training.fit_to_the_end(
    learner,
    learner.init(arm.params, constants=arm.constants),
    tasks,
    own.steps,
    meta_batch=own.languages,
    callbacks=(sm.json_lines(folder / "log.jsonl"),),
    checkpoints=sm.Checkpoints(folder / "states", every=5, keep=2),
  )


def _episode(
  config: Config, versions: Sequence[Version], seed: tuple[int, ...]
) -> tuple[sm.Batch, sm.Batch]:
  """Return the train windows and the val windows of one random version."""
  rng, own = np.random.default_rng(seed), config.meta
  version = versions[int(rng.integers(len(versions)))]
  start = int(rng.integers(20 - own.articles + 1))
  train = version.articles[start : start + own.articles]
  last = windows.windows(version.articles[-10:], config.context)
  at = rng.integers(max(1, len(last.inputs) - own.windows + 1))
  val = sm.Batch(last.inputs[at : at + own.windows], last.targets[at : at + own.windows])
  return windows.windows(train, config.context, own.windows), val


class Judged(NamedTuple):
  """The evaluated windows of T tasks in blocks of one task; a block of padding has task T."""

  task: jax.Array  # [B] int32
  inputs: jax.Array  # [B, N, S] uint8
  targets: jax.Array  # [B, N, S] int32


def blocks(batches: Sequence[sm.Batch], count: int, size: int = 8) -> Judged:
  """Cut the windows of every task into blocks of `size`, so that short texts cost less.

  Args:
    batches: the windows of T tasks.
    count: B, the number of blocks after padding.
    size: N, the number of windows in a block.
  """
  task, parts = [], []
  for t, batch in enumerate(batches):
    for start in range(0, len(batch.inputs), size):
      task.append(t)
      parts.append(sm.Batch(*(x[start : start + size] for x in (batch.inputs, batch.targets))))
  missing = count - len(parts)
  task += [len(batches)] * missing
  parts += [sm.Batch(*(x[:0] for x in (batches[0].inputs, batches[0].targets)))] * missing
  whole = windows.padded(parts, size)
  return Judged(*map(jnp.asarray, (np.array(task, np.int32), whole.inputs, whole.targets)))


def adapting(config: Config, make: MakeLearner, rate: jax.typing.ArrayLike) -> sm.MetaLearner:
  """Return a learner for long adaptation: inner step t has learning rate rate / (1 + t / decay)."""
  schedule = lambda t: rate / (1.0 + t / config.adapt.decay)
  return make(sm.Inner(optax.adam(schedule), batch_size=config.adapt.windows))


def adapt_and_judge(config: Config, make: MakeLearner) -> Callable[..., tuple[PyTree, jax.Array]]:
  """Return a function (state, texts [T, N, S], judged, rate, steps, key) -> (thetas, nats [T]).

  Each inner step draws `adapt.windows` windows of a text. Rate and steps are arguments, so that one
  compiled program serves all values. nats are sums over the evaluated windows.
  """

  def program(
    state: sm.MetaState,
    texts: sm.Batch,
    judged: Judged,
    rate: jax.Array,
    steps: jax.Array,
    key: jax.Array,
  ) -> tuple[PyTree, jax.Array]:
    learner = adapting(config, make, rate)
    thetas, _ = learner.adapt_tasks(state, texts, steps, key)
    likelihood = sm.with_constants(learner.spec.likelihood, state.constants)

    def one(block: Judged) -> jax.Array:
      theta = sm.merge(jax.tree.map(lambda x: x[block.task], thetas), state.phi)
      return -jnp.sum(likelihood.log_prob(likelihood.predict(theta, block.inputs), block.targets))

    nats = jax.lax.map(one, judged)
    return thetas, jax.ops.segment_sum(nats, judged.task, texts.inputs.shape[0])

  return jax.jit(program)
