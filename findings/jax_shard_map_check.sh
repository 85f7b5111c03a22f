#!/usr/bin/env bash
# A reasonable guess: the argument check_vma of jax.shard_map only switches a check on and off; a
# program that passes the check gives the same numbers without it.
#
# What happens: it changes gradients. For loss = psum of the devices' losses, grad inside shard_map
# gives the gradient of the sum with check_vma=True. With check_vma=False each device gets its own
# part times the number of devices, and out_specs that promise equal copies hide it. For the other
# usual program, psum of the local gradient, it is the reverse: right with False, and times the
# number of devices with True.
#
# Versions: jax 0.10.2, four host devices.
#
# Why it matters in meta-learning with JAX: a meta-gradient over tasks on several devices is
# exactly this program. On one device all four numbers agree, so tests on one device pass.
# Switching the check off because of an unrelated complaint changes the size of the gradient.
#
# What to do: choose one setting, write the psum to match it, and test on four host devices.
# shrinkmeta uses check_vma=False with one psum of gradients, which is the right pair, and tests it
# on several devices.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
export XLA_FLAGS=--xla_force_host_platform_device_count=4
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

mesh = jax.make_mesh((4,), ("tasks",), (AxisType.Auto,))
x = jnp.arange(8.0)  # loss(w) = sum(w x), so the gradient is 28
local = lambda w, x: jnp.sum(w * x)
programs = {
  "grad of psum": lambda w, x: jax.grad(lambda w: jax.lax.psum(local(w, x), "tasks"))(w),
  "psum of grad": lambda w, x: jax.lax.psum(jax.grad(local)(w, x), "tasks"),
}
specs = {"in_specs": (PartitionSpec(), PartitionSpec("tasks")), "out_specs": PartitionSpec()}
found = {}
for name, program in programs.items():
  for check in (True, False):
    out = jax.shard_map(program, mesh=mesh, check_vma=check, **specs)(1.0, x)
    found[name, check] = [float(shard.data) for shard in out.addressable_shards]
    print(f"{name}, check_vma={check!s:5}: per device {found[name, check]}")
print("the gradient of the sum is", float(x.sum()))
assert found["grad of psum", True] == [28.0] * 4, "changed: grad of psum, True"
assert found["grad of psum", False] == [4.0, 20.0, 36.0, 52.0], "changed: grad of psum, False"
assert found["psum of grad", True] == [112.0] * 4, "changed: psum of grad, True"
assert found["psum of grad", False] == [28.0] * 4, "changed: psum of grad, False"
END
