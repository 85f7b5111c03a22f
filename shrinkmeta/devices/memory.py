"""What a compiled program needs of a device, by XLA's own analysis: memory and work."""

from typing import NamedTuple

import jax


class ProgramCost(NamedTuple):
  """What one call of a compiled program takes on one device, by XLA's analysis."""

  arguments: int  # bytes
  outputs: int  # bytes, those that take the place of a donated argument left out
  temporaries: int  # bytes
  flops: float

  @property
  def bytes(self) -> int:
    """All that must fit at once."""
    return self.arguments + self.outputs + self.temporaries

  def __str__(self) -> str:
    mega = lambda count: f"{count / 1e6:,.1f} MB"
    return (
      f"{mega(self.bytes)} a device (arguments {mega(self.arguments)}, outputs "
      f"{mega(self.outputs)}, temporaries {mega(self.temporaries)}), {self.flops / 1e9:,.2f} GFLOP"
    )


def program_cost(compiled: jax.stages.Compiled) -> ProgramCost | None:
  """Memory and work of `jax.jit(f).lower(...).compile()`; None where the backend does not tell.

  XLA counts a loop's body once, so that the flops of programs with loops are a lower bound.
  """
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
