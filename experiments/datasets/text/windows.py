"""Texts as windows of bytes, which are the examples of a causal language model.

Every byte of a text is predicted once, from the bytes before it in its window. The first byte of a
window sees the last byte of the window before. So a loss in nats becomes bits per byte without
weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import shrinkmeta as sm

VOCABULARY = 256
PADDING = -1  # a target that counts nothing
_START = ord("\n")  # the byte before a text


def windows(articles: Sequence[str], width: int, most: int | None = None) -> sm.Batch:
  """Return the windows of articles, joined by line breaks.

  Args:
    articles: the texts.
    width: S, the number of bytes of a window.
    most: the largest number of windows; the rest of the text is left out. None takes all.

  Returns:
    Batch(inputs [N, S] uint8, targets [N, S] int32) of NumPy arrays. After the end of the text,
    inputs are 0 and targets are PADDING. inputs[n, s] is the byte before targets[n, s].
  """
  text = np.frombuffer("\n".join(articles).encode(), np.uint8)
  count = -(-len(text) // width)
  count = count if most is None else min(count, most)
  text = text[: count * width]
  targets = np.full(count * width, PADDING, np.int32)
  targets[: len(text)] = text
  inputs = np.zeros(count * width, np.uint8)
  inputs[: len(text)] = np.concatenate([[_START], text[:-1]])
  fold = lambda x: x.reshape(count, width)
  return sm.Batch(fold(inputs), fold(targets))


def padded(batches: Sequence[sm.Batch], rows: int) -> sm.Batch:
  """Stack the windows of T tasks: leaves [T, rows, S], with mask 0 on rows that are padding.

  Unlike `sm.stack_batches`, this fills targets with PADDING, because 0 is a byte.
  """
  inputs = np.zeros((len(batches), rows, batches[0].inputs.shape[1]), np.uint8)
  targets = np.full(inputs.shape, PADDING, np.int32)
  mask: Any = np.zeros(inputs.shape[:2], np.float32)
  for t, batch in enumerate(batches):
    n = len(batch.inputs)
    if n > rows:
      raise ValueError(f"Task {t} has {n} windows; rows is {rows}. Give at least that.")
    inputs[t, :n], targets[t, :n], mask[t, :n] = batch.inputs, batch.targets, 1.0
  return sm.Batch(inputs, targets, mask)


def num_targets(batch: sm.Batch) -> np.ndarray:
  """Return the number of bytes that targets [..., N, S] hold, summed over N and S."""
  return np.sum(np.asarray(batch.targets) != PADDING, (-1, -2))


def bits_per_byte(nats: npt.ArrayLike, count: npt.ArrayLike) -> np.ndarray:
  """Return nats / (count log 2): the bits that a coder of this model needs for a byte."""
  return np.asarray(nats, np.float64) / (np.asarray(count, np.float64) * math.log(2.0))
