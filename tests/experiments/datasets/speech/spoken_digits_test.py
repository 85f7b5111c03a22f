"""Tests of the spoken digits, on generated recordings and on the real ones."""

import csv
import io
import os
import pathlib
import tempfile
import zipfile
from unittest import mock

import chex
import jax
import numpy as np
import soundfile
from absl.testing import absltest, parameterized

from experiments.datasets.source import sample_tasks
from experiments.datasets.speech import spoken_digits

DATA = os.environ.get("SHRINKMETA_DATA")
KEY = jax.random.key(0)


def tone(frequency: float, gain: float = 0.3) -> np.ndarray:
  return gain * np.sin(2 * np.pi * frequency * np.arange(8000) / 8000)


def flac(sound: np.ndarray, rate: int = 8000) -> bytes:
  buffer = io.BytesIO()
  soundfile.write(buffer, sound, rate, format="FLAC", subtype="PCM_16")
  return buffer.getvalue()


class FeaturesTest(parameterized.TestCase):
  @parameterized.parameters(200.0, 700.0, 1500.0, 3000.0)
  def test_a_tone_is_loudest_in_its_band(self, frequency):
    features = spoken_digits.log_mel(tone(frequency))
    self.assertEqual(features.shape, (62, 32))
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    band = mel(frequency) / (mel(4000) / 33) - 1
    # The inner frames; at the edges a window sees the tone begin.
    loudest = features[5:-5].argmax(axis=1)
    self.assertLessEqual(np.abs(loudest - band).max(), 0.75)

  def test_level_does_not_matter_and_time_does(self):
    sound = tone(500.0) * (np.arange(8000) > 4000)
    features = spoken_digits.log_mel(sound)
    np.testing.assert_allclose(spoken_digits.log_mel(0.1 * sound), features, atol=1e-4)
    np.testing.assert_allclose([features.mean(), features.std()], [0, 1], atol=1e-4)
    loud = features.max(axis=1) > features.max() - 0.5
    self.assertBetween(np.flatnonzero(loud)[0], 30, 33)  # 4000 / 128 = 31.25
    self.assertTrue(np.isfinite(spoken_digits.log_mel(np.zeros(8000))).all())

  def test_filters_share_the_energy_between_their_first_and_last_centre(self):
    frequencies = np.linspace(0, 4000, 257)
    mel = 2595 * np.log10(1 + frequencies / 700)
    total = spoken_digits.mel_filters(frequencies).sum(axis=0)
    inside = (mel > mel[-1] / 33) & (mel < mel[-1] * 32 / 33)
    np.testing.assert_allclose(total[inside], 1.0, rtol=1e-9)
    self.assertTrue(np.all(spoken_digits.mel_filters(frequencies).sum(axis=1) > 0))


