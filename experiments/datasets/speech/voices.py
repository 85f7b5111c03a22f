"""Pieces of the spoken digits as mu-law levels, and artificial speakers.

Most of a one-second recording is silence, which every voice shares. So of each recording only the
loudest pieces are taken. A piece has `context` samples, which are only listened to, and then
`length` samples, which are predicted. The places of pieces lie on a grid, so that no sample is
predicted twice. A recording is scaled to a largest absolute value of 1, because speakers and
recordings differ a lot in loudness.

Letters in shapes: S speakers, ROUNDS rounds of DIGITS recordings, M pieces of a recording.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.datasets.files import cache
from experiments.datasets.speech import mu_law
from experiments.datasets.speech.spoken_digits import (
  DIGITS,
  RATE,
  ROUNDS,
  Sounds,
  load_sounds,
)
from shrinkmeta import Batch


class Voices(NamedTuple):
  """The pieces of S speakers."""

  levels: np.ndarray  # [S, ROUNDS, DIGITS, M, context + length] uint8
  context: int
  names: tuple[str, ...]  # [S]

  def batch(self, speakers: Sequence[int], rounds: Sequence[int]) -> Batch:
    """Return all pieces of some rounds of some speakers.

    Returns:
      inputs [len(speakers), N, context - 1 + length] and targets [len(speakers), N, length], where
      N = len(rounds) DIGITS M. With a network whose receptive field is `context`, output s of a
      piece predicts target s.
    """
    found = self.levels[np.ix_(speakers, rounds)]
    found = found.reshape(len(speakers), -1, found.shape[-1]).astype(np.int32)
    return Batch(found[..., :-1], found[..., self.context :])


def load(
  context: int, length: int, count: int, data_dir: cache.Folder | None = None
) -> dict[str, Voices]:
  """Return the `count` loudest pieces of every recording of the train, val and test speakers.

  Raises:
    FileNotFoundError, ValueError: as in `spoken_digits.load_sounds`, or recordings are too short.
  """
  return {k: voices(v, context, length, count) for k, v in load_sounds(data_dir).items()}


def synthetic(context: int, length: int, count: int) -> dict[str, Voices]:
  """Return pieces of ten artificial speakers, for tests: a pitch with three harmonics, and noise.

  Recordings are as many as in the spoken digits, but have 1,000 samples.
  """
  result, time = {}, np.arange(1_000) / RATE
  for n, (split, speakers) in enumerate((("train", 6), ("val", 2), ("test", 2))):
    rng = np.random.default_rng((7, n))
    one = lambda low, high, rng=rng, s=speakers: rng.uniform(low, high, (s, 1, 1, 1))
    each = (speakers, DIGITS, ROUNDS, 1)
    phase = 2 * np.pi * one(90.0, 250.0) * rng.uniform(0.9, 1.1, each) * time
    tilt = one(0.5, 2.0)
    tone = sum(np.sin(k * phase) / k**tilt for k in (1, 2, 3))
    loud = np.exp(-(((time - rng.uniform(0.04, 0.08, each)) / 0.02) ** 2))
    noise = 0.01 * rng.standard_normal((*each[:-1], len(time)))
    names = tuple(f"{split} {i}" for i in range(speakers))
    result[split] = voices(
      Sounds((loud * tone + noise).astype(np.float32), names), context, length, count
    )
  return result


def voices(sounds: Sounds, context: int, length: int, count: int) -> Voices:
  """Return the `count` loudest pieces of every recording, in the order of time.

  Raises:
    ValueError: a recording is too short for so many pieces.
  """
  samples = sounds.samples / np.maximum(np.abs(sounds.samples).max(-1, keepdims=True), 1e-9)
  places = (samples.shape[-1] - context) // length
  if not 1 <= count <= places:
    raise ValueError(
      f"A recording of {samples.shape[-1]} samples has {places} places for a piece of {length} "
      f"samples after {context}; got count={count}. Take fewer or shorter pieces."
    )
  ends = context + length * np.arange(1, places + 1)
  predicted = samples[..., context : ends[-1]].reshape(*samples.shape[:-1], places, length)
  energy = np.square(predicted).sum(-1)  # [S, DIGITS, ROUNDS, places]
  loudest = np.sort(np.argsort(-energy, -1, kind="stable")[..., :count], -1)
  whole = np.lib.stride_tricks.sliding_window_view(mu_law.encode(samples), context + length, -1)
  found = np.take_along_axis(whole, loudest[..., None] * length, -2)
  return Voices(found.swapaxes(1, 2), context, sounds.names)
