#!/usr/bin/env bash
# A reasonable guess: wrapping an optimizer in optax.inject_hyperparams, to be able to change its
# learning rate, leaves its updates as they are.
#
# What happens: all numeric arguments, b2 = 0.999 among them, take the dtype of the parameters. In
# bfloat16 0.999 rounds to 1. Adam's bias correction 1 - b2^t is then 0, and the first update is
# NaN in every entry, also where plain adam gives the usual -0.01.
#
# Versions: optax 0.2.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: searches over learning rates, and learned learning
# rates, are done with inject_hyperparams. With phi in bfloat16 the first update destroys phi.
#
# What to do: pass hyperparam_dtype=jnp.float32 to inject_hyperparams.
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

params = {"w": jnp.ones(3, jnp.bfloat16)}
grads = {"w": jnp.array([0.1, 0.2, 0.3], jnp.bfloat16)}


def first_update(optimizer):
  return np.asarray(optimizer.update(grads, optimizer.init(params), params)[0]["w"], np.float32)


wrapped = optax.inject_hyperparams(optax.adam)(1e-2)
found = {
  "adam": first_update(optax.adam(1e-2)),
  "inject_hyperparams(adam)": first_update(wrapped),
  "the same, hyperparam_dtype=float32": first_update(
    optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(1e-2)
  ),
}
for name, value in found.items():
  print(f"{name:35} {value}")
b2 = float(wrapped.init(params).hyperparams["b2"])
print("b2 is", b2)
assert b2 == 1.0, "changed: b2"
good, bad, mended = found.values()
assert np.isnan(bad).all(), "changed: the wrapped update"
for value in (good, mended):
  assert np.allclose(value, -0.01, rtol=0.02), "changed: the others"
END
