"""The network, its likelihood, and the training of the base on pooled speakers."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.datasets.speech import voices
from experiments.datasets.speech.voices import Voices
from experiments.networks.audio import wavenet
from experiments.settings.schema import Config

PyTree = Any
ADAPT, EVALUATE = (0, 1, 2, 3), (4, 5)  # rounds of recordings of a new speaker


def network(config: Config) -> wavenet.Config:
  """Return the sizes of the WaveNet."""
  own = config.network
  return wavenet.Config(tuple(own.dilations), own.channels, own.skip, own.hidden)


def load(config: Config, data_dir: str | None = None) -> dict[str, Voices]:
  """Return the pieces of the train, val and test speakers; the context is the receptive field."""
  own = config.pieces
  sizes = wavenet.receptive_field(network(config)), own.length, own.count
  return voices.synthetic(*sizes) if config.data == "synthetic" else voices.load(*sizes, data_dir)


def predict(config: Config) -> Callable[[PyTree, jax.Array], jax.Array]:
  """Return (params, levels [N, R - 1 + S]) -> logits [N, S, 256] of the S predicted samples."""
  own = network(config)
  return lambda params, levels: wavenet.apply(own, params, levels)


def likelihood(config: Config) -> sm.Likelihood:
  """Return the likelihood of pieces: the log density of a piece is a sum over samples, in nats.

  An example is a piece: inputs [N, R - 1 + S] and targets [N, S], both mu-law levels.
  """
  network = predict(config)
  of_samples = sm.categorical(network).log_prob

  def log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    n, s, levels = logits.shape
    return of_samples(logits.reshape(-1, levels), targets.reshape(-1)).reshape(n, s).sum(-1)

  return sm.Likelihood(network, log_prob)


def train_base(
  config: Config, speakers: Voices, seed: int, folder: pathlib.Path
) -> tuple[PyTree, list[float]]:
  """Train the network on all pieces of all speakers; continue from a checkpoint in `folder`.

  Returns:
    (parameters, the losses of all steps in nats per sample).
  """
  own, count = config.base, len(speakers.names)
  every = speakers.batch(range(count), range(len(ADAPT) + len(EVALUATE)))
  pool = [np.asarray(x).reshape(-1, x.shape[-1]) for x in (every.inputs, every.targets)]
  half = own.pieces // 2

  def tasks(first: int, count: int) -> sm.Task:
    """One task a step: pieces of any speakers, half of them as train and half as val."""
    draw = lambda i: np.random.default_rng((seed, 3, i)).choice(len(pool[0]), 2 * half)
    rows = np.stack([draw(i) for i in range(first, first + count)])
    part = lambda rows: sm.Batch(*(jnp.asarray(x[rows]) for x in pool))
    return sm.Task(part(rows[:, :half]), part(rows[:, half:]))

  rate = optax.warmup_cosine_decay_schedule(
    0.0, own.rate, max(1, own.steps // 20), own.steps, 0.02 * own.rate
  )
  params = wavenet.init(jax.random.key(seed), network(config))
  clip = optax.clip_by_global_norm(float(config.pieces.length))  # of nats per piece
  learner = sm.no_adaptation(
    likelihood(config),
    jax.tree.map(lambda _: "network", params),
    phi_optimizer=optax.chain(clip, optax.adam(rate)),
  )
  log = folder / "log.jsonl"
  state = sm.fit(
    learner,
    learner.init(params),
    tasks,
    own.steps,
    meta_batch=1,
    callbacks=(sm.json_lines(log),),
    checkpoints=sm.Checkpoints(folder / "states", every=500, keep=2),
  )
  losses = [record["phi_loss"] / config.pieces.length for record in sm.read_json_lines(log)]
  if not all(map(math.isfinite, losses)):
    raise FloatingPointError(f"{log}: a loss is not finite. Lower base.rate.")
  return state.phi, losses
