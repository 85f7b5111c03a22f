"""Spoken Arabic digits, with one speaker as a task: the same ten words in 30 voices.

A recording is one second at 8 kHz. Its features are the logarithms of the energy in MELS mel-scale
bands, in windows of 32 ms every 16 ms. They are normalised to mean 0 and standard deviation 1,
because speakers differ a lot in loudness. Speakers are split 18/6/6 as by the authors. Labels mean
the same in every task, so a task differs from the others only in its voice.

References: Ghandoura, Hjabo and Al Dakkak, Building and benchmarking an Arabic speech commands
  dataset for small-footprint keyword spotting, Engineering Applications of Artificial Intelligence,
  2021.
"""

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import signal

from experiments.datasets.few_shot import by_class
from experiments.datasets.files import cache, layouts, sounds
from experiments.datasets.source import Problem, Protocol, Source
from shrinkmeta import Task

SPEAKERS = {"train": 18, "val": 6, "test": 6}
DIGITS, ROUNDS = 10, 6  # recordings of a speaker
RATE, SAMPLES = 8_000, 8_000
MELS, HOP, WINDOW = 32, 128, 256
FRAMES = SAMPLES // HOP

_COLUMNS = ("zip", "member", "digit", "speaker", "round", "split")
_VERSION = 1  # of the features made here; another number makes caches of the old ones void


class Speakers(NamedTuple):
  """The recordings of S speakers."""

  features: np.ndarray  # [S, DIGITS, ROUNDS, FRAMES, MELS] float32
  names: tuple[str, ...]  # [S]


class Sounds(NamedTuple):
  """The waveforms of S speakers, with full scale 1.0."""

  samples: np.ndarray  # [S, DIGITS, ROUNDS, SAMPLES] float32
  names: tuple[str, ...]  # [S]


def load(
  data_dir: cache.Folder | None = None, cache_dir: cache.Folder | None = None
) -> dict[str, Speakers]:
  """Return the features of the train, val and test speakers.

  Args:
    data_dir: the folder of index.csv and of one zip for each speaker; default
      $SHRINKMETA_DATA/arabic_digits8k.
    cache_dir: see `cache.cached`; "" for nowhere.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a zip is damaged, or the index or a recording has an unexpected form.
  """
  folder = cache.data_folder("arabic_digits8k", data_dir)
  result = {}
  for split, (own, names) in _splits(folder).items():
    files = [folder / "index.csv", *(folder / name for name in sorted({r["zip"] for r in own}))]
    filename = f"spoken_digits_{split}_v{_VERSION}_{layouts.digest(files)[:16]}.npz"
    make = lambda own=own, names=names: Speakers(
      _recordings(folder, own, names, (FRAMES, MELS), log_mel), names
    )
    result[split] = cache.cached(cache_dir, filename, make, _read, _write)
  return result


def load_sounds(data_dir: cache.Folder | None = None) -> dict[str, Sounds]:
  """Return the waveforms of the train, val and test speakers; arguments and errors as in `load`."""
  folder = cache.data_folder("arabic_digits8k", data_dir)
  same = lambda sound: sound
  return {
    split: Sounds(_recordings(folder, own, names, (SAMPLES,), same), names)
    for split, (own, names) in _splits(folder).items()
  }


def _splits(folder: pathlib.Path) -> dict[str, tuple[list[dict], tuple[str, ...]]]:
  """Return {split: (its rows of the index, its speakers)}."""
  rows = cache.read_csv(folder / "index.csv", _COLUMNS)
  names = [f"{row['zip']}/{row['member']}" for row in rows]
  layouts.check_distinct(folder / "index.csv", names, zipped=False)  # members have one name each
  rows = [row | {name: row[name].strip() for name in ("speaker", "split")} for row in rows]
  if missing := sorted({row["zip"] for row in rows if not (folder / row["zip"]).is_file()}):
    raise FileNotFoundError(
      f"{folder}/index.csv names {len(missing)} zips that are not in the folder, such as "
      f"{missing[0]}. Copy them to it, or give another data_dir than {folder}."
    )
  splits = {row["speaker"]: row["split"] for row in rows}
  if elsewhere := sorted({r["speaker"] for r in rows if r["split"] != splits[r["speaker"]]}):
    raise ValueError(
      f"{folder}/index.csv has speaker {elsewhere[0]!r} in more than one split: the voice would be "
      "trained on and judged by. Take the original file."
    )
  result = {}
  for split, count in SPEAKERS.items():
    own = [row for row in rows if row["split"] == split]
    names = tuple(sorted({row["speaker"] for row in own}))
    if len(names) != count or len(own) != count * DIGITS * ROUNDS:
      raise ValueError(
        f"{folder}/index.csv wants {count} speakers of {DIGITS * ROUNDS} recordings in {split}; "
        f"got {len(own)} of {len(names)}. Take the original file."
      )
    result[split] = own, names
  return result


