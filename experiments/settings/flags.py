"""The flags that commands share; a flag means the same in every command that has it.

A command calls one function for each of its flags. A flag with the default None takes a default of
the command, which the text at the head of its --help names.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from absl import app, flags

from experiments.settings import algorithms as names
from experiments.settings import paths, tables

if TYPE_CHECKING:
  from experiments.settings import machine

T = TypeVar("T")
Text = flags.FlagHolder[str | None]
Texts = flags.FlagHolder[list[str] | None]

_SEEDS = 2**32  # the number of seeds: jax.random.key takes only the last 32 bits of a larger one


def algorithm() -> Text:
  """Define --algorithm, for commands that run one algorithm."""
  return flags.DEFINE_string("algorithm", None, "The algorithm. Default: see the text at the top.")


def algorithms() -> Texts:
  """Define --algorithms."""
  return flags.DEFINE_list(
    "algorithms",
    None,
    f"Names from {', '.join(names.ALL)}, or all. Default: see the text at the top.",
  )


def compilation_cache() -> Text:
  """Define --compilation_cache."""
  return paths.define(
    "compilation_cache",
    "Folder of compiled programs for later runs; default in ~/.cache/shrinkmeta. An empty name "
    "switches it off.",
  )


def data_dir() -> Text:
  """Define --data_dir."""
  return paths.define("data_dir", "Folder of the data set; default $SHRINKMETA_DATA/NAME.")


def out() -> Text:
  """Define --out."""
  return paths.define("out", "Folder or file of the results. Default: see the text at the top.")


def open_page() -> flags.FlagHolder[bool]:
  """Define --open."""
  return flags.DEFINE_bool("open", False, "Opens the page in a browser once it is written.")


def seed() -> flags.FlagHolder[int]:
  """Define --seed, for commands that run one seed."""
  return flags.DEFINE_integer(
    "seed", 0, "Seed of all random draws.", lower_bound=0, upper_bound=_SEEDS - 1
  )


def seeds() -> Texts:
  """Define --seeds."""
  return flags.DEFINE_list(
    "seeds",
    None,
    "One seed for each run; it fixes parameters and training tasks. Default: see the top.",
  )


def changes() -> flags.FlagHolder[list[str]]:
  """Define --set."""
  return flags.DEFINE_multi_string(
    "set", [], "A changed setting, such as --set=meta_steps=100. It may be given several times."
  )


def split() -> flags.FlagHolder[str]:
  """Define --split."""
  return flags.DEFINE_enum(
    "split", "test", ["test", "validation"], "Tasks to adapt to. Use validation to choose settings."
  )


def table() -> flags.FlagHolder[str]:
  """Define --table."""
  return flags.DEFINE_enum(
    "table", "sinusoid", list(tables.TABLES), "The table of data and settings."
  )


def table_size() -> flags.FlagHolder[str]:
  """Define --size."""
  return flags.DEFINE_enum(
    "size", "cpu", list(tables.SIZES), "The size of the table, for a kind of machine."
  )


def tasks() -> flags.FlagHolder[int | None]:
  """Define --tasks."""
  return flags.DEFINE_integer("tasks", None, "Tasks in an update. Default: see the top.", 1)


def define_processes() -> None:
  """Define the four flags that `processes` reads."""
  flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for several processes.")
  flags.DEFINE_integer("num_processes", None, "The number of processes of this run.")
  flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
  flags.DEFINE_bool(
    "distributed", False, "Whether SLURM, MPI or a Cloud TPU pod started several processes."
  )


def processes() -> "machine.Processes":
  """Return the values of the flags of `define_processes`; raise UsageError if one is missing."""
  from experiments.settings import machine  # imports JAX, which experiments.mixed does without

  values = flags.FLAGS
  by_hand = (values.coordinator_address, values.num_processes, values.process_id)
  if any(x is not None for x in by_hand) and (None in by_hand or values.distributed):
    raise app.UsageError(
      "--coordinator_address, --num_processes and --process_id go together, or --distributed "
      f"alone; got {by_hand} and --distributed={values.distributed}."
    )
  return machine.Processes(*by_hand, detect=values.distributed)


def no_arguments(argv: Sequence[str]) -> None:
  """Raise UsageError if the command line has anything but flags."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")


@contextlib.contextmanager
def usage() -> Iterator[None]:
  """Report an error in flags, settings or data as one line without a traceback."""
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    raise app.UsageError(str(error)) from error


def parse_seeds(texts: Sequence[str]) -> list[int]:
  """Return the numbers of --seeds; raise ValueError if one is no seed or occurs twice."""
  try:
    seeds = [int(text) for text in texts]
  except ValueError:
    seeds = []
  in_range = all(0 <= seed < _SEEDS for seed in seeds)
  if not seeds or not in_range or len(set(seeds)) < len(seeds):
    raise ValueError(
      "--seeds wants whole numbers, each of them once, as in --seeds=0,1; got "
      f"{','.join(texts)!r}. The smallest is 0 and the largest {_SEEDS - 1}."
    )
  return seeds


def or_default(flag: flags.FlagHolder[T | None], default: T) -> T:
  """Return the value that was given, or the command's default if none was."""
  return default if flag.value is None else flag.value
