"""The index of a folder of deltas, which names the shard and the row of each task.

The index is one safetensors file. A save writes new shards and then replaces the index. So a reader
sees the old index or the new one, and never a part of a save.

  keys    [K] uint64     a hash of each id, for the search of ids
  places  [K, 2] uint32  the number of the shard, and the row in the shard
  ends    [K] uint64     where the text of each id ends in `text`
  text    [B] uint8      all ids, UTF-8: "s" before a string, "i" before an integer

The metadata of the file describe the tasks (`about`, JSON) and hold a SHA-256 of `about` and of all
arrays.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.serving.deltas import TaskId

FORMAT = 1  # increase it with every change that older code cannot read
INDEX, LOCK = "deltas.index.safetensors", "deltas.lock"
_SHARD = re.compile(r"deltas-(\d{10})\.safetensors(\.tmp)?")
_ARRAYS = ("keys", "places", "ends", "text")


class Index(NamedTuple):
  """The index of K tasks, in the order in which they were first saved."""

  about: dict[str, Any]  # format, fingerprint, labels, moving: [path], next: a free shard number
  keys: np.ndarray  # [K] uint64
  places: np.ndarray  # [K, 2] uint32
  ends: np.ndarray  # [K] uint64
  text: np.ndarray  # [B] uint8
  order: np.ndarray  # [K] uint32: keys[order] is sorted; not in the file

  @property
  def num_tasks(self) -> int:
    """The number of tasks K."""
    return len(self.keys)

  def id_text(self, position: int) -> bytes:
    """Return the text of the id at a position."""
    start = int(self.ends[position - 1]) if position else 0
    return self.text[start : int(self.ends[position])].tobytes()

  def ids(self) -> tuple[TaskId, ...]:
    """Return all ids, in order."""
    return tuple(_decoded(self.id_text(i)) for i in range(self.num_tasks))

  def find(self, ids: Sequence[TaskId]) -> np.ndarray:
    """Return the positions of N ids in the index, [N] int64, -1 for unknown ids."""
    texts = [encoded(task) for task in ids]
    keys = _keys(texts)
    first = np.searchsorted(self.keys, keys, sorter=self.order)
    found = np.full(len(texts), -1, np.int64)
    for i, text in enumerate(texts):
      at = int(first[i])
      while at < self.num_tasks and self.keys[position := int(self.order[at])] == keys[i]:
        if self.id_text(position) == text:
          found[i] = position
          break
        at += 1  # another id with the same hash
    return found

  def updated(self, ids: Sequence[TaskId], places: np.ndarray, next_shard: int) -> "Index":
    """Return the index after tasks were written to `places` [N, 2].

    Known ids get their new place. New ids are appended.
    """
    positions = self.find(ids)
    old = self.places.copy()
    old[positions[positions >= 0]] = places[positions >= 0]
    new = positions < 0
    texts = [encoded(task) for task, is_new in zip(ids, new, strict=True) if is_new]
    lengths = np.array([len(text) for text in texts], np.uint64)
    return _sorted(
      self.about | {"next": next_shard},
      np.concatenate([self.keys, _keys(texts)]),
      np.concatenate([old, places[new].astype(np.uint32)]),
      np.concatenate([self.ends, np.uint64(len(self.text)) + np.cumsum(lengths, dtype=np.uint64)]),
      np.concatenate([self.text, np.frombuffer(b"".join(texts), np.uint8)]),
    )


def empty_index(about: Mapping[str, Any]) -> Index:
  """Return an index without tasks."""
  none = lambda *shape: np.zeros(shape, np.uint64)
  about = dict(about) | {"format": FORMAT, "next": 0}
  return _sorted(about, none(0), none(0, 2).astype(np.uint32), none(0), none(0).astype(np.uint8))


def _sorted(
  about: dict[str, Any], keys: np.ndarray, places: np.ndarray, ends: np.ndarray, text: np.ndarray
) -> Index:
  order = np.argsort(keys, kind="stable").astype(np.uint32)
  return Index(about, keys, places, ends, text, order)


def encoded(task: TaskId) -> bytes:
  """Return the text of an id; the string "1" and the integer 1 have different texts."""
  return (f"s{task}" if isinstance(task, str) else f"i{task}").encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> TaskId:
  rest = text[1:].decode("utf-8", "surrogatepass")
  return rest if text[:1] == b"s" else int(rest)


def _keys(texts: Sequence[bytes]) -> np.ndarray:
  hashes = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
  return np.frombuffer(hashes, "<u8").astype(np.uint64)


def shard_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Return the path of a shard; its name reveals no id."""
  return folder / f"deltas-{number:010d}.safetensors"


def write_index(folder: pathlib.Path, index: Index) -> None:
  """Replace the index of the folder in one step."""
  arrays = {name: getattr(index, name) for name in _ARRAYS}
  about = json.dumps(index.about, sort_keys=True)
  publish(folder / INDEX, arrays, {"about": about, "sha256": _digest(about, arrays)})


