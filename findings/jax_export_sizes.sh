#!/usr/bin/env bash
# A reasonable guess: a program exported with a symbolic size n computes 1 / (n * (n - 1)) as the
# same function does under jit, where n is a Python integer.
#
# What happens: in the exported program n is an int32, and the product wraps. From n = 46342 on the
# number is wrong, without a warning or an error: a mean over pairs that is 4 comes out as -5.57 at
# n = 50,000, 262,148 at 65,537 and -463,378 at 92,682. Under jit, and exported at one fixed size,
# it is 4 each time. A float such as 1.0 in front does not help, since n * (n - 1) comes first.
#
# Versions: jax and jaxlib 0.10.2, CPU backend, without jax_enable_x64. With it, sizes are int64.
#
# Why it matters in meta-learning with JAX: tasks have different sizes, and a symbolic size serves
# them with one exported program. Energy scores, kernel distances between data sets and unbiased
# variances divide by the number of pairs. Tests with small tasks pass.
#
# What to do: divide twice, 1 / n / (n - 1), or convert first, jnp.float32(n). shrinkmeta does not
# export programs; your likelihood and your loss may have such a factor.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import warnings

import jax
import jax.numpy as jnp
from jax import export

print("jax", jax.__version__)
warnings.simplefilter("error")


def mean_of_products(scale):
  """Return the mean of x_i x_j over the pairs i != j, with a function of n for 1 / pairs."""
  return jax.jit(lambda x: scale(x.shape[0]) * (jnp.sum(x) ** 2 - jnp.sum(x * x)))


def exported(f, shape):
  return export.export(f)(jax.ShapeDtypeStruct(shape, jnp.float32)).call


any_size = export.symbolic_shape("n")
plain = mean_of_products(lambda n: 1 / (n * (n - 1)))
symbolic = exported(plain, any_size)
ways = {
  "1.0 / (n * (n - 1))": mean_of_products(lambda n: 1.0 / (n * (n - 1))),
  "1 / n / (n - 1)": mean_of_products(lambda n: 1 / n / (n - 1)),
  "jnp.float32(n)": mean_of_products(lambda n: 1 / (jnp.float32(n) * (n - 1))),
}
found = {}
print("     n    under jit   exported at n   exported for any n")
for n in (1000, 46341, 46342, 50000, 65537, 92682):
  x = jnp.full(n, 2.0)
  found[n] = float(plain(x)), float(exported(plain, (n,))(x)), float(symbolic(x))
  print("{:6} {:12.3f} {:15.3f} {:20.3f}".format(n, *found[n]))
x = jnp.full(50000, 2.0)
other = {way: float(exported(f, any_size)(x)) for way, f in ways.items()}
for way, value in other.items():
  print(f"n = 50000, any n, {way:20} {value:10.3f}")
with jax.enable_x64(True):
  wide = float(exported(plain, any_size)(jnp.full(50000, 2.0, jnp.float32)))
print(f"n = 50000, any n, jax_enable_x64       {wide:10.3f}")

for n, (jitted, fixed, free) in found.items():
  assert abs(jitted - 4) < 1e-3 and abs(fixed - 4) < 1e-3, f"changed: fixed size {n}"
  assert (abs(free - 4) < 1e-3) == (n <= 46341), f"changed: symbolic size {n}"
assert found[50000][2] < 0 and other["1.0 / (n * (n - 1))"] < 0, "changed: the sign"
for value in (other["1 / n / (n - 1)"], other["jnp.float32(n)"], wide):
  assert abs(value - 4) < 1e-3, "changed: a remedy"
END
