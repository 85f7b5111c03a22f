"""The kernels and the collectives of an optimised program, read from its text."""

import collections
import math
import re

_COLLECTIVE = re.compile(
  r"= \(?((?:\w+\[[\d,]*\][^\s)]*(?:, )?)+)\)? "
  r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
  r"(?:-start)?\("
)
_FUSED = re.compile(r"^ .* fusion\(.*$", re.MULTILINE)
_NAME = re.compile(r'op_name="[^"]*?([^"/]+)"')
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def collectives(hlo: str) -> list[tuple[str, int]]:
  """Return (kind, bytes of the result on one device) of each collective in `compiled.as_text()`.

  >>> collectives("%a = f32[4,2]{1,0} all-reduce(%x), channel_id=1")
  [('all-reduce', 32)]
  """
  found = []
  for shapes, kind in _COLLECTIVE.findall(hlo):
    sizes = [
      _bytes(dtype) * math.prod(int(n) for n in shape.split(",") if n)
      for dtype, shape in _SHAPE.findall(shapes)
    ]
    found.append((kind, sum(sizes)))
  return found


def kernels(hlo: str) -> collections.Counter[str]:
  """Count the fused operations of `compiled.as_text()`, by the last operation of JAX in each.

  XLA's CPU compiler writes a function for LLVM for each of them, unless two are equal.

  >>> dict(kernels('  %a = f32[4] fusion(%x), kind=kLoop, metadata={op_name="jit(f)/exp"}'))
  {'exp': 1}
  """
  names = (_NAME.search(line) for line in _FUSED.findall(hlo))
  return collections.Counter("unnamed" if name is None else name[1] for name in names)


def _bytes(dtype: str) -> int:
  """Return the bytes of one element: 4 for f32, 1 for pred."""
  bits = _BITS.search(dtype)
  return 1 if bits is None else max(1, int(bits.group()) // 8)
