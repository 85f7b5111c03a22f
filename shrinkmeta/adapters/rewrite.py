"""Run a traced program in which some arrays are `LowRank` kernels.

An equation without a kernel runs unchanged. Operations that rearrange or cast a kernel follow the
rules of `low_rank`. A matrix product or convolution with a kernel becomes the sum of the base
product and the low-rank part:

    x W  ->  x W + (x a) b,   a = A,   b = (alpha / r) B

The bodies of calls and loops are rewritten too. If a function with a custom derivative takes a
kernel, its custom rule is dropped, because the rule does not know a and b. JAX then differentiates
the rewritten body.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from shrinkmeta.adapters import low_rank
from shrinkmeta.adapters.low_rank import LowRank, NotFollowed

# {primitive of a call: the parameter that holds its body}. The body runs in place of the call. The
# names differ between versions of JAX (docs/hazards.md#jaxpr-names).
_CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
}
_MOVES: dict[str, Callable[..., Any]] = {
  "convert_element_type": low_rank.cast,
  "transpose": low_rank.transpose,
  "slice": low_rank.cut,
  "dynamic_slice": low_rank.dynamic_cut,
  "rev": low_rank.reverse,
  "split": low_rank.divide,
  "broadcast_in_dim": low_rank.add_axes,
}
_SAME = ("copy", "optimization_barrier", "sharding_constraint")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("table", "index", "scale"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Row:
  """A factor that is a row of a table: `scale` times table[index], for one of T tasks.

  A scan over layers gathers one layer of the row in each step. If nothing else uses the factor, the
  compiled program does not hold all layers of the row.
  """

  table: jax.Array  # [T, layers, ...]
  index: jax.Array  # []
  scale: jax.Array | None  # []; None means 1

  def layer(self, number: jax.Array) -> jax.Array:
    """Return the entry `number` of the row; NaN if the table has no such row."""
    tasks, layers, *rest = self.table.shape
    small = self.index.dtype.itemsize < 4  # int8 holds no number of tasks and layers
    index = self.index.astype(jnp.int32) if small else self.index
    index = jnp.where((index >= 0) & (index < tasks), index, tasks).astype(jnp.int32)
    entries = self.table.reshape(tasks * layers, *rest).at[index * layers + number]
    found = entries.get(mode="fill", fill_value=jnp.nan)
    return found if self.scale is None else found * self.scale


@jax.custom_jvp
def _also(value: jax.Array, same: jax.Array) -> jax.Array:
  """Return `same`, whose numbers are those of `value`, with the derivative of `value`.

  `same` is gathered in each step of a scan. Its own derivative would add to whole tables in each
  step; that of `value`, which is gathered before the scan, adds to them once.
  """
  del value
  return same


@_also.defjvp
def _also_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
  return primals[1], tangents[0]


def run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], used: set[str]) -> list[Any]:
  """Evaluate `jaxpr` at arguments, some of which are `LowRank` kernels.

  Args:
    jaxpr: the program.
    consts, args: the values of its constants and its inputs.
    used: a set, to which the function adds the name of each kernel that enters a product.

  Returns:
    The outputs, in the order of `jaxpr.outvars`.

  Raises:
    ValueError: a kernel enters an operation that has no low-rank form. The message names both.
  """
  env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda v: v.val if isinstance(v, Literal) else env[v]
  for eqn in _live(jaxpr):
    inputs = [read(v) for v in eqn.invars]
    kernel = next((x for x in inputs if isinstance(x, LowRank)), None)
    scope = str(eqn.source_info.name_stack)  # such as the name of a flax module, for profiles
    with jax.named_scope(scope) if scope else contextlib.nullcontext():
      try:
        outputs = _evaluate(eqn, inputs) if kernel is None else _rewrite(eqn, inputs, used)
      except NotFollowed as use:
        assert kernel is not None
        raise ValueError(
          f"The adapted kernel {kernel.name!r} enters {use}. A low-rank update follows a kernel "
          "through transposes, reshapes, slices, casts, calls and loops into matrix products and "
          f"convolutions only. Leave {kernel.name!r} out of the rules, or write this use of it as "
          "a product."
        ) from None
    env |= dict(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _live(jaxpr: Jaxpr) -> list[JaxprEqn]:
  """Return the equations that an output or an effect needs, in order."""
  needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  live = []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or any(v in needed for v in eqn.outvars):
      live.append(eqn)
      needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
  return live[::-1]


def _evaluate(eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
  with eqn.ctx.manager:  # the context of the trace: device placement, metadata
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
  return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _rewrite(eqn: JaxprEqn, inputs: list[Any], used: set[str]) -> list[Any]:
  """Return the outputs of an equation that has at least one kernel among its inputs."""
  name, params = eqn.primitive.name, eqn.params
  kernels = [n for n, x in enumerate(inputs) if isinstance(x, LowRank)]
  if name in _CALLS:
    body = params[_CALLS[name]]
    return run(body.jaxpr, body.consts, inputs, used)
  if name in _CONTROL:
    return _CONTROL[name](eqn, inputs, used)
  if name in _SAME:
    plain = [x.value if isinstance(x, LowRank) else x for x in inputs]
    outputs = _evaluate(eqn, plain)
    for n in kernels:
      outputs[n] = inputs[n].map(lambda x, _: x, outputs[n])
    return outputs
  if name in ("dot_general", "conv_general_dilated"):
    return [_product(eqn, inputs, kernels, used)]
  if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
    output: Any = eqn.outvars[0].aval
    return [low_rank.reshape(inputs[0], output.shape)]
  if name in _MOVES and kernels == [0]:
    moved = _MOVES[name](inputs[0], params, *inputs[1:])
    return moved if isinstance(moved, list) else [moved]
  raise NotFollowed(f"the operation `{name}`")


def _product(eqn: JaxprEqn, inputs: list[Any], kernels: list[int], used: set[str]) -> Any:
  """Return x W + (x a) b for a matrix product or a convolution."""
  name, params = eqn.primitive.name, eqn.params
  if len(kernels) == 2:
    other = inputs[1].name
    raise NotFollowed(f"`{name}` together with the adapted kernel {other!r}")
  (position,) = kernels
  kernel, x = inputs[position], inputs[1 - position]
  if name == "dot_general":
    update = low_rank.matrix_product(x, kernel, params, kernel_first=position == 0)
  elif position == 1:
    update = low_rank.convolution(x, kernel, params)
  else:
    raise NotFollowed(f"`{name}` as the signal, not as the kernel")
  plain = [x.value if isinstance(x, LowRank) else x for x in inputs]
  (base,) = _evaluate(eqn, plain)
  used.add(kernel.name)
  return base + update.astype(base.dtype)


# Control flow.


def _remat(eqn: JaxprEqn, inputs: list[Any], used: set[str]) -> list[Any]:
  inner = eqn.params["jaxpr"]
  body = lambda *args: run(inner, getattr(inner, "consts", []), args, used)
  keep = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
  return jax.checkpoint(body, **keep)(*inputs)


def _cond(eqn: JaxprEqn, inputs: list[Any], used: set[str]) -> list[Any]:
  index, *operands = inputs

  def branch(body: Any) -> Callable[..., list[Any]]:
    return lambda *args: _arrays(run(body.jaxpr, body.consts, args, used), "a branch of `cond`")

  return jax.lax.switch(index, [branch(body) for body in eqn.params["branches"]], *operands)


def _arrays(outputs: list[Any], where: str) -> list[Any]:
  if any(isinstance(x, LowRank) for x in outputs):
    raise NotFollowed(f"the outputs of {where}")
  return outputs


def _steady(body: Any, num_consts: int, carry: Sequence[Any]) -> list[int]:
  """Return the positions of the kernels in the carry of a loop.

  Raises:
    NotFollowed: the body changes one of these kernels. They must be constants of the loop.
  """
  kernels = [n for n, x in enumerate(carry) if isinstance(x, LowRank)]
  if any(body.jaxpr.outvars[n] is not body.jaxpr.invars[num_consts + n] for n in kernels):
    raise NotFollowed("the carry of a loop that changes it")
  return kernels


def _while(eqn: JaxprEqn, inputs: list[Any], used: set[str]) -> list[Any]:
  params = eqn.params
  test, body, of_test = params["cond_jaxpr"], params["body_jaxpr"], params["cond_nconsts"]
  first = of_test + params["body_nconsts"]
  test_consts, body_consts, carry = inputs[:of_test], inputs[of_test:first], inputs[first:]
  held = _steady(body, len(body_consts), carry)
  moving = [n for n in range(len(carry)) if n not in held]

  def whole(now: Sequence[Any]) -> list[Any]:
    full = list(carry)
    for n, x in zip(moving, now, strict=True):
      full[n] = x
    return full

  def step(now: list[Any]) -> list[Any]:
    after = run(body.jaxpr, body.consts, [*body_consts, *whole(now)], used)
    return _arrays([after[n] for n in moving], "a step of `while`")

  go_on = lambda now: run(test.jaxpr, test.consts, [*test_consts, *whole(now)], used)[0]
  return whole(jax.lax.while_loop(go_on, step, [carry[n] for n in moving]))


def _scan(eqn: JaxprEqn, inputs: list[Any], used: set[str]) -> list[Any]:
  """Run a scan with kernels among its constants, its xs, or its carry if no step changes them."""
  body = eqn.params["jaxpr"]
  # JAX 0.10 and 0.12 store the numbers of constants and of carried values in different places
  # (docs/hazards.md#jaxpr-names). Both follow from the shapes: only the xs, and the ys among the
  # outputs, have one more axis outside the body than in it.
  alike = lambda outer, inner: sum(
    x.aval.shape == y.aval.shape for x, y in zip(outer, inner, strict=True)
  )
  last = alike(eqn.invars, body.jaxpr.invars)
  num_consts = last - alike(eqn.outvars, body.jaxpr.outvars)
  consts, carry, xs = inputs[:num_consts], inputs[num_consts:last], inputs[last:]
  held = _steady(body, num_consts, carry)
  moving = [n for n in range(len(carry)) if n not in held]
  parts = [_scanned(x) if isinstance(x, LowRank) else x for x in xs]

  def step(now: list[Any], numbered: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
    number, slices = numbered
    full = list(carry)
    for n, x in zip(moving, now, strict=True):
      full[n] = x
    slices = [
      _slice(x, s, number) if isinstance(x, LowRank) else s for x, s in zip(xs, slices, strict=True)
    ]
    outputs = run(body.jaxpr, body.consts, [*consts, *full, *slices], used)
    after, ys = outputs[: len(carry)], outputs[len(carry) :]
    return _arrays([after[n] for n in moving], "a step of `scan`"), ys

  keep = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
  numbers = jnp.arange(keep["length"])
  after, ys = jax.lax.scan(step, [carry[n] for n in moving], (numbers, parts), **keep)
  full = list(carry)
  for n, x in zip(moving, after, strict=True):
    full[n] = x
  return [*full, *(_stacked(y) if isinstance(y, LowRank) else y for y in ys)]


def _scanned(kernel: LowRank) -> dict[str, Any]:
  """Return the arrays of a kernel that `scan` slices: W, and the factors with its first axis."""
  factors = zip("ab", kernel.factors, strict=True)
  first = {k: jnp.moveaxis(x, of.index(0), 0) for k, (x, of) in factors if 0 in of}
  return {"value": kernel.value} | first


def _slice(kernel: LowRank, arrays: dict[str, Any], number: jax.Array) -> LowRank:
  """Return the kernel of step `number`, from the slices of the arrays of `_scanned`."""
  for name, row, of in zip("ab", kernel.rows, (kernel.of_a, kernel.of_b), strict=True):
    if row is not None and row.table.size and of[0] == 0:
      arrays |= {name: _also(arrays[name], row.layer(number))}
  rest = lambda of: tuple(n for n in of if n != 0)
  sliced = dataclasses.replace(kernel, of_a=rest(kernel.of_a), of_b=rest(kernel.of_b), **arrays)
  return sliced.renamed(lambda n: n - 1)


def _stacked(kernel: LowRank) -> LowRank:
  """Label the first axis of arrays that `scan` stacked: it is one of layers."""
  later = kernel.renamed(lambda n: n + 1)
  return dataclasses.replace(later, of_a=(0, *later.of_a), of_b=(0, *later.of_b))


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "remat2": _remat, "checkpoint": _remat}
