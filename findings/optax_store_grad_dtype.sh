#!/usr/bin/env bash
# A reasonable guess: a line search that stores the gradient at its end (`store_grad=True`) takes the
# same objectives as one that does not.
#
# What happens: the search without it takes an objective in any float. With it the objective must be
# in JAX's default float. Parameters in bfloat16 or float16 raise a TypeError, and so do those in
# float32 once `jax_enable_x64` is set. The message speaks of a cotangent, not of a precision. The
# zoom search, which stores the gradient always, takes all of them.
#
# Versions: optax 0.2.8, jax and jaxlib 0.10.2.
#
# Output seen: TypeError: cotangent type does not match function output, expected
# (ShapedArray(bfloat16[]),) but got [1.0]
#
# Why it matters in meta-learning with JAX: inner loops are run in half precision on accelerators, and
# in float32 inside programs that compute evidence or intervals in float64.
#
# What to do: let the objective that the search gets return JAX's default float:
# `lambda params: jnp.asarray(loss(params), float)`.
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
import optax


def loss(params):
  return jnp.sum(jnp.square(params - 1))


def default_float(params):
  return jnp.asarray(loss(params), float)


def step(search, objective, dtype):
  params = jnp.zeros(3, dtype)
  value, grad = jax.value_and_grad(loss)(params)
  given = {"value": value, "grad": grad, "value_fn": objective}
  return search.update(-grad, search.init(params), params, **given)[0]


def raised(*arguments):
  try:
    step(*arguments)
  except TypeError as error:
    return str(error).splitlines()[0]
  return ""


def backtracking(store_grad):
  return optax.scale_by_backtracking_linesearch(10, store_grad=store_grad)


zoom = optax.scale_by_zoom_linesearch(10)
print("float32:", raised(backtracking(True), loss, jnp.float32) or "taken")
print("bfloat16:", raised(backtracking(True), loss, jnp.bfloat16))
assert not raised(backtracking(True), loss, jnp.float32)
for half in (jnp.bfloat16, jnp.float16):
  assert not raised(backtracking(False), loss, half)
  assert not raised(zoom, loss, half)
  assert "cotangent type" in raised(backtracking(True), loss, half)
  assert not raised(backtracking(True), default_float, half)
jax.config.update("jax_enable_x64", True)
assert not raised(backtracking(False), loss, jnp.float32)
assert not raised(zoom, loss, jnp.float32)
assert "cotangent type" in raised(backtracking(True), loss, jnp.float32)
assert not raised(backtracking(True), default_float, jnp.float32)
END
