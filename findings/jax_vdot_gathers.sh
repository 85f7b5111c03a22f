#!/usr/bin/env bash
# A reasonable guess: the inner product of two matrices that are split over devices in the same way is
# a sum on each device, then a sum of these numbers over the devices. `jnp.vdot`, `jnp.sum(a * b)`
# and `jnp.tensordot(a, b, 2)` are the same program.
#
# What happens: this holds for the last two, and for `jnp.vdot` of matrices that are split by rows. If
# they are split by columns, `jnp.vdot` gathers both whole matrices on every device, because it makes
# a vector of each first. `optax.tree.vdot` does it too.
#
# Versions: jax and jaxlib 0.10.2, optax 0.2.8, CPU backend with four devices.
#
# Output seen:
#   vdot rows: all-reduce
#   vdot columns: all-gather, all-gather
#   optax.tree.vdot columns: all-gather, all-gather
#   tensordot columns: all-reduce
#   sum columns: all-reduce
#
# Why it matters in meta-learning with JAX: conjugate gradients and L-BFGS take inner products in
# every step. With parameters split over devices by columns, each of them would send all parameters.
#
# What to do: `jnp.tensordot(a, b, a.ndim)` or `jnp.sum(a * b)`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optax==0.2.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import re

import jax

jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
import optax

mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
rows, columns = jax.P("d", None), jax.P(None, "d")
kind = re.compile(r" (all-[a-z]+|reduce-scatter|collective-permute)\(")


def collectives(f, spec):
  a = jax.device_put(jnp.ones((512, 256)), jax.NamedSharding(mesh, spec))
  return sorted(kind.findall(jax.jit(f).lower(a, a).compile().as_text()))


found = {
  "vdot rows": collectives(jnp.vdot, rows),
  "vdot columns": collectives(jnp.vdot, columns),
  "optax.tree.vdot columns": collectives(optax.tree.vdot, columns),
  "tensordot columns": collectives(lambda a, b: jnp.tensordot(a, b, 2), columns),
  "sum columns": collectives(lambda a, b: jnp.sum(a * b), columns),
}
for name, kinds in found.items():
  print(f"{name}: {', '.join(kinds)}")
gathers = ["all-gather", "all-gather"]
wanted = [["all-reduce"], gathers, gathers, ["all-reduce"], ["all-reduce"]]
assert list(found.values()) == wanted, "changed: another set of collectives"
END
