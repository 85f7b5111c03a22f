"""Run a traced program at rows of tables [T, ...], each gathered where the program first needs it.

A scan over layers gathers the rows of one layer in each step. So the rows of all layers never exist
at once, and no copy puts the axis of layers in front.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from shrinkmeta.adapters import rewrite

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Row:
  """The row `index` of a table [T, ...] that is not gathered yet; NaN if there is no such row."""

  table: jax.Array
  index: jax.Array

  def gather(self) -> jax.Array:
    """Return the row."""
    # Without wrap_negative_indices=False the index -1 would mean the last row.
    rows = self.table.at[self.index]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

  def layer(self, number: jax.Array) -> "Row":
    """Return the entry `number` along the first axis of the row, as a row of [T * layers, ...]."""
    layers = self.table.shape[1]
    wide = self.index.astype(jnp.promote_types(self.index.dtype, jnp.int32))  # int8 is too small
    return Row(self.table.reshape(-1, *self.table.shape[2:]), wide * layers + number)


def map_rows(
  f: Callable[[PyTree, PyTree], PyTree], tables: PyTree, index: jax.Array, inputs: PyTree
) -> PyTree:
  """Return f(row index_n of the tables, inputs_n) for each n, leaves [N, ...].

  Args:
    f: a function of arrays.
    tables: leaves [T, ...].
    index: [N] integers.
    inputs: leaves [N, ...].
  """
  tables, inputs = jax.tree.map(jnp.asarray, (tables, inputs))
  first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (tables, inputs))
  program, outputs = jax.make_jaxpr(f, return_shape=True)(*first)

  def one(place: jax.Array, inputs: PyTree) -> list[jax.Array]:
    rows = [Row(table, place) for table in jax.tree.leaves(tables)]
    return run(program.jaxpr, program.consts, [*rows, *jax.tree.leaves(inputs)])

  return jax.tree.unflatten(jax.tree.structure(outputs), jax.vmap(one)(index, inputs))


def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  """Evaluate `jaxpr` at arguments, some of which are rows.

  Args:
    jaxpr: the program.
    consts, args: the values of its constants and its inputs.

  Returns:
    The outputs, in the order of `jaxpr.outvars`, as arrays.
  """
  env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda v: v.val if isinstance(v, Literal) else env[v]
  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    rows, name = any(isinstance(x, Row) for x in inputs), eqn.primitive.name
    if rows and name in ("jit", "pjit"):
      body = eqn.params["jaxpr"]
      outputs = run(body.jaxpr, body.consts, inputs)
    elif rows and name == "scan":
      outputs = _scan(eqn, inputs)
    else:
      outputs = rewrite.evaluate(eqn, _gathered(inputs))
    env |= dict(zip(eqn.outvars, outputs, strict=True))
  return _gathered([read(v) for v in jaxpr.outvars])


def _gathered(values: Sequence[Any]) -> list[Any]:
  return [x.gather() if isinstance(x, Row) else x for x in values]


def _scan(eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
  """Run a scan with rows among its inputs; those among its xs are gathered step by step."""
  body = eqn.params["jaxpr"]
  consts, carry, xs = rewrite.parts_of_scan(eqn, inputs)
  consts, carry = _gathered(consts), _gathered(carry)

  def step(carry: list[Any], now: tuple[jax.Array, list[Any]]) -> tuple[list[Any], list[Any]]:
    number, slices = now
    slices = [
      x.layer(number) if isinstance(x, Row) else one for x, one in zip(xs, slices, strict=True)
    ]
    outputs = run(body.jaxpr, body.consts, [*consts, *carry, *slices])
    return outputs[: len(carry)], outputs[len(carry) :]

  numbers = jnp.arange(eqn.params["length"])
  plain = [None if isinstance(x, Row) else x for x in xs]
  after, ys = jax.lax.scan(step, carry, (numbers, plain), **rewrite.settings_of_scan(eqn))
  return [*after, *ys]
