"""Decode recordings to arrays."""

import io

import numpy as np
import soundfile

from experiments.datasets.files import cache


def decode(content: bytes, where: object) -> tuple[np.ndarray, int]:
  """Decode a WAV, FLAC or another format of libsndfile.

  The samples are read as float64. With int16, libsndfile 1.2 does not scale the samples of a float
  file, and returns zeros.

  Args:
    content: the encoded recording.
    where: path of the file, for errors.

  Returns:
    The samples, [n] or [n, channels] float64 with full scale 1.0, and the rate in Hz.

  Raises:
    cache.DamagedError: the recording cannot be read, or a sample is not finite.
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
