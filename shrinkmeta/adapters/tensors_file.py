"""Write arrays as a folder with a file of safetensors."""

import json
import pathlib
import shutil
import uuid
from typing import Any

import numpy as np

from shrinkmeta.checks.kinds import is_key, shown

_DTYPES = (
  *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"),
  *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
)  # of safetensors 0.8.0


def write(
  target: pathlib.Path, file: str, tensors: dict[str, Any], documents: dict[str, Any]
) -> pathlib.Path:
  """Write all files to a temporary folder, and rename it to `target`.

  Args:
    target: the folder to make.
    file: the name of the file of safetensors.
    tensors: {name: array}.
    documents: {name of a file: its contents, as plain data}, which are written as JSON.

  Raises:
    FileExistsError: the folder exists.
    ImportError: safetensors is not installed.
    TypeError: a tensor is no array, or of a dtype that the file cannot hold.
  """
  try:
    from safetensors import numpy as safetensors  # pyright: ignore[reportMissingImports]
  except ImportError as fault:
    raise ImportError(
      "Export needs safetensors: pip install 'shrinkmeta[adapters]', or pip install safetensors."
    ) from fault
  tensors = {name: _array(name, x) for name, x in tensors.items()}
  if target.exists():
    raise FileExistsError(f"folder {str(target)!r} exists. Remove it, or write to another.")
  target.parent.mkdir(parents=True, exist_ok=True)
  draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
  draft.mkdir()
  try:
    safetensors.save_file(tensors, draft / file, metadata={"format": "pt"})
    for name, document in documents.items():
      (draft / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    draft.rename(target)
  except BaseException:  # Ctrl-C included
    shutil.rmtree(draft, ignore_errors=True)
    raise
  return target


def _array(name: str, x: Any) -> np.ndarray:
  """Return a tensor as an array that safetensors writes as it is."""
  array = np.asarray(None if is_key(x) else x)
  if array.dtype.name not in _DTYPES:
    raise TypeError(
      f"The tensor {name!r} must be an array of a dtype that safetensors holds; got {shown(x)}. "
      f"The dtypes are {', '.join(_DTYPES)}."
    )
  # safetensors 0.8.0 writes arrays that are not C-contiguous in the wrong order, without an error
  # (docs/hazards.md#safetensors-layout). `ascontiguousarray` gives a scalar an axis.
  return np.ascontiguousarray(array).reshape(array.shape)
