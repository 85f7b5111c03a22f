"""Settings of JAX on this machine: host devices, other processes, the cache of programs."""

import os
from typing import NamedTuple

import jax


class Processes(NamedTuple):
  """How the processes of one run find each other. The default is a single process."""

  coordinator_address: str | None = None  # host:port of process 0
  num_processes: int | None = None
  process_id: int | None = None
  detect: bool = False  # ask SLURM, MPI, Kubernetes or a Cloud TPU pod for the three


def cores() -> int:
  """Return the number of cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# This scheduler lets operations of one device run at once, and holds more arrays for it. If every
# core has a device of its own, no core is left to run them
# (docs/hazards.md#concurrent-scheduler).
_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def start_jax(
  devices: int = 0, cache: str | None = None, processes: Processes | None = None
) -> None:
  """Set up JAX. Call this before anything asks for a device.

  Args:
    devices: number of host devices that share the tasks on a CPU; 0 is one a core. A program of
      one device leaves cores idle inside loops.
    cache: folder of XLA's persistent compilation cache. A program that is in it is not compiled
      again. None switches the cache off.
    processes: the other processes of this run; the call waits until all of them have started.
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
