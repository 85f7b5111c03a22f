"""Folders of data, errors for damaged files, and the cache of decoded data."""

import contextlib
import csv
import lzma
import os
import pathlib
import struct
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TypeVar

from absl import logging
from PIL import Image

T = TypeVar("T")
Folder = str | os.PathLike[str]

# What readers of zips, arrays, pictures, sounds and tables raise at damaged files. A flipped bit
# asks for an unknown compression (NotImplementedError), a password (RuntimeError), or all memory
# (docs/hazards.md#archive-errors).
_BROKEN = (
  *(OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, OverflowError),
  *(TypeError, AttributeError, SyntaxError, struct.error, tokenize.TokenError, csv.Error),
  *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, Image.DecompressionBombError),
)


class DamagedError(ValueError):
  """A file differs from the published one; the message names it."""


def data_folder(name: str, data_dir: Folder | None) -> pathlib.Path:
  """Return `data_dir`, or the folder `name` in $SHRINKMETA_DATA if `data_dir` is None."""
  if data_dir is not None:
    return pathlib.Path(data_dir).expanduser()
  if root := os.environ.get("SHRINKMETA_DATA"):
    return pathlib.Path(root).expanduser() / name
  raise FileNotFoundError(
    f"Where is {name}? Give data_dir, its folder, or set SHRINKMETA_DATA to the folder above it."
  )


@contextlib.contextmanager
def damaged(what: object) -> Iterator[None]:
  """Turn any error of a damaged file into a DamagedError that begins with `what`, its path.

  DamagedError, and errors of a file that cannot be opened, pass unchanged: they name the file.
  """
  try:
    yield
  except DamagedError:
    raise
  except _BROKEN as error:
    if isinstance(error, OSError) and error.filename is not None:
      raise
    raise DamagedError(f"{what}: damaged or not whole, {error!r}. Download it anew.") from error


def read_member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
  """Return a member of a zip; raise ValueError if it would unpack to more than `most` bytes."""
  size = archive.getinfo(name).file_size  # zipfile reads no more than this size
  if size > most:
    raise ValueError(f"{name} would take {size} bytes where {most} are more than enough")
  return archive.read(name)


def read_csv(path: pathlib.Path, columns: Sequence[str]) -> list[dict[str, str]]:
  """Return the rows of a table; its header must have `columns`, and may have others."""
  try:
    with damaged(path), path.open(newline="", encoding="utf-8-sig") as file:
      header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{path} does not exist. Give another data_dir.") from error
  if not set(columns) <= set(header):
    raise DamagedError(
      f"{path} wants columns under the header {','.join(columns)}; got {','.join(header)!r:.200}. "
      "Download it anew."
    )
  for row in rows:
    if len(row) != len(header):
      raise DamagedError(
        f"{path} wants {len(header)} columns in each row; got {row!r:.200}. Download it anew."
      )
  return [dict(zip(header, row, strict=True)) for row in rows]


def cached(
  cache_dir: Folder | None,
  filename: str,
  build: Callable[[], T],
  read: Callable[[pathlib.Path], T],
  write: Callable[[pathlib.Path, T], None],
) -> T:
  """Return `build()`, cached as `filename` in `cache_dir`.

  Args:
    cache_dir: a folder, created if it is missing. None stands for `shrinkmeta` in $XDG_CACHE_HOME
      or ~/.cache. "" switches the cache off.
    filename: names everything on which the result depends.
    build: called if the file is missing, or cannot be read (with a warning).
    read, write: read and write a path; `replace` makes the writing atomic.

  Returns:
    The result of `build`. If the folder cannot be written to, a warning says so.
  """
  if cache_dir == "":
    return build()
  if cache_dir is None:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    cache_dir = os.path.join(root, "shrinkmeta")
  path = pathlib.Path(cache_dir).expanduser() / filename
  try:
    return read(path)
  except FileNotFoundError:
    pass
  except _BROKEN as error:
    logging.warning("Cannot use the cache %s, building its content anew: %s", path, error)
  result = build()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, result)
  except OSError as error:
    logging.warning("Cannot write the cache %s, so the next start is slow too: %s", path, error)
  return result


def replace(path: pathlib.Path, write: Callable[[IO[bytes]], None]) -> None:
  """Write a file whole or not at all, since a rename within a folder is atomic."""
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    with partial.open("wb") as file:
      write(file)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
