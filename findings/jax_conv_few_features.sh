#!/usr/bin/env bash
# A reasonable guess: a convolution with 16 features takes no longer than one with 32, and one of
# three channels no longer than one of four.
#
# What happens on a CPU: with at most 16 channels and at most 16 features XLA keeps its own
# `convolution`; with more it calls kernels of YNNPACK, which are several times faster. So 16
# features take about four times as long as 32. The fast kernels are slow for an odd number of
# channels: 3 channels and 17 features take about ten times as long as 4 channels and 17 features.
#
# Versions: jax and jaxlib 0.10.2, CPU backend.
#
# Output seen, one core, microseconds: 1 -> 16: 562; 1 -> 32: 116; 3 -> 17: 3210; 4 -> 17: 243.
#
# Why it matters in meta-learning with JAX: small networks on small pictures, grey or RGB, are the
# field's examples, and the first layer is the slowest one. A study that makes the network smaller to
# save time makes it slower.
#
# What to do: give the first layer 32 features and pictures of three channels a fourth one of
# zeros; or pad the kernel with zeros and drop the additional features.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_multi_thread_eigen=false "$folder/venv/bin/python" - <<'END'
import statistics
import time

import jax
import jax.numpy as jnp


def convolve(x, kernel):
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def measure(channels, features):
  """Return (whether XLA's own convolution is left in the program, median seconds)."""
  x, kernel = jnp.ones((20, 32, 32, channels)), jnp.ones((3, 3, channels, features))
  compiled = jax.jit(convolve).lower(x, kernel).compile()
  seconds = []
  for _ in range(50):
    begin = time.perf_counter()
    jax.block_until_ready(compiled(x, kernel))
    seconds.append(time.perf_counter() - begin)
  return "ynn" not in compiled.as_text(), statistics.median(seconds)


found = {}
for channels, features in ((1, 16), (1, 32), (3, 17), (4, 17)):
  own, seconds = found[channels, features] = measure(channels, features)
  kernel = "XLA's own" if own else "YNNPACK"
  print(f"{channels} -> {features} features: {1e6 * seconds:6.0f} us, {kernel}")
assert found[1, 16][0] and not found[1, 32][0], "changed: which convolutions YNNPACK computes"
assert found[1, 16][1] > 1.5 * found[1, 32][1], "changed: 16 features are no slower than 32"
assert found[3, 17][1] > 2 * found[4, 17][1], "changed: 3 channels are no slower than 4"
END
