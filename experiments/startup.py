"""What the binaries tell JAX before it starts."""

import os

import jax


def cores() -> int:
  """Cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_jax(devices: int = 0, cache: str | None = None) -> None:
  """Host devices for a CPU, and the compilation cache. Call before anything asks for a device.

  Args:
    devices: host devices over which tasks are split; 0 is one a core. A program of one device
      leaves cores idle inside loops.
    cache: folder of XLA's persistent compilation cache, from which a program compiled before is
      read in place of compiling it again; None is off.
  """
  jax.config.update("jax_num_cpu_devices", devices or cores())
  if cache is not None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
