#!/usr/bin/env bash
# A reasonable guess: jax.device_put copies a NumPy array; a JAX array never changes.
#
# What happens: on the CPU backend it shares the memory of a NumPy array that begins at a multiple
# of 64 bytes. Writing to the NumPy array later changes the JAX array. jnp.asarray and jnp.array
# copy. Whether NumPy's own memory begins at such a multiple is chance, so the change comes and
# goes.
#
# Versions: jax and jaxlib 0.10.2, CPU backend; the same with a NamedSharding over several host
# devices.
#
# Why it matters in meta-learning with JAX: a data loader that fills one NumPy buffer with the next
# meta-batch rewrites the tasks of the update that is still running, or a batch kept for
# evaluation. Nothing is reported, and it does not happen on every run.
#
# What to do: pass jnp.array(x) instead, or do not write to an array that was placed. shrinkmeta's
# place_tasks calls device_put on the arrays it gets, so the same holds for tasks made of NumPy
# arrays.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
import numpy as np


def aligned(count, offset):
  """[count] float32 zeros that begin `offset` bytes after a multiple of 64."""
  raw = np.zeros(4 * count + 128, np.uint8)
  start = -raw.ctypes.data % 64 + offset
  return raw[start : start + 4 * count].view(np.float32)


def follows(place, offset):
  """Whether the placed array changes when the NumPy array is written to."""
  buffer = aligned(65536, offset)
  placed = jax.block_until_ready(place(buffer))
  buffer[:] = 1
  return bool(jnp.any(placed == 1))


found = {}
for name, place in (("device_put", jax.device_put), ("asarray", jnp.asarray), ("array", jnp.array)):
  for offset in (0, 16):
    found[name, offset] = follows(place, offset)
    print(f"{name:10} of an array at {offset:2} modulo 64 bytes: follows: {found[name, offset]}")
assert found.pop(("device_put", 0)), "changed: device_put copies"
assert not any(found.values()), "changed: others share memory"
END
