#!/usr/bin/env bash
# A reasonable guess: clip_by_global_norm(1.0) turns a huge finite gradient into one of norm 1.
#
# What happens: it turns it into exactly 0 where the sum of squares overflows. In float16 four
# entries of 300 suffice; in float32 entries of 1e20. The norm is then inf, and finite numbers
# divided by inf are 0. No NaN appears, so apply_if_finite and checks for NaN see nothing.
#
# Versions: optax 0.2.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: gradients through many inner steps grow exponentially,
# and clipping is the usual remedy. When they are worst, updates silently stop: the run looks
# stable and learns nothing.
#
# What to do: use optax.clip (per entry) before clip_by_global_norm, or log optax.global_norm and
# treat inf as a failed step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax.numpy as jnp
import numpy as np
import optax

clip = optax.clip_by_global_norm(1.0)
found = {}
for dtype, entry in (("float16", 3.0), ("float16", 300.0), ("float32", 1e18), ("float32", 1e20)):
  grads = {"w": jnp.full(4, entry, dtype)}
  assert bool(jnp.isfinite(grads["w"]).all())
  clipped = np.asarray(clip.update(grads, clip.init(grads))[0]["w"], np.float32)
  found[dtype, entry] = clipped
  print(f"{dtype}, entries {entry:g}: norm {optax.global_norm(grads)}, clipped {clipped}")
for (dtype, entry), clipped in found.items():
  expected = 0.0 if entry in (300.0, 1e20) else 0.5
  assert np.allclose(clipped, expected, rtol=1e-3), f"changed: {dtype} {entry:g}"
END
