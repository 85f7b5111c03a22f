#!/usr/bin/env bash
# A reasonable guess: scipy.optimize.minimize of a jitted JAX loss, started at double precision and
# without jac, ends near the optimum or reports failure.
#
# What happens: BFGS, CG, L-BFGS-B, TNC and SLSQP report success and return the start. The loss is
# computed in float32, where a finite-difference step of 1.5e-8 changes nothing, so the gradient is
# exactly 0 and the start looks like an optimum. Nelder-Mead, which needs no gradient, finds it.
#
# Versions: scipy 1.17.1 with jax 0.10.2 in its default precision.
#
# Why it matters in meta-learning with JAX: hyperparameters (log sigma, a step size, a noise scale)
# are often tuned by handing a JAX function to SciPy. The optimum is then the initial guess, with
# success=True.
#
# What to do: pass jac=True with jax.value_and_grad, or set jax_enable_x64. shrinkmeta's mixed
# models pass the gradient.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 scipy==1.17.1
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

loss = jax.jit(lambda x: jnp.sum((x - 3.0) ** 2))
start = np.array([1.0, 2.0])
for method in ("BFGS", "CG", "L-BFGS-B", "TNC", "SLSQP"):
  found = minimize(loss, start, method=method)
  print(f"{method:12} success={found.success} x={found.x} {found.message}")
  assert found.success and np.array_equal(found.x, start), f"changed: {method}"
both = lambda x: [np.asarray(v, float) for v in jax.value_and_grad(loss)(x)]
given = minimize(both, start, jac=True)
plain = minimize(loss, start, method="Nelder-Mead")
print("BFGS with jac", given.success, given.x)
print("Nelder-Mead  ", plain.success, plain.x)
assert np.allclose(given.x, 3, atol=1e-3) and np.allclose(plain.x, 3, atol=1e-2), "changed: others"
END
