#!/usr/bin/env bash
# A reasonable guess: LayerNorm returns features of mean 0 and standard deviation 1, whatever the
# mean of its inputs.
#
# What happens: it does so only while the mean is small beside float32's precision. By default Flax
# computes the variance as E[x^2] - E[x]^2. With inputs of mean 5000 and standard deviation 1,
# standard deviations of the output run from 0.4 to about 1000, all finite. At mean 1000 they are
# off by up to 13 %. GroupNorm and BatchNorm do the same.
#
# Versions: flax 0.12.8, linen, with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: tasks in raw units (years, pressures, sensor counts)
# have a large mean and a small spread. A norm per example is the usual remedy for that, and here
# it adds noise of its own. A task far from the others is hit first.
#
# What to do: pass use_fast_variance=False, or subtract a constant from the inputs before they
# enter the network.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8 flax==0.12.8 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import numpy as np
from flax import linen as nn

noise = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)


def spreads(fast, mean):
  layer = nn.LayerNorm(use_fast_variance=fast)
  x = np.float32(mean) + noise
  return np.std(np.asarray(layer.apply(layer.init(jax.random.key(0), x), x)), axis=1)


for mean in (0, 1000, 5000):
  for fast in (True, False):
    print(f"mean {mean:4}, fast={fast!s:5}: output spreads {spreads(fast, mean).round(3)}")
error = lambda fast, mean: float(np.abs(spreads(fast, mean) - 1).max())
assert nn.LayerNorm().use_fast_variance, "changed: the default"
assert error(True, 5000) > 0.2, "changed: mean 5000"
assert error(True, 1000) > 0.02, "changed: mean 1000"
assert error(False, 5000) < 1e-3, "changed: use_fast_variance=False"
END