class SpeakersTest(parameterized.TestCase):
  """Three speakers; the tone of a recording tells speaker and digit, its silence the round."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    one = {split: 1 for split in spoken_digits.SPEAKERS}
    self.enterContext(mock.patch.object(spoken_digits, "SPEAKERS", one))
    rows = [["zip", "member", "word", "digit", "speaker", "round", "split"]]
    for s, split in enumerate(one):
      with zipfile.ZipFile(self.folder / f"{s}.zip", "w") as archive:
        for digit in range(10):
          for r in range(1, 7):
            member = f"word{digit}/{s}_NO_{r:02}.flac"
            archive.writestr(member, flac(self.sound(s, digit, r)))
            rows.append([f"{s}.zip", member, f"word{digit}", digit, s, r, split])
    with (self.folder / "index.csv").open("w", newline="") as file:
      csv.writer(file).writerows(rows)

  def sound(self, speaker, digit, number):
    return tone(300.0 + 100 * speaker + 300 * digit) * (np.arange(8000) > 1000 * number)

  def load(self):
    return spoken_digits.load(self.folder, cache_dir=self.folder / "cache")

  def test_recordings_are_where_the_index_says(self):
    first, again = self.load(), self.load()
    for s, (split, found) in enumerate(first.items()):
      self.assertEqual(found.names, (str(s),))
      np.testing.assert_array_equal(found.features, again[split].features)
      for digit, number in ((0, 1), (3, 6), (9, 2)):
        # FLAC keeps 16 bits, which moves the quietest bands a little.
        want = spoken_digits.log_mel(self.sound(s, digit, number))
        np.testing.assert_allclose(found.features[0, digit, number - 1], want, atol=0.05)
    self.assertLen(os.listdir(self.folder / "cache"), 3)

  def test_sounds_are_the_recordings(self):
    for s, (split, found) in enumerate(spoken_digits.load_sounds(self.folder).items()):
      self.assertEqual((found.names, split), ((str(s),), list(spoken_digits.SPEAKERS)[s]))
      chex.assert_shape(found.samples, (1, 10, 6, 8000))
      for digit, number in ((0, 1), (3, 6), (9, 2)):
        want = self.sound(s, digit, number)  # FLAC keeps 16 bits
        np.testing.assert_allclose(found.samples[0, digit, number - 1], want, atol=2**-15)

  def test_a_task_splits_the_recordings_of_each_digit(self):
    p = spoken_digits.problem(2, data_dir=self.folder, cache_dir="")
    task = sample_tasks(p.test, KEY, 0, count=4)
    chex.assert_shape(task.train.inputs, (4, 20, 62, 32, 1))
    chex.assert_shape(task.val.inputs, (4, 40, 62, 32, 1))
    stored = np.asarray(p.test.data)[0].reshape(10, 6, -1)
    orders = set()
    for train, val in zip(task.train.inputs, task.val.inputs, strict=True):
      both = np.concatenate([train.reshape(10, 2, -1), val.reshape(10, 4, -1)], axis=1)
      same = np.all(both[:, :, None] == stored[:, None], axis=-1)  # [digit, place, round]
      np.testing.assert_array_equal(same.sum(1), 1)
      np.testing.assert_array_equal(same.sum(2), 1)
      orders |= {tuple(order) for order in same.argmax(2)}
    self.assertGreater(len(orders), 20)  # drawn for each digit and each index
    part = sample_tasks(p.test, KEY, 2, count=2)
    chex.assert_trees_all_equal(part, jax.tree.map(lambda leaf: leaf[2:], task))

  def test_broken_recordings(self):
    cases = (
      (b"no sound", "not whole"),
      (flac(tone(400.0)[:100]), r"8000 samples at 8000 Hz wanted, got \(100,\)"),
      (flac(tone(400.0), 16000), "got .* at 16000"),
      (bytes(2**20 + 1), "would take 1048577 bytes where 1048576 are more than enough"),
    )
    for content, message in cases:
      with zipfile.ZipFile(self.folder / "0.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word0/0_NO_01.flac", content)
      os.utime(self.folder / "0.zip", ns=(len(content), len(content)))
      with self.assertRaisesRegex(ValueError, f"0.zip, word0/0_NO_01.flac: .*{message}"):
        self.load()

  @parameterized.parameters("FLOAT", "DOUBLE", "PCM_16", "PCM_24")
  def test_every_kind_of_wav_sounds_the_same(self, subtype):
    sound, buffer = self.sound(0, 0, 1), io.BytesIO()
    soundfile.write(buffer, sound, 8000, subtype=subtype, format="WAV")
    self.replace(buffer.getvalue())
    want = spoken_digits.log_mel(sound)
    np.testing.assert_allclose(self.load()["train"].features[0, 0, 0], want, atol=0.05)

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_a_sample_that_is_no_number_is_named(self, bad):
    sound, buffer = self.sound(0, 0, 1), io.BytesIO()
    sound[[100, 200]] = bad
    soundfile.write(buffer, sound, 8000, subtype="FLOAT", format="WAV")
    self.replace(buffer.getvalue())
    message = f"sample 100 of 8000 is {bad}; 2 are not finite. Replace the recording"
    with self.assertRaisesRegex(ValueError, f"^{self.folder}/0.zip, word0/0_NO_01.flac: {message}"):
      self.load()

  def replace(self, content):
    """Give the first recording of the first speaker other content."""
    with zipfile.ZipFile(self.folder / "0.zip") as archive:
      members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(self.folder / "0.zip", "w") as archive:
      for name, own in (members | {"word0/0_NO_01.flac": content}).items():
        archive.writestr(name, own)

  def test_damaged_files_are_named(self):
    path = self.folder / "0.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with self.assertRaisesRegex(ValueError, f"^{path}: damaged .*BadZipFile.*Download it anew"):
      self.load()
    path.write_bytes(whole)
    index = self.folder / "index.csv"
    table = index.read_text()
    for change, message in (
      (("digit", "digjt"), "wants columns under the header zip,member,digit"),
      ((",0,0,1,train", ",0,0,one,train"), "0.zip, word0/0_NO_01.flac has digit '0', round 'one'"),
      ((",0,0,1,train", ",11,0,1,train"), "0.zip, word0/0_NO_01.flac has digit '11', round '1'"),
      ((",0,0,1,train", ",-1,0,1,train"), "0.zip, word0/0_NO_01.flac has digit '-1', round '1'"),
      ((",0,0,1,train", ",0,0,0,train"), "0.zip, word0/0_NO_01.flac has digit '0', round '0'"),
      ((",0,0,1,train", ",9,0,1,train"), "no recording of each digit"),
      (("0_NO_02", "0_NO_01"), "has '0.zip/word0/0_NO_01.flac' more than once"),
      ((",1,1,val", ",0,1,val"), "has speaker '0' in more than one split"),
      ((",1,1,val", ", 0,1,val"), "has speaker '0' in more than one split"),
    ):
      index.write_text(table.replace(*change, 1))
      os.utime(index, ns=(len(message), len(message)))
      with self.assertRaisesRegex(ValueError, f"^{index}.*{message}"):
        self.load()
    index.write_text(table)
    path.unlink()
    message = f"such as 0.zip. Copy them to it, or give another data_dir than {self.folder}"
    with self.assertRaisesRegex(FileNotFoundError, message):
      self.load()
    index.unlink()
    with self.assertRaisesRegex(FileNotFoundError, f"^{index} does not exist. Give another"):
      self.load()

  def test_other_counts(self):
    with mock.patch.object(spoken_digits, "SPEAKERS", {"train": 2}):
      with self.assertRaisesRegex(ValueError, "wants 2 speakers of 60 recordings in train; got 60"):
        self.load()
    with self.assertRaises(FileNotFoundError):
      spoken_digits.load(self.folder / "nowhere")

  @parameterized.parameters((0, 1), (6, None), (3, 4), (3, 0))
  def test_shots_and_queries_out_of_range(self, shots, queries):
    with self.assertRaisesRegex(ValueError, "6 recordings"):
      spoken_digits.problem(shots, queries, self.folder)


@absltest.skipUnless(DATA, "SHRINKMETA_DATA is not set: no spoken digits to read.")
class RealTest(absltest.TestCase):
  def test_speakers(self):
    p = spoken_digits.problem(1, cache_dir="")
    self.assertEqual([s.tasks for s in p[:3]], [18, 6, 6])
    features = np.asarray(p.train.data)
    self.assertTrue(np.isfinite(features).all())
    # Digits are where the index says: means of other speakers' recordings tell them apart.
    means = features.mean((0, 2)).reshape(10, -1)
    unseen = np.asarray(p.test.data).reshape(6, 10, 6, 1, -1)
    nearest = np.square(unseen - means).sum(-1).argmin(-1)
    self.assertGreater(np.mean(nearest == np.arange(10)[:, None]), 0.4)


if __name__ == "__main__":
  absltest.main()
