"""The methods: how sigma is learned from speakers, and how each method adapts to a new speaker.

A module is a layer of the network: the embedding, one gated layer, or one of the two dense layers
of the head. All methods begin at the same phi, the base. So their differences come from what may
move, and how far.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.datasets.speech.voices import Voices
from experiments.runs import learners, training
from experiments.runs.learners import MakeLearner
from experiments.settings.schema import Config
from experiments.speech import model

PyTree = Any
BLOCK = 10  # pieces evaluated at once; ten recordings have a multiple of it


class Arm(NamedTuple):
  """One method, ready to adapt."""

  make: MakeLearner  # inner loop -> learner
  state: sm.MetaState


def layers(params: PyTree) -> sm.Labels:
  """Return the module of every parameter: its layer."""
  return {name: jax.tree.map(lambda _, n=name: n, part) for name, part in params.items()}


def sigma_imaml(config: Config, params: PyTree) -> MakeLearner:
  """Return sigma-iMAML that learns sigma of every layer and leaves phi where it is.

  With phi at rest, sigma-Reptile has the same gradient of sigma.
  """
  own = config.meta
  return learners.by_inner(
    sm.sigma_imaml,
    model.likelihood(config),
    layers(params),
    implicit=sm.Implicit(max_steps=own.cg_steps, tol=own.cg_tol),
    phi_optimizer=optax.set_to_zero(),
    sigma_optimizer=optax.adam(own.sigma_rate),
    init_sigma=own.init_sigma,
    batching="sequential",
  )


def baselines(config: Config, params: PyTree) -> dict[str, MakeLearner]:
  """Return the methods without a prior: all parameters, the head, or the biases of all gates."""
  plain = model.likelihood(config)
  whole = jax.tree.map(lambda _: "network", params)
  biases = jax.tree.map(lambda _: "rest", params)
  for name in (name for name in params if name.startswith("layer_")):
    biases[name]["gate"]["bias"] = "biases"
  two = lambda name: "head" if name.startswith("head_") else "body"
  head = jax.tree.map(two, layers(params))
  made = lambda make, labels, **more: learners.by_inner(
    make, plain, labels, batching="sequential", **more
  )
  return {
    "fine_tuning": made(sm.fine_tuning, whole),
    "head": made(sm.hand_picked, head, task_specific=("head",)),
    "biases": made(sm.hand_picked, biases, task_specific=("biases",)),
  }


def decaying(rate: Any, decay: float) -> optax.GradientTransformation:
  """Return Adam with learning rate rate / (1 + t / decay) in step t, which comes to rest."""
  return optax.adam(lambda t: rate / (1.0 + t / decay))


def learn_sigma(
  config: Config, params: PyTree, speakers: Voices, seed: int, folder: pathlib.Path
) -> sm.MetaState:
  """Learn sigma of every layer from speakers; continue from a checkpoint in `folder`.

  A task is a random speaker. Its train part is some rounds of recordings, and its val part another
  round. All rounds are drawn anew in every update.
  """
  own = config.meta
  inner = sm.Inner(decaying(own.z_rate, own.decay), steps=own.inner_steps, batch_size=own.pieces)
  learner = sigma_imaml(config, params)(inner)
  rounds = len(model.ADAPT) + len(model.EVALUATE)

  def one(i: int) -> sm.Task:
    rng = np.random.default_rng((seed, 4, i))
    drawn, speaker = rng.permutation(rounds), [int(rng.integers(len(speakers.names)))]
    k = own.recordings // 10
    part = lambda rounds: jax.tree.map(lambda x: x[0], speakers.batch(speaker, rounds))
    return sm.Task(part(drawn[:k]), part(drawn[k : k + 1]))

  def tasks(first: int, count: int) -> sm.Task:
    return jax.tree.map(
      lambda *leaves: jnp.asarray(np.stack(leaves)), *map(one, range(first, first + count))
    )

  return training.fit_to_the_end(
    learner,
    learner.init(params),
    tasks,
    own.steps,
    meta_batch=own.speakers,
    key=jax.random.fold_in(jax.random.key(seed), 3),
    callbacks=(sm.json_lines(folder / "log.jsonl"),),
    checkpoints=sm.Checkpoints(folder / "states", every=1, keep=2),
  )


def padded(batch: sm.Batch, rows: int) -> sm.Batch:
  """Return the pieces [T, N, ...] with padding up to [T, rows, ...] and a mask."""
  n = batch.targets.shape[1]
  fill = lambda x: np.pad(x, [(0, 0), (0, rows - n), *[(0, 0)] * (x.ndim - 2)])
  mask = np.broadcast_to(np.arange(rows) < n, (len(batch.targets), rows)).astype(np.float32)
  return sm.Batch(*map(jnp.asarray, (fill(batch.inputs), fill(batch.targets), mask)))


def adapt_and_evaluate(
  config: Config, make: MakeLearner, steps: tuple[int, ...]
) -> Callable[..., tuple[PyTree, jax.Array]]:
  """Return a compiled function (state, train, parts, rate, key) -> (thetas, nats).

  It runs one inner loop for each of T speakers and evaluates theta after each of S numbers of
  steps. For all methods step t has learning rate rate / (1 + t / decay).

  Its arguments are a state; train, pieces [T, N, ...] with a mask; parts, a tuple of batches of
  pieces [T, M, ...] without one; the rate []; and a key for the draws of pieces. thetas are after
  the last step, leaves [T, ...]. nats [parts, T, S] are means per sample.
  """
  own = config.adapt

  def program(
    state: sm.MetaState, train: sm.Batch, parts: tuple[sm.Batch, ...], rate: Any, key: jax.Array
  ) -> tuple[PyTree, jax.Array]:
    learner = make(sm.Inner(decaying(rate, own.decay), batch_size=own.pieces))
    thetas, _ = learner.adapt_tasks(state, train, steps, key)
    likelihood = learner.spec.likelihood

    def one(item: tuple[PyTree, sm.Batch]) -> jax.Array:
      own_thetas, batch = item
      blocks = jax.tree.map(lambda x: x.reshape(-1, BLOCK, *x.shape[1:]), batch)

      def after(theta: PyTree) -> jax.Array:
        whole = sm.merge(theta, state.phi)
        nats = lambda b: -likelihood.log_prob(likelihood.predict(whole, b.inputs), b.targets)
        return jnp.sum(jax.lax.map(nats, blocks)) / batch.targets.size

      return jax.lax.map(after, own_thetas)

    nats = [jax.lax.map(one, (thetas, part)) for part in parts]
    return jax.tree.map(lambda x: x[:, -1], thetas), jnp.stack(nats)

  return jax.jit(program)
