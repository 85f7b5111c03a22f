"""Encoded recordings as arrays."""

import io

import numpy as np
import soundfile

from experiments.datasets.files import cache


def decode(content: bytes, where: object) -> tuple[np.ndarray, int]:
  """Decode a WAV, FLAC or another format of libsndfile.

  It is read as float64. Hazard, libsndfile 1.2: to read a file of float samples as int16 gives
  zeros, since samples are not scaled.

  Args:
    content: the encoded recording.
    where: path of the file, for errors.

  Returns:
    The samples, [n] or [n, channels] float64, 1.0 at full scale, and the rate in Hz.

  Raises:
    cache.DamagedError: it cannot be read, or a sample is not finite.
  """
  with cache.damaged(where):
    sound, rate = soundfile.read(io.BytesIO(content), dtype="float64")
  if not np.isfinite(sound).all():
    wrong = np.argwhere(~np.isfinite(sound))
    raise cache.DamagedError(
      f"{where}: sample {wrong[0][0]} of {len(sound)} is {sound[tuple(wrong[0])]}; {len(wrong)} "
      "are not finite. Replace the recording, or leave its speaker out."
    )
  return sound, rate
