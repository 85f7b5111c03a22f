#!/usr/bin/env bash
# A reasonable guess: where the gradient of an inner step is exactly 0, the update is 0, and the
# meta-gradient through that step is finite.
#
# What happens: the update is 0 and its derivative is NaN. Adam divides by the square root of the
# second moment, and clip_by_global_norm by a norm; both have an infinite derivative at 0, and
# infinity times 0 is NaN. Plain SGD is right, and so is Adam with eps_root > 0.
# clip_by_global_norm has no such argument.
#
# Versions: optax 0.2.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: MAML differentiates through inner steps. A pixel that
# is 0 in all examples of a task, a dead unit, or a task that holds only padding has a gradient of
# exactly 0. One such entry makes the whole meta-gradient NaN, though the loss is finite.
#
# What to do: use optax.adam(rate, eps_root=1e-8) for inner steps, and clip in the outer optimizer
# only. shrinkmeta's implicit gradients do not pass through the steps; its training loop names
# eps_root when a run fails in this way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
import numpy as np
import optax

inputs = jnp.array([[1.0, 0.0], [2.0, 0.0]])  # the second feature is 0 in the whole task
targets = jnp.array([1.0, 3.0])


def after_one_step(optimizer, inputs):
  loss = lambda theta: jnp.mean((inputs @ theta - targets) ** 2)

  def meta_loss(phi):
    updates, _ = optimizer.update(jax.grad(loss)(phi), optimizer.init(phi), phi)
    return loss(optax.apply_updates(phi, updates))

  return [np.asarray(x) for x in jax.value_and_grad(meta_loss)(jnp.ones(2))]


clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
empty = jnp.zeros_like(inputs)  # padding only
runs = {
  "sgd": (optax.sgd(0.1), inputs, False),
  "adam": (optax.adam(0.1), inputs, True),
  "adam, eps_root=1e-8": (optax.adam(0.1, eps_root=1e-8), inputs, False),
  "clip_by_global_norm": (clipped, inputs, False),
  "clip_by_global_norm, zero task": (clipped, empty, True),
}
for name, (optimizer, x, expected) in runs.items():
  value, grad = after_one_step(optimizer, x)
  print(f"{name:31} meta-loss {value:.4f}, meta-gradient {grad}")
  assert np.isfinite(value), f"changed: {name}"
  assert np.isnan(grad).any() == expected, f"changed: {name}"
END
