#!/usr/bin/env bash
# A reasonable guess: jax.linearize of a function with a jax.custom_vjp raises an error, because such
# a function has no forward mode; `try: jax.linearize(f, x)` then tells which networks have one.
#
# What happens: linearize returns, and so do jax.make_jaxpr and jax.eval_shape of the linear function.
# Only calling it, or compiling a program that calls it, raises "can't apply forward-mode autodiff".
# Its transpose works all the while: the derivative backwards is right.
#
# Version: jax 0.10.2. jax.jvp outside jit raises at once.
#
# Why it matters in meta-learning with JAX: Gauss-Newton products J^T Lambda J v begin with J v. A
# library that chooses another way where linearize fails never sees a failure; its users see one when
# their program is compiled, in a frame that names neither the product nor the operation.
#
# What to do: use jax.custom_jvp for operations of a network, or products that need J^T alone, such
# as those of the Hessian. shrinkmeta names this under its limits: Implicit(curvature="hessian").
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


@jax.custom_vjp
def sine(x):
  return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
x = jnp.arange(3.0)


def outcome(f):
  try:
    f()
  except TypeError as error:
    return str(error).splitlines()[0]
  return "no error"


value, forward = jax.linearize(sine, x)
found = {
  "linearize": outcome(lambda: jax.linearize(sine, x)),
  "make_jaxpr of the linear function": outcome(lambda: jax.make_jaxpr(forward)(x)),
  "eval_shape of the linear function": outcome(lambda: jax.eval_shape(forward, x)),
  "a call of the linear function": outcome(lambda: forward(x)),
  "lowering a program that calls it": outcome(lambda: jax.jit(forward).lower(x)),
  "jvp": outcome(lambda: jax.jvp(sine, (x,), (x,))),
}
for name, what in found.items():
  print(f"{name:36}{what}")
backward = jax.linear_transpose(forward, x)(jnp.ones(3))[0]
print("its transpose                       ", backward, "cos:", jnp.cos(x))
refused = "can't apply forward-mode autodiff (jvp) to a custom_vjp function."
assert [what == refused for what in found.values()] == [False, False, False, True, True, True], found
assert jnp.allclose(backward, jnp.cos(x)), backward
END
