"""Reads data from pickles without running what a pickle may ask for.

A pickle is a program. Here it can make numbers, text, bytes, lists, tuples, dicts and NumPy arrays
of these, and nothing else: arrays are rebuilt by this file, not by functions that the pickle names.
"""

import math
import os
import pickle
import re
from typing import Any

import numpy as np

_DTYPE = re.compile(r"[<>|=]?(?:[biuf](?:1|2|4|8)|[SU]\d{1,6}|O8?)")


def load(path: str | os.PathLike[str]) -> Any:
  """The content of a pickle of Python 2 or 3.

  Strings of Python 2 come as str, a byte a character.

  Raises:
    ValueError: the pickle asks for anything but plain data, or is broken.
    OSError: it cannot be opened.
  """
  with open(path, "rb") as file:
    try:
      return _finished(_Unpickler(file, encoding="latin1").load())
    except _Refused as error:
      raise ValueError(
        f"{os.fspath(path)} asks for {error}, and only plain data and NumPy arrays are read from "
        "a pickle. Take it from its original source, or save it anew as such."
      ) from None
    except OSError:
      raise
    except Exception as error:  # a damaged pickle can end in anything
      raise ValueError(
        f"{os.fspath(path)} is no whole pickle: {error!r}. Download it anew."
      ) from error


class _Refused(pickle.UnpicklingError):
  pass


class _Unpickler(pickle.Unpickler):
  def find_class(self, module_name: str, global_name: str, /) -> Any:
    top = module_name.removeprefix("numpy.").replace("_core.", "core.")
    match top, global_name:
      case "numpy", "ndarray":
        return "numpy.ndarray"  # as an argument of _reconstruct, where it means nothing else
      case "numpy", "dtype":
        return _Dtype
      case "core.multiarray", "_reconstruct":
        return _Array
      case "core.multiarray", "scalar":
        return _Scalar
      case "core.numeric", "_frombuffer":
        return _FromBuffer
      case ("_codecs", "encode") | ("builtins" | "__builtin__", "bytes"):
        return _Bytes
    raise _Refused(f"the global {module_name}.{global_name}")


class _Dtype:
  """What pickles make of a dtype: dtype(code, align, copy), then a state with the byte order."""

  def __init__(self, code: Any, *_: Any):
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
      raise _Refused(f"the dtype {code!r}")
    self.dtype = np.dtype(code)

  def __setstate__(self, state: Any) -> None:
    order, subdtype, names, fields = state[1:5]
    if (subdtype, names, fields) != (None, None, None):
      raise _Refused("a structured dtype")
    self.dtype = self.dtype.newbyteorder(order if order in ("<", ">") else "=")


class _Array:
  """_reconstruct(ndarray, shape, code), then a state (version, shape, dtype, fortran, content)."""

  array: np.ndarray

  def __init__(self, *_: Any):
    pass

  def __setstate__(self, state: Any) -> None:
    _, shape, dtype, fortran, content = state
    if not isinstance(dtype, _Dtype):
      raise _Refused(f"an array of dtype {dtype!r}")
    if dtype.dtype.hasobject:  # a list, whose members are plain data or have been refused
      if not isinstance(content, list) or len(content) != math.prod(shape):
        raise ValueError(f"an array of shape {shape} comes with {type(content).__name__}")
      self.array = np.empty(len(content), object)
      self.array[:] = [_finished(member) for member in content]
      self.array = self.array.reshape(shape, order="F" if fortran else "C")
    else:
      content = content.encode("latin1") if isinstance(content, str) else content
      self.array = _from_bytes(content, dtype, shape, bool(fortran))


class _Scalar(_Array):
  def __init__(self, dtype: Any, content: Any = b""):
    self.__setstate__((None, (), dtype, False, content))


class _FromBuffer(_Array):
  def __init__(self, content: Any, dtype: Any, shape: Any, order: str):
    if isinstance(dtype, _Dtype) and dtype.dtype.hasobject:
      raise _Refused("a buffer of objects")
    self.__setstate__((None, shape, dtype, order == "F", content))


class _Bytes:
  """Python 3 writes bytes for Python 2 as _codecs.encode(text, "latin1"), or as bytes()."""

  def __init__(self, text: Any = "", encoding: Any = "latin1"):
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
      raise _Refused(f"the encoding {encoding!r}")
    self.array = text.encode("latin1")

  def __setstate__(self, state: Any) -> None:
    raise _Refused("a state of bytes")  # without this method it would be set, on the class even


def _from_bytes(content: Any, dtype: _Dtype, shape: Any, fortran: bool) -> np.ndarray:
  content = content.array if isinstance(content, _Bytes) else content
  flat = np.frombuffer(content, dtype.dtype, count=math.prod(shape))
  return flat.reshape(shape, order="F" if fortran else "C")


def _finished(value: Any) -> Any:
  """`value` with arrays in place of what stood for them while the pickle ran."""
  if isinstance(value, dict):
    return {_finished(k): _finished(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(_finished(v) for v in value)
  if isinstance(value, _Scalar):
    return value.array[()]
  if isinstance(value, _Array | _Bytes):
    return value.array
  if isinstance(value, _Dtype):
    return value.dtype
  if value is None or isinstance(value, bool | int | float | complex | str | bytes | bytearray):
    return value
  raise _Refused(f"a value of type {type(value).__name__}")
