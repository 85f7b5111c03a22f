#!/usr/bin/env bash
# A reasonable guess: a sum of losses over tasks has one gradient, whether a Python loop, scan,
# lax.map or vmap adds the tasks.
#
# What happens: it differs where the network holds a custom_vjp whose backward rule is not linear,
# such as one that clips the gradient. The loop, scan and lax.map call the rule once per task.
# Under vmap the shared parameters are not batched, so JAX sums the cotangents of all tasks first
# and calls the rule once, on the sum. vmap of grad calls it once per task again.
#
# Versions: jax 0.10.2.
#
# Why it matters in meta-learning with JAX: grad(sum(vmap(loss))) is the usual way to write a
# meta-gradient. Clipping per task silently becomes clipping of the sum, and changing from lax.map
# to vmap to save time changes what is learned.
#
# What to do: write vmap(grad(loss)) and add the gradients afterwards where a backward rule is not
# linear. shrinkmeta takes the gradient of each task inside vmap and adds afterwards, except where
# tasks are joined in one term, as with sigma_gradient="joint".
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


@jax.custom_vjp
def clip_gradient(x):
  """The identity. Its gradient is scaled down to a norm of at most 1."""
  return x


clip_gradient.defvjp(
  lambda x: (x, None), lambda _, g: (g / jnp.maximum(1.0, jnp.linalg.norm(g)),)
)
phi = jnp.ones(2)
tasks = jnp.array([[3.0, 0.0], [0.0, 4.0]])
loss = lambda phi, task: jnp.vdot(clip_gradient(phi), task)
ways = {
  "loop": jax.grad(lambda phi: sum(loss(phi, task) for task in tasks))(phi),
  "lax.map": jax.grad(lambda phi: jax.lax.map(lambda t: loss(phi, t), tasks).sum())(phi),
  "grad of vmap": jax.grad(lambda phi: jax.vmap(loss, (None, 0))(phi, tasks).sum())(phi),
  "vmap of grad": jax.vmap(jax.grad(loss), (None, 0))(phi, tasks).sum(0),
}
for name, value in ways.items():
  print(f"{name:13}", value)
for name in ("loop", "lax.map", "vmap of grad"):
  np.testing.assert_allclose(ways[name], [1.0, 1.0], rtol=1e-6, err_msg="changed: " + name)
np.testing.assert_allclose(ways["grad of vmap"], [0.6, 0.8], rtol=1e-6, err_msg="changed: vmap")
END
