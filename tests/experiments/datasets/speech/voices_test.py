"""Pieces of recordings, and the mu-law, against closed forms."""

import os

import numpy as np
import pytest

from experiments.datasets.speech import mu_law, spoken_digits, voices
from experiments.datasets.speech.spoken_digits import DIGITS, ROUNDS, Sounds


def test_mu_law_against_the_closed_form():
  levels = np.arange(256)
  y = 2 * levels / 255 - 1
  want = np.sign(y) * (256 ** np.abs(y) - 1) / 255
  np.testing.assert_allclose(mu_law.decode(levels), want, rtol=1e-12)
  np.testing.assert_array_equal(mu_law.encode(want), levels)
  np.testing.assert_array_equal(mu_law.encode(np.array([-9.0, -1.0, 1.0, 9.0])), [0, 0, 255, 255])


def test_rounding_to_levels_is_relative_to_the_sample():
  x = np.random.default_rng(0).uniform(-1, 1, 5_000)
  error = np.abs(mu_law.decode(mu_law.encode(x)) - x)
  # Half a step of y is 1/255, and dx / dy = ln 256 (1 + 255 |x|) / 255; it grows with |x|.
  step = np.log(256) * (1 / 255 + np.abs(x)) / 255
  assert (error <= step * np.exp(np.log(256) / 255)).all()
  assert error[np.abs(x) < 0.01].max() < 0.1 * error.max()


def recordings(places):
  """Two speakers; a recording has 8 places of 10 samples after 4; `places` are loud."""
  samples = np.full((2, DIGITS, ROUNDS, 84), 0.001, np.float32)
  for place in places:
    samples[..., 4 + 10 * place : 14 + 10 * place] = 0.1 * (place + 1)
  return Sounds(samples, ("ann", "bob"))


def test_the_loudest_pieces_with_their_context():
  found = voices.voices(recordings((2, 5, 7)), context=4, length=10, count=2)
  assert found.levels.shape == (2, ROUNDS, DIGITS, 2, 14)
  sound = np.concatenate([[0.001 / 0.8] * 54, [0.6 / 0.8] * 10, [0.001 / 0.8] * 10, [1.0] * 10])
  levels = mu_law.encode(sound)
  for n, start in enumerate((50, 70)):
    np.testing.assert_array_equal(found.levels[1, 3, 2, n], levels[start : start + 14])
  batch = found.batch([1], [0, 4])
  assert batch.inputs.shape == (1, 2 * DIGITS * 2, 13) and batch.targets.shape == (1, 40, 10)
  np.testing.assert_array_equal(batch.inputs[0, 0], levels[50:63])
  np.testing.assert_array_equal(batch.targets[0, 0], levels[54:64])


def test_rounds_and_digits_are_where_they_belong():
  samples = np.zeros((2, DIGITS, ROUNDS, 30), np.float32)
  samples[1, 3, 2, 15:] = np.linspace(0.1, 1.0, 15)
  found = voices.voices(Sounds(samples, ("ann", "bob")), context=5, length=5, count=1)
  silent = mu_law.encode(np.zeros(1))[0]
  loud = np.argwhere((found.levels != silent).any((-1, -2)))
  assert loud.tolist() == [[1, 2, 3]]  # speaker, round, digit


def test_a_silent_recording_and_too_many_pieces():
  silent = Sounds(np.zeros((1, DIGITS, ROUNDS, 84), np.float32), ("ann",))
  assert np.ptp(voices.voices(silent, 4, 10, 8).levels) == 0
  with pytest.raises(
    ValueError, match="has 8 places for a piece of 10 samples after 4; got count=9"
  ):
    voices.voices(silent, 4, 10, 9)


def test_artificial_speakers_differ_and_repeat():
  one, again = voices.synthetic(8, 8, 2), voices.synthetic(8, 8, 2)
  assert {split: v.levels.shape[0] for split, v in one.items()} == {"train": 6, "val": 2, "test": 2}
  for split, own in one.items():
    np.testing.assert_array_equal(own.levels, again[split].levels)
    assert (own.levels[0] != own.levels[1]).any()


def test_sounds_without_their_folder(tmp_path):
  with pytest.raises(FileNotFoundError, match="index.csv does not exist"):
    spoken_digits.load_sounds(tmp_path / "nowhere")


@pytest.mark.skipif("SHRINKMETA_DATA" not in os.environ, reason="SHRINKMETA_DATA is not set")
def test_real_recordings():
  found = voices.load(256, 256, 6)
  shapes = {split: v.levels.shape for split, v in found.items()}
  assert shapes == {split: (n, 6, 10, 6, 512) for split, n in spoken_digits.SPEAKERS.items()}
  predicted = mu_law.decode(found["test"].levels[..., 256:])
  # Voiced sound, not silence: each recording is scaled to a largest value of 1.
  assert 0.15 < np.sqrt(np.square(predicted).mean()) < 0.5
  assert np.abs(predicted).max((-2, -1)).min() > 0.5
