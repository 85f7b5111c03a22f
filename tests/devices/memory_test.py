"""The memory that XLA plans for a meta-step, against the number of inner steps."""

import ctypes

import jax
import jax.numpy as jnp
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.devices.memory import give_back

SIZES, N, T = (8, 32, 32, 4), 20, 4


def predict(params, x):
  for i in range(2):
    x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"])
  return x @ params["layer_2"]["kernel"] + params["layer_2"]["bias"]


def temporary_bytes(algorithm, batching="auto", **inner):
  params = {
    f"layer_{i}": {"kernel": jnp.zeros((a, b)), "bias": jnp.zeros(b)}
    for i, (a, b) in enumerate(zip(SIZES[:-1], SIZES[1:], strict=True))
  }
  batch = sm.Batch(jnp.zeros((T, N, SIZES[0])), jnp.zeros((T, N, SIZES[-1])))
  learner = algorithm(
    sm.gaussian(predict),
    sm.by_layer(params),
    inner=sm.Inner(optax.sgd(0.1), **inner),
    batching=batching,
  )
  lowered = jax.jit(learner.update).lower(learner.init(params), sm.Task(batch, batch))
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_implicit_memory_does_not_grow_with_the_steps():
  few, many = (temporary_bytes(sm.sigma_imaml, steps=steps) for steps in (10, 1000))
  assert 0 < many <= 1.02 * few


def test_unrolled_memory_grows_with_the_steps_and_less_so_with_remat():
  few, many = (temporary_bytes(sm.sigma_maml, steps=steps) for steps in (10, 100))
  assert many > 5 * few
  assert temporary_bytes(sm.sigma_maml, steps=100, remat=True) < 0.6 * many


def test_tasks_one_at_a_time_wait_in_no_queue():
  """A queue holds the modes of all tasks."""
  one, queue, in_turn = (
    temporary_bytes(sm.sigma_imaml, batching, steps=30, tol=1e-4)
    for batching in (1, 2, "sequential")
  )
  assert 0 < one <= in_turn < queue


@pytest.mark.skipif(
  not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="The C library has no malloc_trim."
)
def test_give_back_returns_what_was_freed():
  """64 MB below an allocation that stays: glibc alone would keep them."""
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
  blocks = [libc.malloc(2**16) for _ in range(1024)]
  for block in blocks:
    ctypes.memset(block, 1, 2**16)
  for block in blocks[:-1]:
    libc.free(block)
  freed = resident()
  give_back()
  assert resident() < freed - 5e7
  libc.free(blocks[-1])


def resident():
  with open("/proc/self/status", encoding="ascii") as file:
    return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
