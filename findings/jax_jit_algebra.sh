#!/usr/bin/env bash
# A reasonable guess: jax.jit changes an operation of floats by rounding at most. If log(exp(x)) is
# inf outside jit, it is inf inside, for every shape.
#
# What happens: XLA rewrites some expressions as on paper, as if floats were real numbers. Under jit
# log(exp(x)) is x, the root of one square is an absolute value, exp(x) exp(-x) is 1, and
# (x + c) - c is x for a constant c. The rewriting depends on the shape: the norm of one entry does
# not overflow, that of two does. Derivatives change from NaN to a number too. The level of
# optimisation does not matter.
#
# Versions: jax 0.10.2. The rules are in XLA's algebraic_simplifier.cc.
#
# Why it matters in meta-learning with JAX: a test that a loss or a norm survives large values passes
# without any guard, if it is jitted and has one entry or one class. The same code then overflows
# with two, or outside jit. A loss that is finite in an update is inf in an evaluation without jit.
#
# What to do: test such guards with two entries and more, and also outside jit. Write the stable form
# (logsumexp, softplus, a norm divided by the largest entry) and do not rely on the rewriting.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import math

import jax
import jax.numpy as jnp

log_exp = lambda x: jnp.log(jnp.exp(x))
norm = lambda x: jnp.sqrt(jnp.sum(x * x))
log_product = lambda x: jnp.log(jnp.prod(jnp.exp(x)))
cases = {
  "log(exp(200))": (log_exp, 200.0),
  "its derivative": (jax.grad(log_exp), 200.0),
  "exp(200) exp(-200)": (lambda x: jnp.exp(x) * jnp.exp(-x), 200.0),
  "(1 + 1e8) - 1e8": (lambda x: (x + 1e8) - 1e8, 1.0),
  "norm of [1e25]": (norm, [1e25]),
  "norm of [1e25, 0]": (norm, [1e25, 0.0]),
  "norm of [1e-25]": (norm, [1e-25]),
  "log prod exp of [200]": (log_product, [200.0]),
  "log prod exp of [200, 0]": (log_product, [200.0, 0.0]),
}
found = {}
for name, (function, x) in cases.items():
  x = jnp.asarray(x, jnp.float32)
  found[name] = float(function(x)), float(jax.jit(function)(x))
  print(f"{name:26} outside jit {found[name][0]:10.4g}   under jit {found[name][1]:10.4g}")
want = [  # in the order of the cases
  (math.inf, 200.0),
  (math.nan, 1.0),
  (math.nan, 1.0),
  (0.0, 1.0),
  (math.inf, 1e25),
  (math.inf, math.inf),
  (0.0, 1e-25),
  (math.inf, 200.0),
  (math.inf, math.inf),
]
same = lambda a, b: math.isnan(a) and math.isnan(b) or a == b or math.isclose(a, b, rel_tol=1e-6)
for name, pair in zip(found, want, strict=True):
  assert all(map(same, found[name], pair)), f"changed: {name}: {found[name]}, not {pair}"
END
