"""Read data from pickles without running the functions that a pickle names.

A pickle is a program. Here it can only make numbers, text, bytes, lists, tuples, dicts and NumPy
arrays of these. This module rebuilds the arrays itself. A small file cannot take much memory or
time, even if it is damaged or malicious.
"""

import math
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

_DTYPE = re.compile(r"[<>|=]?(?:[biuf](?:1|2|4|8)|[SU]\d{1,6}|O8?)")
_ATOMS = (bool, int, float, complex, str, bytes, bytearray, type(None))

# Of values and bytes; a pickle in which nothing is shared has no more of them than its file.
_TIMES_FILE = 10
_LEAST_LIMIT = 1_000_000


def load(path: str | os.PathLike[str]) -> Any:
  """Return the content of a pickle of Python 2 or 3.

  Strings of Python 2 become str with one character for each byte.

  Raises:
    ValueError: the pickle holds anything but plain data, or is damaged.
    OSError: the file cannot be opened.
  """
  with open(path, "rb") as file:
    limit = max(_TIMES_FILE * os.fstat(file.fileno()).st_size, _LEAST_LIMIT)
    try:
      return _Finish(limit)(_Unpickler(file, encoding="latin1").load())
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


# The unpickler in Python. That in C makes a memo as long as any index that a file names, and sets
# keys itself. This one reads pictures in one array as fast, 200 MB in 0.3 s, and 50,000 arrays of a
# picture each in 2 s instead of 1, a fraction of what it takes to decode them. See
# docs/hazards.md#pickle-memory.
class _Unpickler(pickle._Unpickler):
  dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
  stack: list[Any]
  pop_mark: Callable[[], list[Any]]
  append: Callable[[Any], None]
  read: Callable[[int], bytes]

  def find_class(self, module: str, name: str) -> Any:
    top = module.removeprefix("numpy.").replace("_core.", "core.")
    match top, name:
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
      case ("_codecs", "encode") | ("builtins" | "__builtin__", "bytes" | "bytearray"):
        return _Bytes
    raise _Refused(f"the global {module}.{name}")

  def load_bytearray(self) -> None:  # the original makes room before it reads
    (size,) = struct.unpack("<Q", self.read(8))
    self.append(bytearray(self.read(size)))

  def load_dict(self) -> None:
    items = self.pop_mark()
    self.append({})
    self._set(items)

  def load_setitem(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self._set([key, value])

  def load_setitems(self) -> None:
    self._set(self.pop_mark())

  def _set(self, items: list[Any]) -> None:
    if not isinstance(self.stack[-1], dict):
      raise _Refused(f"items of a {type(self.stack[-1]).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, (*_ATOMS, _Scalar, _Bytes)):  # hashing tuples of tuples takes forever
        raise _Refused(f"a key of type {type(key).__name__}")
      self.stack[-1][key] = value

  def load_refused(self) -> None:
    raise _Refused("an object, a set or a buffer that lies elsewhere")

  dispatch[pickle.BYTEARRAY8[0]] = load_bytearray
  dispatch[pickle.DICT[0]] = load_dict
  dispatch[pickle.SETITEM[0]] = load_setitem
  dispatch[pickle.SETITEMS[0]] = load_setitems
  dispatch |= dict.fromkeys(
    b"".join(
      (pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX)
      + (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.EMPTY_SET, pickle.ADDITEMS)
      + (pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
    ),
    load_refused,
  )


# What stands for arrays while the pickle runs. Each takes as many arguments as it needs and copies
# nothing: a pickle can call it with the same large value every three bytes.


class _Dtype:
  """A dtype in a pickle: dtype(code, align, copy), then a state with the byte order."""

  def __init__(self, code: Any, align: Any = False, copy: Any = True):
    del align, copy
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
      raise _Refused(f"the dtype {code!r:.40}")
    self.dtype = np.dtype(code)

  def __setstate__(self, state: Any) -> None:
    order, subdtype, names, fields = state[1:5]
    if (subdtype, names, fields) != (None, None, None):
      raise _Refused("a structured dtype")
    self.dtype = self.dtype.newbyteorder(order if order in ("<", ">") else "=")


class _Array:
  """An array in a pickle: _reconstruct(ndarray, shape, code), then its state.

  The state is (version, shape, dtype, fortran, content).
  """

  state: tuple[tuple[int, ...], np.dtype, str, Any]  # shape, dtype, order, content

  def __init__(self, kind: Any, shape: Any, code: Any):
    del kind, shape, code

  def __setstate__(self, state: Any) -> None:
    _, shape, dtype, fortran, content = state
    if not isinstance(dtype, _Dtype):
      raise _Refused(f"an array of dtype {type(dtype).__name__}")
    if not isinstance(shape, tuple) or len(shape) > 32:
      raise _Refused("a shape that is none")
    if not all(type(n) is int and 0 <= n <= sys.maxsize for n in shape):
      raise _Refused("a shape of other than sizes")
    self.state = shape, dtype.dtype, "F" if fortran else "C", content


class _Scalar(_Array):
  def __init__(self, dtype: Any, content: Any = b""):
    if isinstance(dtype, _Dtype) and dtype.dtype.hasobject:
      raise _Refused("a scalar that is an object")
    self.__setstate__((None, (), dtype, False, content))


class _FromBuffer(_Array):
  def __init__(self, content: Any, dtype: Any, shape: Any, order: Any):
    if isinstance(dtype, _Dtype) and dtype.dtype.hasobject:
      raise _Refused("a buffer of objects")
    self.__setstate__((None, shape, dtype, order == "F", content))


class _Bytes:
  """Bytes in a pickle that Python 3 wrote for Python 2.

  They are _codecs.encode(text, "latin1") or bytes(). A bytearray is bytearray() of such bytes, and
  becomes bytes here.
  """

  def __init__(self, text: Any = "", encoding: Any = "latin1"):
    text = text.text if isinstance(text, _Bytes) else text
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str | bytes):
      raise _Refused(f"the encoding {encoding!r:.40}")
    self.text = text

  def __setstate__(self, state: Any) -> None:
    raise _Refused("a state of bytes")  # without this method it would be set, on the class even


class _Finish:
  """Replace the placeholders of arrays and bytes once the pickle has run.

  Shared objects are made once. But the caller may unfold them, as `numpy.asarray` does: twenty
  lists, each holding the next one twice, become a million values of 100 bytes. So a shared object
  counts each time it occurs. More than `limit` values and bytes are refused.
  """

  def __init__(self, limit: int):
    self.limit = limit
    self.made: dict[int, tuple[Any, int]] = {}  # id, which lives in the pickle -> (value, size)

  def __call__(self, value: Any) -> Any:
    return self._sized(value)[0]

  def _sized(self, value: Any) -> tuple[Any, int]:
    if isinstance(value, _ATOMS):
      return value, 1
    if id(value) not in self.made:
      self.made[id(value)] = self._make(value)
    return self.made[id(value)]

  def _make(self, value: Any) -> tuple[Any, int]:
    if isinstance(value, dict):
      keys, size_of_keys = self._all(value)
      values, size = self._all(value.values())
      return dict(zip(keys, values, strict=True)), self._allowed(size + size_of_keys)
    if isinstance(value, list | tuple):
      values, size = self._all(value)
      return type(value)(values), size
    if isinstance(value, _Array):
      array, size = self._array(*value.state)
      return array[()] if isinstance(value, _Scalar) else array, size
    if isinstance(value, _Bytes):
      size = self._allowed(len(value.text))
      return value.text.encode("latin1") if isinstance(value.text, str) else value.text, size
    if isinstance(value, _Dtype):
      return value.dtype, 1
    raise _Refused(f"a value of type {type(value).__name__}")

  def _all(self, values: Any) -> tuple[list[Any], int]:
    made, size = [], 1
    for value in values:
      one, size_of_one = self._sized(value)
      made.append(one)
      size = self._allowed(size + size_of_one)
    return made, size

  def _array(self, shape: Any, dtype: np.dtype, order: Any, content: Any) -> tuple[np.ndarray, int]:
    count = math.prod(shape)
    if dtype.hasobject:  # a list, whose members are plain data or are refused
      if not isinstance(content, list) or len(content) != count:
        raise ValueError(f"an array of shape {shape} comes with {type(content).__name__}")
      members, size = self._all(content)
      array = np.empty(count, object)
      array[:] = members
      return array.reshape(shape, order=order), size
    size = self._allowed(1 + count * dtype.itemsize)
    content = self(content) if isinstance(content, _Bytes) else content
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, dtype, count=count).reshape(shape, order=order), size

  def _allowed(self, size: int) -> int:
    if size > self.limit:
      raise _Refused(f"more than {self.limit} values and bytes, much of it shared")
    return size
