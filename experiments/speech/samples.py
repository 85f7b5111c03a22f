"""Sound that adapted networks draw: WAV files, and how it compares with the speaker's recordings.

A network hears the first `context` samples of a recording that it was not adapted on. From there it
draws sample by sample. What it draws sounds like a voice without words, because nothing tells it
what to say.
"""

import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

import shrinkmeta as sm
from experiments.datasets.speech import mu_law
from experiments.datasets.speech.spoken_digits import RATE
from experiments.datasets.speech.voices import Voices
from experiments.networks.audio import wavenet
from experiments.runs import files
from experiments.settings.schema import Config
from experiments.speech import model

NETWORKS = ("no_adaptation", "sigma_imaml", "fine_tuning")
BANDS = 8  # of equal width, from 0 Hz to half the rate


def deltas(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Return the folder of the adapted parameters of a method."""
  return folder / f"deltas_{name}"


def stage(
  config: Config, state: sm.MetaState, speakers: Voices, seed: int, folder: pathlib.Path
) -> dict[str, Any]:
  """Draw sound of every speaker from the base and from adapted networks.

  Each network had the last of `adapt.steps` steps on the first of `adapt.recordings`. WAV files of
  the first speaker go into the folder `samples`.

  Returns:
    {network: {"level": [T] dB above the speaker's recordings, "spectrum": [T] mean distance in dB
    over the bands, "nats": [T] per drawn sample, "levels": [S] mu-law levels of the first speaker}}
    and the levels of the "recordings".
  """
  count = len(speakers.names)
  prefix = jnp.asarray(speakers.levels[:, model.EVALUATE[0], 0, 0, : speakers.context], jnp.int32)
  heard = mu_law.decode(speakers.batch(range(count), model.EVALUATE).targets)  # [T, N, length]
  own = model.network(config)
  draw = jax.jit(
    jax.vmap(lambda theta, key, before: wavenet.sample(own, theta, key, before, config.samples))
  )
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 5), count)
  result: dict[str, Any] = {}
  for name in NETWORKS:
    thetas = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), state.phi)
    if name != "no_adaptation":
      thetas = sm.merge(sm.load_deltas(deltas(folder, name), state).thetas, thetas)
    levels, log_probs = jax.device_get(draw(thetas, keys, prefix))
    sound = mu_law.decode(levels)
    write(folder / "samples" / f"{name}.wav", sound[0])
    whole = sound.shape[-1] // heard.shape[-1] * heard.shape[-1]
    pieces = sound[:, :whole].reshape(count, -1, heard.shape[-1])  # as long as those of recordings
    result[name] = {
      "level": (loudness(pieces) - loudness(heard)).tolist(),
      "spectrum": np.abs(spectrum(pieces) - spectrum(heard)).mean(-1).tolist(),
      "nats": (-log_probs.mean(-1)).tolist(),
      "levels": levels[0].tolist(),
    }
  joined = mu_law.encode(heard[0]).reshape(-1)[: config.samples]
  return result | {"recordings": {"levels": joined.tolist()}}


def write(path: pathlib.Path, sound: np.ndarray) -> None:
  """Write samples in [-1, 1] as a WAV file with 16 bits, whole or not at all."""
  buffer = io.BytesIO()
  soundfile.write(buffer, sound, RATE, format="WAV", subtype="PCM_16")
  with files.atomic(path) as temporary:
    temporary.write_bytes(buffer.getvalue())


def loudness(sound: np.ndarray) -> np.ndarray:
  """Return the root mean square [T] of pieces [T, N, samples], in dB of full scale."""
  return 10 * np.log10(np.square(sound).mean((-2, -1)) + 1e-12)


def spectrum(sound: np.ndarray) -> np.ndarray:
  """Return the share of each band in the power of pieces [T, N, samples]: [T, BANDS] in dB."""
  window = np.hanning(sound.shape[-1])
  power = np.square(np.abs(np.fft.rfft(sound * window, axis=-1))).mean(-2)
  bands = np.stack([part.sum(-1) for part in np.array_split(power, BANDS, -1)], -1)
  return 10 * np.log10(bands / bands.sum(-1, keepdims=True) + 1e-12)
