"""Fixtures for the tests of the library, and XLA's level of optimisation in tests."""

import faulthandler
import functools
import gc
import os
import pathlib
import sys

import jax
import pytest

# Tests compile thousands of programs and run each a few times, so nearly all their time is XLA's.
# Unoptimised, with loops as LLVM alone makes them and one LLVM module a program, a program compiles
# in a quarter of the time. XLA reads the variable when the first array is made, and so do the
# processes that tests start. XLA_FLAGS= runs all tests with XLA's defaults.
_FAST, _DEFAULTS = "--xla_backend_optimization_level=0", {"xla_backend_optimization_level": 3}
if jax.__version_info__ < (0, 11):  # XLA ends at a flag that it does not know
  _FAST += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  _DEFAULTS["xla_cpu_use_fusion_emitters"] = True
os.environ.setdefault("XLA_FLAGS", _FAST)

# Traced programs are millions of objects that live on. Collecting them often takes 6 % of a run.
gc.set_threshold(100_000)


_MOST_BYTES = 3_000_000_000  # of a process that runs tests


def pytest_collection_modifyitems(config, items):
  """Leaves out tests that are marked as a study, unless -m asks for them."""
  if "study" not in config.option.markexpr:
    left_out = [item for item in items if item.get_closest_marker("study")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
  """Drops the compiled programs of earlier files once they take gigabytes (Linux only)."""
  yield
  memory = pathlib.Path("/proc/self/statm")
  if (
    memory.exists()
    and int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_BYTES
  ):
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_hang():
  """Ends the process of a test that takes more than 20 minutes, with all tracebacks."""
  faulthandler.dump_traceback_later(1200, exit=True, file=sys.__stderr__)
  yield
  faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def x64():
  """Double precision for one test; the tests after it are back in float32."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def optimising_jit():
  """jax.jit with XLA's defaults: for what users' compiled programs do, hold and cost."""
  return functools.partial(jax.jit, compiler_options=_DEFAULTS)
