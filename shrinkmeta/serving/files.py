"""Deltas on disk: safetensors shards and one index, from which a reader can load some tasks only.

A shard holds one tensor for each leaf of its K tasks, and a checksum for each task and leaf:

  theta/PATH       [K, ...]  theta in the dtype of phi, if nothing is rounded
  difference/PATH  [K, ...]  theta - phi, bfloat16 or int8
  scale/PATH       [K]       float32, for int8 only: theta - phi = scale * difference
  crc32            [K, L]    of the id, the path and the bytes; L leaves, sorted by path

A save writes new shards, waits until they are on disk, and then replaces the index. Shards never
change. A process killed at any moment leaves the old index or the new one, with all its shards.
"""

import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shrinkmeta.base import MetaState, check_state
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.paths import local_path
from shrinkmeta.serving import index as delta_index
from shrinkmeta.serving.deltas import (
  About,
  Deltas,
  TaskId,
  check_deltas,
  check_fingerprint,
  check_finite,
  check_known,
  fingerprint,
  task_ids,
  with_structure,
)
from shrinkmeta.serving.index import Index, shard_path
from shrinkmeta.serving.rounding import PARTS, Rounding, phi_of, rounded_parts, theta_of


def save_deltas(
  folder: str | os.PathLike[str],
  deltas: Deltas,
  *,
  state: MetaState | None = None,
  dtype: Rounding | None = None,
  overwrite: bool = False,
  wait: float = 60.0,
  shard_bytes: int = 1 << 28,
) -> None:
  """Add tasks to a folder, and make the folder if it does not exist.

  The tasks become visible all at once, at the end of the call. A process that is killed earlier
  leaves the folder as it was. One process writes at a time; others may read meanwhile.

  Each call writes the whole index: for each task about 30 bytes and the id. So save many tasks in
  one call. An overwritten task takes space until all tasks of its shard are overwritten and the
  shard is deleted. To free the space at once, load all tasks and save them with `overwrite=True`.

  Args:
    folder: the folder. All its tasks must have been adapted from one phi.
    deltas: the T tasks to save.
    state: the state from which the tasks were adapted. It is needed with `dtype`.
    dtype: None stores theta to the bit. "bfloat16" and "int8" store theta - phi, rounded. They take
      1/2 and 1/4 of the bytes of float32. int8 has one scale for each task and leaf,
      max|theta - phi| / 127. `rounding_loss` measures the cost in nats per example.
    overwrite: True replaces tasks that the folder already has. False raises an error for them.
    wait: the longest time to wait for another process that writes to the folder, in seconds.
    shard_bytes: the largest size of a shard in bytes. A shard has at least one task.

  Raises:
    TypeError, ValueError: an argument does not fit; the folder belongs to another phi; the folder
      already has one of the ids, and `overwrite` is False.
    TimeoutError: another process still writes after `wait` seconds.
    OSError: the folder cannot be written to, or its index is damaged.
    ImportError: safetensors is not installed.

  Example:
    >>> import pytest; _ = pytest.importorskip("safetensors")
    >>> import tempfile, jax.numpy as jnp, shrinkmeta as sm
    >>> from shrinkmeta.serving.deltas import deltas
    >>> from shrinkmeta.serving.files import load_deltas, save_deltas
    >>> params = {"level": jnp.zeros(())}
    >>> learner = sm.maml(sm.gaussian(lambda p, x: x + p["level"], scale=1.0), sm.by_leaf(params))
    >>> state = learner.init(params)
    >>> own = deltas(learner, state, {"level": jnp.array([1.0, 2.0])}, ["ann", "bob"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save_deltas(folder, own)
    ...   load_deltas(folder, state, ["bob"]).thetas
    {'level': Array([2.], dtype=float32)}
  """
  delta_index.safetensors()
  _check_deltas_and_dtype(deltas, dtype)
  wait = scalars.number("wait", wait)
  if not wait >= 0:
    raise ValueError(f"wait must be a number of seconds, 0 or more; got {wait}.")
  shard_bytes = validate.integer("shard_bytes", shard_bytes, least=1)
  overwrite = scalars.flag("overwrite", overwrite)
  if state is not None:
    check_state("state", state)
  folder = local_path("folder", folder).absolute()
  phi = {} if dtype is None else phi_of(deltas, state, dtype)
  leaves = {p: np.asarray(x) for p, x in validate.leaves_with_names(deltas.thetas)}
  about = {
    "fingerprint": deltas.fingerprint,
    "labels": dict(validate.leaves_with_names(deltas.labels)),
    "moving": sorted(leaves),
  }
  ids = deltas.ids or ()
  with delta_index.writing(folder, wait):
    index = _index_for_writing(folder, about)
    if not overwrite and (here := np.flatnonzero(index.find(ids) >= 0)).size:
      raise ValueError(
        f"{folder} has {here.size} of these ids already, the first being {ids[here[0]]!r}. Pass "
        "overwrite=True to replace them."
      )
    delta_index.remove_unused(folder, index)
    row_bytes = sum(x.nbytes // len(x) for x in leaves.values())
    each = max(1, shard_bytes // max(1, row_bytes))
    number = index.about["next"]
    for start in range(0, len(ids), each):
      part = {path: x[start : start + each] for path, x in leaves.items()}
      tensors = _shard(ids[start : start + each], part, phi, dtype)
      path = shard_path(folder, number + start // each)
      delta_index.publish(path, tensors, {"about": json.dumps(_ABOUT)})
    tasks = np.arange(len(ids))
    places = np.stack([number + tasks // each, tasks % each], 1).astype(np.uint32)
    index = index.updated(ids, places, int(places[-1, 0]) + 1)
    delta_index.write_index(folder, index)
    delta_index.remove_unused(folder, index)


_ABOUT = {"format": delta_index.FORMAT, "what": "a shard of shrinkmeta deltas"}


def _check_deltas_and_dtype(deltas: Any, dtype: Any) -> None:
  """Raise an error unless the deltas have ids, fit their phi and can be stored in this dtype."""
  check_deltas("deltas", deltas)
  if deltas.ids is None:
    raise ValueError("deltas is anonymous: save the Deltas that still have their ids.")
  for path, leaf in validate.leaves_with_names(deltas.thetas, "phi"):
    want = deltas.fingerprint[path].rpartition(" ")[0]
    if (got := f"{leaf.dtype.name}{list(leaf.shape[1:])}") != want:
      raise ValueError(f"deltas has {got} for each task, where {path} was {want}.")
    check_finite(f"deltas.thetas at {path}", np.asarray(leaf), deltas.ids)
  if not isinstance(dtype, (str, type(None))) or dtype not in PARTS:
    raise ValueError(f'dtype must be None, "bfloat16" or "int8"; got {dtype!r}.')


def _index_for_writing(folder: pathlib.Path, about: Mapping[str, Any]) -> Index:
  """Return the folder's index after checks, or write and return a new one if there is none."""
  try:
    index = delta_index.read_index(folder)
  except FileNotFoundError:
    if delta_index.has_shards(folder):
      raise FileNotFoundError(
        f"{folder} has shards and no {delta_index.INDEX}: it was deleted. Bring it back, or name "
        "another folder. Nothing was written."
      ) from None
    delta_index.write_index(folder, index := delta_index.empty_index(about))
    return index
  if index.num_tasks == 0:  # left by a save that failed: it holds nothing of another phi
    return index._replace(about=index.about | about)
  check_fingerprint(index.about["fingerprint"], about["fingerprint"], f"The deltas in {folder}")
  for field in ("labels", "moving"):
    if index.about[field] != about[field]:
      raise ValueError(
        f"The deltas in {folder} have other {field}: {index.about[field]}; these have "
        f"{about[field]}. Save them to another folder."
      )
  return index


def _shard(
  ids: Sequence[TaskId],
  leaves: Mapping[str, np.ndarray],
  phi: Mapping[str, np.ndarray],
  dtype: Rounding | None,
) -> dict[str, np.ndarray]:
  """Return the tensors of one shard, checksums included."""
  tensors, columns = {}, []
  texts = [delta_index.encoded(task) for task in ids]
  for path in sorted(leaves):
    parts = rounded_parts(path, leaves[path], phi.get(path), dtype)
    columns.append(_checksums(texts, path, parts))
    tensors |= {f"{name}/{path}": x for name, x in zip(PARTS[dtype], parts, strict=True)}
  return tensors | {"crc32": np.stack(columns, 1)}


def _checksums(texts: Sequence[bytes], path: str, parts: Sequence[np.ndarray]) -> np.ndarray:
  """Return the CRC-32 [K] uint32 of each task's id, path and bytes.

  The id and the path reveal bytes that belong to another task or leaf.
  """
  name = b"\0" + path.encode("utf-8", "surrogatepass") + b"\0"
  sums = [zlib.crc32(name, zlib.crc32(text)) for text in texts]
  for x in parts:
    little = np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"), copy=False))
    rows = little.reshape(len(texts), math.prod(x.shape[1:])).view(np.uint8)
    sums = [zlib.crc32(row.data, total) for row, total in zip(rows, sums, strict=True)]
  return np.array(sums, np.uint32)


def load_deltas(
  folder: str | os.PathLike[str], state: MetaState, ids: Iterable[TaskId] | None = None
) -> Deltas:
  """Load tasks from a folder, reading only the bytes of these tasks from the shards.

  The index stays in memory between calls: for each task about 30 bytes and the id. It is read again
  after it has changed.

  Args:
    folder: a folder that `save_deltas` wrote.
    state: the state from which the tasks were adapted.
    ids: the tasks to load, in this order. None loads all tasks, in the order of their first save.

  Returns:
    Deltas of these tasks, equal to the saved ones to the bit if nothing was rounded.

  Raises:
    KeyError: the folder does not have an id.
    ValueError: the folder belongs to another phi or other constants, which the message names. Or
      the folder holds no task or has files that are not deltas. Or `ids` has repetitions.
    OSError: a file is missing, damaged or truncated. The message names the file and the tensor.
    ImportError: safetensors is not installed.

  Example:
    >>> import pytest; _ = pytest.importorskip("safetensors")
    >>> import tempfile, jax.numpy as jnp, shrinkmeta as sm
    >>> learner = sm.maml(sm.gaussian(lambda p, x: x * p["w"]), {"w": "w"})
    >>> state = learner.init({"w": 0.0})
    >>> own = sm.deltas(learner, state, {"w": jnp.array([1.0, 2.0])}, ["ann", "bob"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   sm.save_deltas(folder, own)
    ...   sm.load_deltas(folder, state).ids
    ('ann', 'bob')
  """
  check_state("state", state)
  delta_index.safetensors()
  folder = local_path("folder", folder).absolute()
  wanted = None if ids is None else task_ids("ids", ids)
  if wanted is not None and len(set(wanted)) < len(wanted):
    raise ValueError("ids has repetitions: name each task once, and repeat it in `index`.")
  prints = fingerprint(state)
  while True:
    index = delta_index.read_index(folder)
    try:
      return _load(folder, index, state, prints, wanted)
    except FileNotFoundError:  # a writer has replaced this shard meanwhile, or the shard is lost
      if delta_index.read_index(folder).about["next"] == index.about["next"]:
        raise


def _load(
  folder: pathlib.Path,
  index: Index,
  state: MetaState,
  prints: Mapping[str, str],
  wanted: tuple[TaskId, ...] | None,
) -> Deltas:
  """Load tasks by an index that has been read, for `load_deltas`."""
  check_fingerprint(index.about["fingerprint"], prints, f"The deltas in {folder}")
  if index.num_tasks == 0:
    raise ValueError(f"{folder} holds no task yet. Save some with sm.save_deltas.")
  ids = index.ids() if wanted is None else wanted
  positions = np.arange(len(ids)) if wanted is None else index.find(ids)
  if (positions < 0).any():
    known = {task for task, at in zip(ids, positions, strict=True) if at >= 0}
    check_known(ids, known, f"{folder}, which holds {index.num_tasks} tasks")
  shared = dict(validate.leaves_with_names(state.phi))
  phi = {path: np.asarray(shared[path]) for path in index.about["moving"]}
  leaves = {p: np.empty([len(ids), *x.shape], x.dtype) for p, x in phi.items()}
  places = index.places[positions]
  by_place = np.lexsort((places[:, 1], places[:, 0]))
  cuts = np.flatnonzero(np.diff(places[by_place, 0])) + 1
  for group in np.split(by_place, cuts):  # the tasks of one shard, in the order of its rows
    path = shard_path(folder, int(places[group[0], 0]))
    _read_shard(path, places[group, 1], [ids[i] for i in group], phi, group, leaves)
  thetas = jax.device_put(with_structure(state.phi, leaves))
  labels = jax.tree_util.tree_map_with_path(
    lambda at, _: index.about["labels"][validate.path_name(at)], state.phi
  )
  return Deltas(thetas, About(ids, labels, prints))


def _read_shard(
  file: pathlib.Path,
  rows: np.ndarray,
  ids: Sequence[TaskId],
  phi: Mapping[str, np.ndarray],
  into: np.ndarray,
  leaves: Mapping[str, np.ndarray],
) -> None:
  """Read K rows of a shard, check them, and write them to leaves[path][into].

  Args:
    file: the shard.
    rows: the rows to read, [K], ascending.
    ids: the ids of their tasks, K of them.
    phi: {path: phi}.
    into: the positions of the tasks on the first axis of `leaves`, [K].
    leaves: {path: array [T, ...]}, which is changed.
  """
  library = delta_index.safetensors()
  texts = [delta_index.encoded(task) for task in ids]
  runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # one slice for each run
  slices = [slice(int(run[0]), int(run[-1]) + 1) for run in runs]
  name = "its header"
  try:
    # With "pread" safetensors 0.8.0 reads a whole tensor for one of its rows; "mmap" does not.
    with library.safe_open(file, "np", backend="mmap") as opened:
      names = set(opened.keys())
      if "crc32" not in names:
        raise ValueError(f"{file} is no shard of deltas: it has no tensor 'crc32'.")
      sums = _rows(opened, name := "crc32", slices)
      for column, path in enumerate(phi):
        stored = [p for p in ("theta", "difference", "scale") if f"{p}/{path}" in names]
        name = f"{(stored or ['theta'])[0]}/{path}"
        parts = [_rows(opened, f"{part}/{path}", slices) for part in stored]
        theta = theta_of(parts, tuple(stored), phi[path])
        if theta is None:
          found = [f"{x.dtype}{list(x.shape[1:])}" for x in parts]
          raise OSError(f"{file} is damaged: tensor {name!r} is {found or 'missing'}.")
        wrong = np.flatnonzero(_checksums(texts, path, parts) != sums[:, column])
        if wrong.size:
          raise OSError(
            f"{file} is damaged: tensor {name!r}, row {int(rows[wrong[0]])}, which is task "
            f"{ids[wrong[0]]!r}, has another checksum ({wrong.size} such tasks). Bring back a "
            "whole copy, or adapt these tasks again and save them with overwrite=True."
          )
        leaves[path][into] = theta
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{file}, which the index names, is missing: bring it back.") from error
  except (library.SafetensorError, IndexError) as error:
    raise OSError(
      f"{file} is damaged or truncated, at {name}: {error}. Bring back a whole copy."
    ) from error


def _rows(opened: Any, name: str, slices: Sequence[slice]) -> np.ndarray:
  """Return rows of a tensor as one array; ascending slices of the first axis choose them."""
  tensor = opened.get_slice(name)
  shape, last = tensor.get_shape(), slices[-1].stop - 1
  if not shape or shape[0] <= last:
    raise IndexError(f"tensor {name!r} has shape {shape} and lacks row {last}")
  return np.concatenate([tensor[rows] for rows in slices])
