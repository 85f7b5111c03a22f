#!/usr/bin/env bash
# A reasonable guess: safetensors.numpy.save writes a transposed or Fortran-ordered array in
# row-major order, or refuses it.
#
# What happens: it writes the memory as it lies under the array's shape. The file is valid, loading
# succeeds, and the entries are in another order. np.ascontiguousarray before saving mends it.
#
# Versions: safetensors 0.8.0 with numpy 2.4.6. Version 0.7.0 returned both arrays unchanged.
#
# Why it matters in meta-learning with JAX: deltas per task are small matrices, often transposes
# (weights for PyTorch, the factors of a low-rank adapter) or results of np.linalg with Fortran
# order. Square ones keep their shape, so nothing but a worse accuracy tells.
#
# What to do: call np.ascontiguousarray on every array before saving, and compare one file after
# loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  safetensors==0.8.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
from safetensors import numpy as safetensors

weights = np.arange(6, dtype=np.float32).reshape(2, 3)
there_and_back = lambda x: safetensors.load(safetensors.save({"w": x}))["w"]
for name, x in (("transposed", weights.T), ("Fortran-ordered", np.asfortranarray(weights))):
  back = there_and_back(x)
  print(f"{name}: saved {x.tolist()}, loaded {back.tolist()}")
  assert back.shape == x.shape and not np.array_equal(back, x), f"changed: {name}"
  assert np.array_equal(there_and_back(np.ascontiguousarray(x)), x), "changed: contiguous arrays"
END
