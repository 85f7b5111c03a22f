"""The network, its likelihood, and the training of the base on pooled speakers."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import shrinkmeta as sm
from experiments.datasets.speech import voices
from experiments.datasets.speech.voices import Voices
from experiments.networks.audio import wavenet
from experiments.runs import training
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
  flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])
  clip = optax.clip_by_global_norm(float(config.pieces.length))  # of nats per piece
  params, losses = training.train_base(
    likelihood(config),
    # arms.py draws with the number 3, stages.py with 4, samples.py with 5.
    wavenet.init(jax.random.fold_in(jax.random.key(seed), 0), network(config)),
    sm.Batch(flat(every.inputs), flat(every.targets)),
    lambda rate: optax.chain(clip, optax.adam(rate)),
    folder,
    steps=own.steps,
    rate=own.rate,
    rows=own.pieces,
    seed=seed,
    save_every=500,
  )
  if not all(map(math.isfinite, losses)):
    raise FloatingPointError(f"{folder}: a loss of the base is not finite. Lower base.rate.")
  return params, [loss / config.pieces.length for loss in losses]