def read_index(folder: pathlib.Path) -> Index:
  """Return the index of the folder, from memory if its file has not changed since the last read.

  The header holds a checksum of the whole file. So another header means that the file has changed.

  Raises:
    FileNotFoundError: the folder has no index.
    OSError: the index is damaged or truncated.
    ValueError: the file is not an index of deltas, or has a newer format.
  """
  path = folder / INDEX
  try:
    with path.open("rb") as file:
      header = file.read(min(int.from_bytes(file.read(8), "little"), 1 << 27))
      size = os.fstat(file.fileno()).st_size
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{path} does not exist: {folder} holds no deltas. Name a folder that sm.save_deltas wrote."
    ) from error
  return _read_index(path, header, size)


@functools.lru_cache(maxsize=4)
def _read_index(path: pathlib.Path, header: bytes, size: int) -> Index:
  del header, size  # keys of the cache: they differ between versions of the file
  library = safetensors()
  try:
    with library.safe_open(path, "np") as file:
      metadata, names = file.metadata() or {}, set(file.keys())
      arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in names}
  except library.SafetensorError as error:
    raise OSError(f"{path} is damaged or truncated: {error}. Bring back a whole copy.") from error
  if not {"about", "sha256"} <= metadata.keys() or len(arrays) < len(_ARRAYS):
    raise ValueError(
      f"{path} is no index of deltas: it has the tensors {sorted(names)} and the metadata "
      f"{sorted(metadata)}. Name a folder that sm.save_deltas wrote."
    )
  if metadata["sha256"] != _digest(metadata["about"], arrays):
    raise OSError(f"{path} is damaged: its checksum differs. Bring back a whole copy.")
  about = json.loads(metadata["about"])
  if about["format"] > FORMAT:
    raise ValueError(
      f"{path} has format {about['format']}; this shrinkmeta reads formats up to {FORMAT}. "
      "Install a newer one."
    )
  return _sorted(about, *(arrays[name] for name in _ARRAYS))


def _digest(about: str, arrays: Mapping[str, np.ndarray]) -> str:
  total = hashlib.sha256(about.encode())
  for name in _ARRAYS:
    x = np.ascontiguousarray(arrays[name])
    total.update(f"{name} {x.dtype.name} {x.shape} ".encode())
    total.update(x.reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def publish(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
  """Write a safetensors file under a temporary name, wait until it is on disk, and rename it.

  So a file called `path` is always whole. Arrays are made contiguous first, because safetensors
  0.8.0 writes transposed, Fortran-ordered or sliced arrays in the wrong order without an error
  (docs/hazards.md#safetensors-layout).
  """
  library = safetensors()
  temporary = path.with_name(path.name + ".tmp")
  try:
    plain = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    library.numpy.save_file(plain, temporary, dict(metadata))
    _synchronise(temporary)
    os.replace(temporary, path)
    _synchronise(path.parent)
  except (OSError, library.SafetensorError) as error:
    raise OSError(
      f"{path} could not be written: {error}. Nothing that was saved before is lost. Free space or "
      "choose another folder, and save again."
    ) from error


def _synchronise(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def remove_unused(folder: pathlib.Path, index: Index) -> None:
  """Delete shards that the index does not name: left by killed saves, or overwritten."""
  used = set(np.unique(index.places[:, 0]).tolist())
  for path in folder.iterdir():
    match = _SHARD.fullmatch(path.name)
    if match and (match[2] or int(match[1]) not in used):
      path.unlink(missing_ok=True)


def has_shards(folder: pathlib.Path) -> bool:
  """Return whether the folder has a shard."""
  return any(_SHARD.fullmatch(path.name) for path in folder.iterdir())


@contextlib.contextmanager
def writing(folder: pathlib.Path, wait: float) -> Iterator[None]:
  """Hold the folder's lock, so that one process writes at a time; a killed process releases it.

  Args:
    folder: the folder. It is made if it does not exist.
    wait: the longest time to wait for another writer, in seconds.

  Raises:
    TimeoutError: another process still writes after `wait` seconds.
  """
  import fcntl  # POSIX only, and needed by writers only

  if not folder.exists():
    folder.mkdir(parents=True, exist_ok=True)
    _synchronise(folder.parent)
  descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    deadline = time.monotonic() + wait
    while True:
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() >= deadline:
          holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
          raise TimeoutError(
            f"Another process (id {holder or 'unknown'}) is writing to {folder}, and did not end "
            f"within {wait:g} seconds. Nothing was written. Try again, or give a longer `wait`."
          ) from None
        time.sleep(0.01)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    yield
  finally:
    os.close(descriptor)  # releases the lock


def safetensors() -> Any:
  """Return the package safetensors, which is imported at the first read or write."""
  try:
    importlib.import_module("safetensors.numpy")
    return importlib.import_module("safetensors")
  except ImportError as error:
    raise ImportError(
      "Files of deltas need safetensors: pip install 'shrinkmeta[adapters]'."
    ) from error
