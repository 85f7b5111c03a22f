#!/usr/bin/env bash
# A reasonable guess: the FLOP count of a compiled program grows with the number of steps of its
# lax.scan.
#
# What happens: compiled.cost_analysis()["flops"] counts the body of a loop once. Ten steps and a
# thousand steps give the same number; the same ten steps written out in Python give ten times as
# much.
#
# Versions: jax and jaxlib 0.10.2, CPU backend.
#
# Why it matters in meta-learning with JAX: an inner loop of L steps is a scan. MAML with 5 and
# with 500 inner steps get the same count, and an algorithm whose solver is a loop looks cheaper
# than one whose solver is written out. Tables of FLOPs per update are wrong by L.
#
# What to do: count one step and multiply, or count a program with the loop written out.
# sm.program_cost reports XLA's number, and its docstring says that it is a lower bound for
# programs with loops.
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


def flops(f):
  return jax.jit(f).lower(jnp.ones((64, 64))).compile().cost_analysis()["flops"]


def scanned(steps):
  return lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, steps)[0]


def written_out(x):
  for _ in range(10):
    x = jnp.tanh(x @ x)
  return x


few, many, plain = flops(scanned(10)), flops(scanned(1000)), flops(written_out)
print(f"scan of 10 steps    {few:12,.0f} FLOP")
print(f"scan of 1000 steps  {many:12,.0f} FLOP")
print(f"10 steps in Python  {plain:12,.0f} FLOP")
assert many < 1.1 * few, "changed: the scan's length counts"
assert plain > 9 * few, "changed: a loop's body is counted otherwise"
END
