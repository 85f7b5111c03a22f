"""Does a network learn the same in every framework? A table of losses answers.

    python -m experiments.frameworks

An MLP and a CNN with batch norm, each written in plain functions, flax.linen, flax.nnx, equinox and
haiku, start from the same parameters and are trained by sigma_maml on the same rendered glyphs. By
default an update has 4 tasks.

Without dropout the mathematics is the same, and the losses agree to rounding. With dropout every
framework draws its own masks. The command prints a Markdown table. It leaves out frameworks that
are not installed.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags

from experiments.datasets.characters import writing_systems
from experiments.frameworks import plain, training
from experiments.settings import flags as shared
from experiments.settings import machine

_SEED = shared.seed()
_TASKS = shared.tasks()
_UPDATES = flags.DEFINE_integer("updates", 100, "Updates of phi.", 1)
_KINDS = flags.DEFINE_list("kinds", ["mlp", "cnn"], "Networks: mlp, cnn.")
_DROPOUT = flags.DEFINE_float("dropout", 0.2, "Probability of a dropped feature.", 0.0, 0.9)


def lines(
  kinds: Sequence[Any], updates: int, tasks: int, seed: int, dropout: float
) -> Iterator[str]:
  """Yield the lines of the table, each as soon as it is measured."""
  problem = writing_systems.problem(ways=5, shots=2, queries=2)
  batch_norms: Any = (("batch", 0.0), ("running", 0.0), ("running", dropout))
  inputs: Any = problem.inputs
  yield "| framework | network | batch norm | dropout | loss | minus plain |"
  yield "|---|---|---|---|---|---|"
  for kind, (norm, rate) in itertools.product(kinds, batch_norms):
    shape = plain.Shape(kind, inputs, problem.outputs, dropout=rate)
    params, of_plain = plain.start(shape, seed), float("nan")
    for name, build in training.frameworks().items():
      written = build(shape, params)
      loss, _ = training.train(written, problem, norm, rate > 0, updates, tasks, seed)
      of_plain = loss if name == "plain" else of_plain
      difference = "other masks" if rate and name != "plain" else f"{loss - of_plain:.1e}"
      yield f"| {name} | {kind} | {norm} | {rate:g} | {loss:.6f} | {difference} |"


def main(argv: Sequence[str]) -> None:
  """Read the flags, train, and print the table."""
  shared.no_arguments(argv)
  unknown = set(_KINDS.value) - {"mlp", "cnn"}
  if unknown or not _KINDS.value:
    raise app.UsageError(f"--kinds is a list of mlp and cnn; got {','.join(_KINDS.value)!r}.")
  machine.start_jax(devices=1)
  tasks = shared.or_default(_TASKS, 4)
  for line in lines(_KINDS.value, _UPDATES.value, tasks, _SEED.value, _DROPOUT.value):
    print(line, flush=True)


if __name__ == "__main__":
  app.run(main)
