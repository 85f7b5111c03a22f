"""The mu-law: samples of a recording as 256 levels, which lie closer together near silence.

    y = sign(x) ln(1 + 255 |x|) / ln 256        level = round((y + 1) 255 / 2)

References: ITU-T G.711, Pulse code modulation of voice frequencies, 1988.
"""

import math

import numpy as np

LEVELS = 256  # of 8 bits
_MU = LEVELS - 1


def encode(samples: np.ndarray) -> np.ndarray:
  """Return the levels 0 to 255, uint8, of samples with full scale 1.0; louder ones are clipped."""
  x = np.clip(np.asarray(samples, np.float64), -1.0, 1.0)
  y = np.sign(x) * np.log1p(_MU * np.abs(x)) / math.log1p(_MU)
  return np.rint((y + 1.0) * _MU / 2).astype(np.uint8)


def decode(levels: np.ndarray) -> np.ndarray:
  """Return the samples in [-1, 1], float64, whose y is exactly that of the levels."""
  y = 2.0 * np.asarray(levels, np.float64) / _MU - 1.0
  return np.sign(y) * np.expm1(np.abs(y) * math.log1p(_MU)) / _MU
