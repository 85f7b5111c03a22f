#!/usr/bin/env bash
# A reasonable guess: optimistix differentiates all of a solution. If the objective returns
# (loss, aux), jax.grad of solution.aux is the derivative of aux at the optimum, or it is refused.
#
# What happens: the gradient is exactly 0, without a warning, for minimise, least_squares,
# root_find and fixed_point. The value of aux is right. The same expression computed from
# solution.value has the right gradient. With adjoint=RecursiveCheckpointAdjoint() the gradient
# of aux is right too, so another adjoint changes the derivative and not only its cost.
#
# Versions: optimistix 0.1.0 with equinox 0.13.8 and jax 0.10.2. The docstrings call aux
# auxiliary data that the user returns; they say nothing about its derivative.
#
# Why it matters in meta-learning with JAX: aux is where the inner loss, predictions or features of
# an adapted task are at hand. A meta-loss that takes them from there has a gradient that lacks the
# path through adaptation, or is 0 altogether. Added to other terms, such as a penalty, it still
# trains.
#
# What to do: compute what you differentiate from solution.value. sm.map_estimate returns theta,
# which is differentiable, and an info whose derivative is zero, as its docstring says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 optimistix==0.1.0 equinox==0.13.8 lineax==0.1.1
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import importlib.metadata
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("optimistix", "equinox", "jax")))
warnings.simplefilter("error")
square = lambda theta: jnp.sum(theta**2)
phi = jnp.array([1.0, 2.0])  # every problem below has the solution theta = phi
tight = dict(rtol=1e-6, atol=1e-6)
loss = lambda theta, phi: (jnp.sum((theta - phi) ** 2), square(theta))
residual = lambda theta, phi: (theta - phi, square(theta))
step = lambda theta, phi: (0.5 * (theta + phi), square(theta))
problems = {
  "minimise": (optx.minimise, loss, optx.BFGS(**tight)),
  "least_squares": (optx.least_squares, residual, optx.LevenbergMarquardt(**tight)),
  "root_find": (optx.root_find, residual, optx.Newton(**tight)),
  "fixed_point": (optx.fixed_point, step, optx.FixedPointIteration(**tight)),
}
adjoints = {
  "implicit (default)": optx.ImplicitAdjoint(),
  "checkpoints": optx.RecursiveCheckpointAdjoint(),
}
exact = jax.grad(square)(phi)
print("d aux / d phi, by hand", exact)
found = {}
for way, adjoint in adjoints.items():
  for name, (solve, problem, solver) in problems.items():
    def solution(phi):
      return solve(problem, solver, jnp.zeros(2), phi, has_aux=True, adjoint=adjoint)

    of_aux = np.asarray(jax.grad(lambda phi: solution(phi).aux)(phi))
    of_value = np.asarray(jax.grad(lambda phi: square(solution(phi).value))(phi))
    found[way, name] = of_aux
    text = f"aux {solution(phi).aux:.3f}, gradient of aux {of_aux.round(3)}"
    print(f"{way:18} {name:13} {text}, from solution.value {of_value.round(3)}")
    assert abs(solution(phi).aux - 5) < 1e-3, "changed: the value of aux"
    assert np.allclose(of_value, exact, atol=1e-3), "changed: the gradient of the value"
for (way, name), of_aux in found.items():
  expected = exact if way == "checkpoints" else 0 * exact
  assert np.allclose(of_aux, expected, atol=1e-3), f"changed: {way}, {name}"
END