def _recordings(
  folder: pathlib.Path,
  rows: Sequence[dict],
  names: Sequence[str],
  shape: tuple[int, ...],
  of_sound: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
  """Return what `of_sound` makes of every recording, [S, DIGITS, ROUNDS, *shape] float32."""
  found = np.full((len(names), DIGITS, ROUNDS, *shape), np.nan, np.float32)
  for packed in sorted({row["zip"] for row in rows}):
    with cache.damaged(folder / packed):
      archive = zipfile.ZipFile(folder / packed)
    with archive:
      for row in (row for row in rows if row["zip"] == packed):
        digit, number = _place(folder / "index.csv", row)
        where = f"{folder / packed}, {row['member']}"
        with cache.damaged(where):
          sound = _sound(cache.read_member(archive, row["member"], 2**20), where)
        found[names.index(row["speaker"]), digit, number] = of_sound(sound)
  if np.isnan(found).any():
    raise ValueError(f"{folder}/index.csv names no recording of each digit and round.")
  return found


def _place(path: pathlib.Path, row: Mapping[str, str]) -> tuple[int, int]:
  """Return the digit and the round of a row, both counted from 0."""
  digit, number = row["digit"].strip(), row["round"].strip()
  digits, rounds = map(str, range(DIGITS)), map(str, range(1, ROUNDS + 1))
  if digit not in digits or number not in rounds:
    raise cache.DamagedError(
      f"{path} wants digits of 0 to {DIGITS - 1} and rounds of 1 to {ROUNDS}; {row['zip']}, "
      f"{row['member']} has digit {digit!r:.40}, round {number!r:.40}. Take the original file."
    )
  return int(digit), int(number) - 1


def _sound(content: bytes, where: str) -> np.ndarray:
  """Return a recording as [SAMPLES] float64, with full scale 1.0."""
  sound, rate = sounds.decode(content, where)
  if sound.shape != (SAMPLES,) or rate != RATE:
    raise ValueError(f"{SAMPLES} samples at {RATE} Hz wanted, got {sound.shape} at {rate}")
  return sound


def log_mel(sound: np.ndarray) -> np.ndarray:
  """Return features [FRAMES, MELS] float32 of [SAMPLES], with mean 0 and standard deviation 1."""
  transform = signal.ShortTimeFFT(np.hanning(WINDOW), HOP, RATE, mfft=2 * WINDOW)
  power = transform.spectrogram(sound, p0=0, p1=FRAMES)  # [frequencies, FRAMES]
  energy = (mel_filters(transform.f) @ power).T
  # The floor, 50 dB below the loudest, hides the silence that some recordings are padded with.
  logs = np.log(np.maximum(energy, 1e-5 * energy.max() + 1e-30))
  return ((logs - logs.mean()) / (logs.std() + 1e-6)).astype(np.float32)


def mel_filters(frequencies: np.ndarray) -> np.ndarray:
  """Return triangles [MELS, len(frequencies)], equally spaced and half overlapping in mel."""
  mel = 2595.0 * np.log10(1.0 + frequencies / 700.0)
  width = mel[-1] / (MELS + 1)
  centres = width * np.arange(1, MELS + 1)
  return np.maximum(0.0, 1.0 - np.abs(mel - centres[:, None]) / width)


def _read(path: pathlib.Path) -> Speakers:
  with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
    features, names = arrays["features"], tuple(arrays["names"].tolist())
  if features.shape != (len(names), DIGITS, ROUNDS, FRAMES, MELS):
    raise ValueError(f"features {features.shape} of {len(names)} speakers")
  return Speakers(features, names)


def _write(path: pathlib.Path, speakers: Speakers) -> None:
  names = np.array(speakers.names)
  cache.replace(path, lambda file: np.savez(file, features=speakers.features, names=names))


@dataclasses.dataclass(frozen=True)
class _Config:
  shots: int
  queries: int


def problem(
  shots: int = 1,
  queries: int | None = None,
  pool: int = 1,
  data_dir: cache.Folder | None = None,
  cache_dir: cache.Folder | None = None,
) -> Problem:
  """Return tasks of one speaker; each task draws which of a digit's 6 recordings are for training.

  Args:
    shots: recordings of each digit to adapt on.
    queries: other recordings to evaluate on; by default the rest of the 6.
    pool: the features are means over blocks of `pool` frames by `pool` bands; 1 leaves them.
    data_dir, cache_dir: see `load`.
  """
  queries = ROUNDS - shots if queries is None else queries
  if shots < 1 or queries < 1 or shots + queries > ROUNDS:
    raise ValueError(
      f"A speaker has {ROUNDS} recordings of a digit, and shots and queries are at least 1 each; "
      f"got {shots} and {queries}."
    )
  if pool < 1 or FRAMES % pool or MELS % pool:
    raise ValueError(f"pool must divide {FRAMES} frames and {MELS} bands; got {pool}. Take 1 or 2.")
  splits = load(data_dir, cache_dir)
  frames, bands = FRAMES // pool, MELS // pool

  def source(split: str, shuffle: bool) -> Source:
    features = splits[split].features
    shape = (*features.shape[:-2], frames, pool, bands, pool)
    features = jnp.asarray(features.reshape(shape).mean((-3, -1)))
    return Source(_task, _Config(shots, queries), features, len(features), shuffle)

  protocol = Protocol(
    data=f"spoken Arabic digits, a task a speaker, {frames} x {bands} log-mel",
    split="18 speakers to train, 6 validation, 6 test, the authors' own",
    ways=DIGITS,
    shots=shots,
    queries=queries,
    augmentation="none",
    evaluation="a finite list: each validation or test speaker once, then again with other "
    "recordings",
  )
  return Problem(
    source("train", True),
    source("val", False),
    source("test", False),
    "categorical",
    DIGITS,
    (frames, bands, 1),
    protocol,
  )


def _task(config: _Config, features: jax.Array, number: jax.Array, key: jax.Array) -> Task:
  order = jax.random.permutation(
    key, jnp.tile(jnp.arange(ROUNDS), (DIGITS, 1)), axis=1, independent=True
  )
  said = jnp.take_along_axis(features[number], order[..., None, None], axis=1)[..., None]
  last = config.shots + config.queries
  return Task(by_class(said[:, : config.shots]), by_class(said[:, config.shots : last]))
