#!/usr/bin/env bash
# A reasonable guess: jax.random.normal(key, shape, bfloat16) is a float32 normal draw, rounded: a
# million draws reach about 4.9 in absolute value, and their mean is 0 within 0.003.
#
# What happens: the draws come from 128 equally likely points, because the uniform number behind
# them has 7 random bits. None of a million exceeds 2.9, and their mean is -0.012, twelve standard
# errors from 0. jax.random.uniform has 128 values too, and 0 is one of them with probability
# 1/128.
#
# Versions: jax 0.10.2.
#
# Why it matters in meta-learning with JAX: initial weights, noise on inputs, and samples of a
# posterior have no tails and a bias in bfloat16. The logarithm of a uniform draw is -inf once in
# 128 draws.
#
# What to do: draw in float32 and convert: jax.random.normal(key, shape).astype(bfloat16).
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

count = 10**6
key = jax.random.key(0)
direct = np.asarray(jax.random.normal(key, (count,), jnp.bfloat16)).astype(np.float64)
rounded = np.asarray(jax.random.normal(key, (count,)).astype(jnp.bfloat16)).astype(np.float64)
uniform = np.asarray(jax.random.uniform(key, (count,), jnp.bfloat16)).astype(np.float64)
for name, z in (("drawn in bfloat16", direct), ("drawn in float32, rounded", rounded)):
  print(f"{name:26} {len(np.unique(z)):6} values, largest {abs(z).max():.2f}, mean {z.mean():+.4f}")
zero = (uniform == 0).mean()
print(f"uniform in bfloat16: {len(np.unique(uniform))} values, share of exact 0 {zero:.4f}")
assert len(np.unique(direct)) == 128 and abs(direct).max() < 3, "changed: range of normal"
assert direct.mean() < -0.008, "changed: mean of normal"
assert abs(rounded).max() > 4 and abs(rounded.mean()) < 0.004, "changed: float32"
assert 0.006 < zero < 0.010, "changed: uniform"
END
