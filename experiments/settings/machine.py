"""What the binaries have in common before they work: their flags, and what they tell JAX."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from absl import app, flags


class Processes(NamedTuple):
  """How the processes of one run find each other; a single process by itself by default."""

  coordinator_address: str | None = None  # host:port of process 0
  num_processes: int | None = None
  process_id: int | None = None
  detect: bool = False  # SLURM, MPI, Kubernetes or a Cloud TPU pod tells the three


def define_flags() -> None:
  """The flags of `processes`, for a binary to define where it defines its own."""
  flags.DEFINE_string("coordinator_address", None, "host:port of process 0 of several.")
  flags.DEFINE_integer("num_processes", None, "How many processes run this program together.")
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  flags.DEFINE_bool(
    "distributed", False, "Several processes, started by SLURM, MPI or on a Cloud TPU pod."
  )


def processes() -> Processes:
  """What the flags say; raises UsageError where one of three is missing."""
  values = flags.FLAGS
  by_hand = (values.coordinator_address, values.num_processes, values.process_id)
  if any(x is not None for x in by_hand) and (None in by_hand or values.distributed):
    raise app.UsageError(
      "--coordinator_address, --num_processes and --process_id go together, or --distributed "
      f"alone; got {by_hand} and --distributed={values.distributed}."
    )
  return Processes(*by_hand, detect=values.distributed)


@contextlib.contextmanager
def usage() -> Iterator[None]:
  """Around what is made of flags and data: an error of them is told in a line, not a traceback."""
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    raise app.UsageError(str(error)) from error


def parse_seeds(texts: Sequence[str]) -> list[int]:
  """The numbers of --seeds; ValueError where one is none or comes twice."""
  try:
    seeds = [int(text) for text in texts]
  except ValueError:
    seeds = []
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(
      f"--seeds wants whole numbers, each of them once, as in --seeds=0,1; got {','.join(texts)!r}."
    )
  return seeds


def cores() -> int:
  """Cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# With it XLA orders the operations of a CPU so that some may run at once, and holds more arrays.
# Where every core has a device of its own there is no core to run them.
_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def start_jax(
  devices: int = 0, cache: str | None = None, processes: Processes | None = None
) -> None:
  """Host devices for a CPU, other processes, the cache. Call before anything asks for a device.

  Args:
    devices: host devices over which tasks are split; 0 is one a core. A program of one device
      leaves cores idle inside loops.
    cache: folder of XLA's persistent compilation cache, from which a program compiled before is
      read in place of compiling it again; None is off.
    processes: waits until all of them are there.
  """
  flags_now = os.environ.get("XLA_FLAGS", "")
  if (devices or cores()) >= cores() and _SCHEDULER not in flags_now:
    os.environ["XLA_FLAGS"] = f"{flags_now} {_SCHEDULER}=false".strip()
  jax.config.update("jax_num_cpu_devices", devices or cores())
  if cache is not None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  if processes is not None and (processes.detect or processes.coordinator_address is not None):
    jax.distributed.initialize(*processes[:3])
