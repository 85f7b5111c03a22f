"""The memory and the operations of a compiled program on one device, as XLA reports them."""

import ctypes
import sys
from typing import NamedTuple

import jax

from shrinkmeta.checks import validate


class ProgramCost(NamedTuple):
  """The memory and the operations that one call of a compiled program needs on one device.

  Attributes:
    arguments: bytes of the arguments.
    outputs: bytes of the outputs, without outputs that reuse the memory of a donated argument.
    temporaries: bytes of the intermediate arrays.
    flops: the number of floating-point operations. It is a lower bound, because XLA counts the body
      of a loop once (docs/hazards.md#loop-flops).

  >>> print(ProgramCost(arguments=3_000_000, outputs=1_000_000, temporaries=0, flops=2e9))
  4.0 MB a device (arguments 3.0 MB, outputs 1.0 MB, temporaries 0.0 MB), at least 2.00 GFLOP
  """

  arguments: int
  outputs: int
  temporaries: int
  flops: float

  @property
  def bytes(self) -> int:
    """The number of bytes that must fit on the device at once."""
    return self.arguments + self.outputs + self.temporaries

  def __str__(self) -> str:
    """Return one line, in megabytes (10^6 bytes) and GFLOP (10^9 operations)."""
    mega = lambda count: f"{count / 1e6:,.1f} MB"
    return (
      f"{mega(self.bytes)} a device (arguments {mega(self.arguments)}, outputs "
      f"{mega(self.outputs)}, temporaries {mega(self.temporaries)}), at least "
      f"{self.flops / 1e9:,.2f} GFLOP"
    )


def program_cost(compiled: jax.stages.Compiled) -> ProgramCost | None:
  """Return the memory and the operations that one call of a compiled program needs.

  Args:
    compiled: the program, the result of `jax.jit(f).lower(...).compile()`.

  Returns:
    A ProgramCost, or None if the backend does not report the memory.

  Raises:
    TypeError: if `compiled` is a function that is not compiled, or another object.

  >>> import jax.numpy as jnp
  >>> program_cost(jax.jit(jnp.cumsum).lower(jnp.ones(256)).compile()).arguments
  1024
  """
  wanted, hint = "a compiled program", "Compile it: jax.jit(f).lower(...).compile()."
  validate.instance("compiled", compiled, jax.stages.Compiled, wanted, hint)
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  flops = float((cost or {}).get("flops", 0.0))
  if memory is None:
    return None
  return ProgramCost(
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.temp_size_in_bytes,
    flops,
  )


def give_back() -> None:
  """Give memory that was freed back to the operating system, if the C library can.

  XLA's compiler frees most of its memory in the end, but glibc keeps that for later allocations:
  0.4 GB after the update of a small network (docs/hazards.md#compiler-memory).
  """
  if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
    trim(0)
