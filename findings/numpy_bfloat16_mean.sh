#!/usr/bin/env bash
# A reasonable guess: np.mean of a thousand ones in bfloat16 is 1, as it is for float16 and for
# jnp.mean.
#
# What happens: it is 0.256. NumPy adds types of ml_dtypes one by one in their own precision, and
# 256 + 1 is 256 in bfloat16. No warning is given. jnp.mean of the same array is 1, and NumPy's own
# float16 is added in float32.
#
# Versions: numpy 2.4.6 with ml_dtypes 0.6.0; jax 0.10.2 for comparison.
#
# Why it matters in meta-learning with JAX: per-task losses of a bfloat16 run come to the host as
# NumPy arrays of bfloat16. np.mean over more than 256 test tasks reports a fraction of the loss,
# and a smaller loss looks like success. np.sum, np.std and cumsum suffer too.
#
# What to do: convert before any sum on the host: np.mean(x, dtype=np.float32). shrinkmeta adds
# tasks on the device in float32 even where gradients have 16 bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax.numpy as jnp
import ml_dtypes
import numpy as np

losses = np.ones(1000, ml_dtypes.bfloat16)
found = {
  "np.mean, bfloat16": float(np.mean(losses)),
  "np.sum, bfloat16": float(np.sum(losses)),
  "np.mean, bfloat16, dtype=np.float32": float(np.mean(losses, dtype=np.float32)),
  "np.mean, float16": float(np.mean(losses.astype(np.float16))),
  "jnp.mean, bfloat16": float(jnp.mean(losses)),
}
for name, value in found.items():
  print(f"{name:36} {value}")
assert found["np.sum, bfloat16"] == 256 and 0.25 < found["np.mean, bfloat16"] < 0.26, "changed"
assert list(found.values())[2:] == [1.0, 1.0, 1.0], "changed: the others"
END
