#!/usr/bin/env bash
# A reasonable guess: jax.custom_batching.custom_vmap changes only what vmap does with a function. Its
# derivatives are those of its body, and an argument that a call leaves out keeps its default.
#
# What happens: grad of the batched function works. grad of the function itself raises an error, and
# so does vmap of grad, the gradient of each task. vmap of jvp works if the tangent differs between
# tasks. If all tasks share it, as with 1.0, the result is an array of tasks by tasks, without an
# error. A default argument reaches the body as a traced array: `if flag` and a text as a default
# raise errors, so that jnp.linalg.eigh cannot be wrapped as it is.
#
# Versions: jax and jaxlib 0.10.2, CPU backend.
#
# Output seen:
#   jvp 6.0, grad of vmap [6.0, 8.0]
#   vmap of jvp, a tangent of each task: [6.0, 8.0]; one of all tasks: [[6.0, 6.0], [8.0, 8.0]]
#   grad: ValueError, vmap of grad: ValueError
#   a default of False: TracerBoolConversionError; jnp.linalg.eigh: ValueError
#
# Why it matters in meta-learning with JAX: tasks are batched by vmap, and a rule for the batch is how a
# factorisation or a kernel is made fit for many tasks. A test of the loss of all tasks passes, and the
# gradient of each task fails.
#
# What to do: wrap a lambda without defaults, pass it constants only, or give it a derivative by
# jax.custom_jvp around the wrapped function or by jax.lax.custom_linear_solve.
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


def with_a_rule(f):
  wrapped = jax.custom_batching.custom_vmap(f)

  @wrapped.def_vmap
  def rule(size, batched, *args):
    axes = tuple(0 if own else None for own in batched)
    out = jax.vmap(f, axes, axis_size=size)(*args)
    return out, jax.tree.map(lambda _: True, out)

  return wrapped


def error_of(run):
  try:
    run()
  except Exception as error:
    return type(error).__name__
  return "no error"


square = with_a_rule(lambda x: x**2)
xs = jnp.array([3.0, 4.0])
slope = lambda x, tangent: jax.jvp(square, (x,), (tangent,))[1]
one, of_sum = float(slope(3.0, 1.0)), jax.grad(lambda xs: jax.vmap(square)(xs).sum())(xs).tolist()
own = jax.vmap(slope)(xs, jnp.ones(2)).tolist()
shared = jax.vmap(lambda x: slope(x, 1.0))(xs).tolist()
print(f"jvp {one}, grad of vmap {of_sum}")
print(f"vmap of jvp, a tangent of each task: {own}; one of all tasks: {shared}")
assert one == 6.0 and of_sum == own == [6.0, 8.0]
assert shared == [[6.0, 6.0], [8.0, 8.0]]

alone, each = error_of(lambda: jax.grad(square)(3.0)), error_of(lambda: jax.vmap(jax.grad(square))(xs))
print(f"grad: {alone}, vmap of grad: {each}")
assert alone == each == "ValueError"


def times(x, twice=False):
  return 2 * x if twice else x


default = error_of(lambda: with_a_rule(times)(3.0))
library = error_of(lambda: with_a_rule(jnp.linalg.eigh)(jnp.eye(2)))
print(f"a default of False: {default}; jnp.linalg.eigh: {library}")
assert times(3.0) == 3.0 and default == "TracerBoolConversionError" and library == "ValueError"
END
