"""Files that are written whole or not at all, strict JSON, and the stages of a run."""

import contextlib
import csv
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from absl import logging

Path: TypeAlias = str | os.PathLike[str]

_PACKAGES = ("shrinkmeta", "jax", "jaxlib", "flax", "optax", "numpy")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[pathlib.Path]:
  """Yield a temporary path that replaces `path` if the body succeeds, and else is removed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Beside its target: os.replace is atomic within one file system only.
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
  """Return the versions of the packages that results depend on."""

  def version(package: str) -> str:
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return "not installed"  # e.g. shrinkmeta run from its checkout

  return {package: version(package) for package in _PACKAGES}


def environment() -> dict[str, Any]:
  """Return the versions and the device of this process."""
  import jax  # here alone, because experiments.mixed writes files without it

  device = jax.devices()[0]
  return {
    "python": platform.python_version(),
    **versions(),
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.device_count(),
    "system": f"{platform.system()} {platform.machine()}",
  }


def write_document(path: Path, content: Mapping[str, Any]) -> None:
  """Write `content` and `environment()` to a JSON file, whole or not at all."""
  text = strict_json({**content, "environment": environment()}, indent=2)
  with atomic(path) as temporary:
    temporary.write_text(text + "\n", encoding="utf-8")


def write_table(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
  """Write records with the same keys as a CSV file, whole or not at all."""
  with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def begin_run(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Write `about` to run.json in a folder, or raise ValueError if the folder holds another run."""
  about = json.loads(strict_json(about))
  file = folder / "run.json"
  if not file.exists():
    write_document(file, about)
    return
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{file} cannot be read: {error}. Choose another --out.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{file} describes no run. Choose another --out.")
  if different := [name for name, value in about.items() if found.get(name) != value]:
    raise ValueError(
      f"{folder} holds a run that differs in {', '.join(different)}. Choose another --out, or "
      "remove the folder."
    )


def stage(file: pathlib.Path, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
  """Return the content of a JSON file; if it is missing or damaged, compute and write it first."""
  if (found := _stage_content(file)) is None:
    start = time.perf_counter()
    content = dict(compute())
    content["seconds"] = time.perf_counter() - start
    logging.info("%s: %.0f seconds", file, content["seconds"])
    write_document(file, content)
    found = json.loads(file.read_text(encoding="utf-8"))
  return {name: value for name, value in found.items() if name != "environment"}


def _stage_content(file: pathlib.Path) -> dict[str, Any] | None:
  """Return the content of a stage's file; None, with a warning, if it is damaged."""
  if not file.exists():
    return None
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    logging.warning("%s cannot be read: %s. Making it again.", file, error)
    return None
  if not isinstance(found, dict) or not {"environment", "seconds"} <= set(found):
    logging.warning("%s is no result of a stage. Making it again.", file)
    return None
  return found


def read_result(path: pathlib.Path, form: str) -> dict[str, Any]:
  """Return the content of a results.json; raise ValueError unless its "format" is `form`."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}.") from error
  if not isinstance(found, dict) or found.get("format") != form:
    command = form.removeprefix("shrinkmeta.").partition("/")[0]
    raise ValueError(f"{path} is no result of {command}. Wanted format {form!r}.")
  return found


def strict_json(content: Mapping[str, Any], indent: int | None = None) -> str:
  """Return JSON in which numbers that are not finite are null, because JSON lacks them.

  NumPy's scalars and arrays become numbers and lists, and paths become text.
  """

  def clean(value: Any) -> Any:
    if hasattr(value, "__array__"):  # of NumPy or JAX
      value = np.asarray(value).tolist()
    if isinstance(value, os.PathLike):
      return os.fspath(value)
    if isinstance(value, float):
      return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
      return {key: clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value

  return json.dumps(clean(content), indent=indent, allow_nan=False)


def fingerprint(tree: Any) -> str:
  """Return a checksum of the arrays in a tree, such as training data."""
  import jax

  total = 0
  for leaf in jax.tree.leaves(tree):
    array = np.ascontiguousarray(leaf)
    total = zlib.crc32(array.view(np.uint8).data, zlib.crc32(repr(array.shape).encode(), total))
  return f"{total:08x}"
