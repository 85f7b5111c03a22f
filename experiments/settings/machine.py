"""Settings of JAX on this machine: host devices, other processes, and the compilation cache."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
from typing import NamedTuple

import jax


class Processes(NamedTuple):
  """How the processes of one run find each other; the default is a single process."""

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
_MOST_BYTES = 2**30  # of compiled programs; the main job has 40 MB. Older ones are dropped.


def start_jax(
  devices: int = 0, cache: str | None = None, processes: Processes | None = None
) -> None:
  """Set up JAX; call this before anything asks for a device.

  Args:
    devices: the number of host devices that share the tasks on a CPU; 0 stands for one for each
      core. A program on one device leaves cores idle inside loops.
    cache: the folder of XLA's persistent compilation cache. A program in it is not compiled again.
      "" switches the cache off. None takes JAX_COMPILATION_CACHE_DIR if it is set, and otherwise
      `programs_folder()`.
    processes: the other processes of this run; the call waits until all of them have started.

  Raises:
    ValueError: with this description, the processes cannot find each other.
  """
  several = processes is not None and (processes.detect or processes.coordinator_address)
  if processes is not None and several and not processes.detect:
    _check(processes)
  flags_now = os.environ.get("XLA_FLAGS", "")
  if (devices or cores()) >= cores() and _SCHEDULER not in flags_now:
    os.environ["XLA_FLAGS"] = f"{flags_now} {_SCHEDULER}=false".strip()
  jax.config.update("jax_num_cpu_devices", devices or cores())
  if cache is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = str(programs_folder())
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
  if cache == "":
    jax.config.update("jax_compilation_cache_dir", None)
  elif cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  if processes is not None and several:
    _join(processes)


def programs_folder() -> pathlib.Path:
  """Return the folder in the user's cache for programs compiled on this kind of machine.

  JAX identifies a program by versions, flags and devices, but not by the kind of CPU. If machines
  share a home folder, a CPU could get a program with instructions that it lacks
  (docs/hazards.md#cached-programs). So each kind of CPU has a folder of its own.
  """
  cpu = platform.machine() + platform.processor()
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    kinds = ("flags", "features", "model name", "cpu part")  # of x86 and of Arm
    cpu += "".join(sorted({line for line in lines if line.lower().startswith(kinds)}))
  except OSError:
    cpu += platform.node()  # where the CPU is unknown, a folder a machine
  kind = hashlib.sha256(cpu.encode()).hexdigest()[:12]
  root = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
  name = f"programs-{importlib.metadata.version('jaxlib')}-{kind}"
  return pathlib.Path(root).expanduser() / "shrinkmeta" / name


def _check(processes: Processes) -> None:
  """Raise ValueError where JAX would show a traceback or abort the program."""
  address, number, own = processes[:3]
  matched = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s/]+):(\d{1,5})", address or "")
  if matched is None or not 1 <= int(matched[2]) <= 65_535:
    raise ValueError(
      "--coordinator_address is host:port with a port of 1 to 65535, as in 10.0.0.1:1234; got "
      f"{address!r}."
    )
  if number is None or number < 1:
    raise ValueError(f"--num_processes is at least 1; got {number}.")
  if own is None or not 0 <= own < number:
    raise ValueError(
      f"--process_id is 0 to {number - 1}, one less than --num_processes={number}; got {own}."
    )
  host, port = matched[1].strip("[]"), int(matched[2])
  try:
    socket.getaddrinfo(host, port)
    if own == 0:  # this process listens there
      with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("", port))
  except OSError as error:
    raise ValueError(
      f"--coordinator_address={address}: {error}. Give a host that all processes reach, and a port "
      "that is free on the host of process 0."
    ) from error


def _join(processes: Processes) -> None:
  try:
    jax.distributed.initialize(*processes[:3])
  except (ValueError, LookupError, RuntimeError, OSError) as error:
    raise ValueError(
      f"The processes of this run did not find each other: {error} With --distributed start the "
      "program by SLURM, MPI, Kubernetes or on a Cloud TPU pod; elsewhere give each process "
      "--coordinator_address, --num_processes and --process_id."
    ) from error
