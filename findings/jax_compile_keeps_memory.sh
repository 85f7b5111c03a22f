#!/usr/bin/env bash
# A reasonable guess: when XLA has compiled a program, the process holds the program, and the memory
# of the compiler is free for other processes.
#
# What happens on a CPU under Linux: XLA frees most of it, but glibc's allocator keeps what was freed,
# hundreds of megabytes for one program. It does so with any limits of MALLOC_TRIM_THRESHOLD_ and
# MALLOC_MMAP_THRESHOLD_ that were tried. One call of `malloc_trim` returns it.
#
# Versions: jax and jaxlib 0.10.2, CPU backend, glibc.
#
# Output seen: 260 MB before the compilation, 572 after it, 321 after malloc_trim
#
# Why it matters in meta-learning with JAX: updates differentiate through a network many times, so
# their programs have thousands of operations. The peak of memory is that of the compiler, and what
# the allocator keeps is missing where several such processes share a machine.
#
# What to do: call `ctypes.CDLL(None).malloc_trim(0)` after the compilation.
set -euo pipefail
if [ "$(uname -s)" != Linux ] || ! getconf GNU_LIBC_VERSION > /dev/null 2>&1; then
  echo "This concerns Linux with glibc." >&2
  exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import ctypes
import gc

import jax
import jax.numpy as jnp


def megabytes():
  with open("/proc/self/status", encoding="ascii") as file:
    return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024


def network(params, x):
  for kernel, bias in params:
    x = jnp.tanh(x @ kernel + bias)
  return jnp.sum(x)


def adapted(params, x):
  """Four steps of gradient descent."""
  for _ in range(4):
    grads = jax.grad(network)(params, x)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
  return network(params, x)


def sizes(i):
  return 20 + i, 21 + i  # no two layers alike, so that no kernel serves twice


params = [(jnp.ones(sizes(i)), jnp.ones(sizes(i)[1])) for i in range(12)]
lowered = jax.jit(jax.grad(adapted)).lower(params, jnp.ones((5, 20)))
gc.collect()
before = megabytes()
compiled = lowered.compile()
after = megabytes()
ctypes.CDLL(None).malloc_trim(0)
trimmed = megabytes()
print(f"{before:.0f} MB before the compilation, {after:.0f} after it, {trimmed:.0f} after malloc_trim")
assert after - trimmed > 0.5 * (after - before), "changed: the allocator keeps little"
END
