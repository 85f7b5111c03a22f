"""Predict examples of different tasks in one batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.adapters.lora import Attached
from shrinkmeta.base import MetaState
from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree
from shrinkmeta.devices.batching import check_automatic
from shrinkmeta.mode.frozen import merge
from shrinkmeta.model.likelihood import Likelihood, check_likelihood
from shrinkmeta.model.tasks import check_inputs
from shrinkmeta.model.variants import with_constants
from shrinkmeta.serving.deltas import (
  Deltas,
  check_deltas,
  check_fingerprint,
  fingerprint,
)

PyTree = Any


def predict_tasks(
  likelihood: Likelihood,
  state: MetaState | PyTree,
  deltas: Deltas,
  index: jax.typing.ArrayLike,
  inputs: PyTree,
) -> PyTree:
  """Predict each of N examples with the adapted parameters of its own task.

    outputs_n = predict(theta_t, x_n),   t = index_n

  theta_t has the adapted parameters of task t in task-specific modules, and phi in frozen ones.

  Parameters of frozen modules have no example axis. A frozen dense layer is one matrix product over
  all N examples, and a frozen convolution is one convolution of a batch of N. Parameters of
  task-specific modules are gathered to [N, ...], which takes N times their bytes. If the network is
  the result of `sm.lora.attach` and scans over layers, adapters of stacked kernels take N times the
  bytes of one layer. A task-specific dense layer is a batched product, and a task-specific
  convolution is a grouped convolution.

  `predict` sees each example alone, as a batch of one. An example may have axes of its own, such as
  the tokens of a sequence: [N, tokens, ...]. If `predict` treats consecutive entries of the leading
  axis as one example, reshape `inputs` before the call, so that these entries have an axis of their
  own. A layer that normalises by batch statistics sees one example only. It normalises over its
  pixels or tokens; without them the output of the layer ignores its input. Use running statistics
  instead, or normalise over the axes of an example.

  `index` may be traced, so one compiled program serves every mixture of tasks. Each N needs its own
  program: pad `index` and `inputs` to few sizes, such as powers of two. The result is
  differentiable in `state.phi`, `deltas` and `inputs`. `deltas` may be split over the devices of
  `sm.task_mesh` along the axis T: XLA then adds the communication.

  Args:
    likelihood: the model. The outputs of `likelihood.predict(theta, inputs)` must have the leading
      axis of `inputs`.
    state: the state from which the tasks were adapted. Its phi alone serves too, if there are no
      constants.
    deltas: the adapted parameters of T tasks.
    index: [N] integers in [0, T), the position of each example's task: see `Deltas.index`.
    inputs: N examples, leaves [N, ...].

  Returns:
    The outputs of the N examples, leaves [N, ...]. If a traced `index` is outside [0, T), the
    example's task-specific parameters are NaN.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: shapes do not fit, or an array is split over explicit axes of a mesh; outside jit
      also if `deltas` belong to another phi, or an index is outside [0, T).

  Example:
    >>> import jax, jax.numpy as jnp, shrinkmeta as sm
    >>> params = {"level": jnp.zeros(()), "slope": jnp.ones(2)}
    >>> likelihood = sm.gaussian(lambda p, x: x @ p["slope"] + p["level"], scale=1.0)
    >>> learner = sm.hand_picked(likelihood, sm.by_leaf(params), task_specific=["level"])
    >>> state = learner.init(params)
    >>> thetas = {"level": jnp.array([10.0, 20.0]), "slope": None}
    >>> own = sm.deltas(learner, state, thetas, ["ann", "bob"])
    >>> serve = jax.jit(lambda *arguments: sm.predict_tasks(likelihood, *arguments))
    >>> index, inputs = own.index(["bob", "ann", "bob"]), jnp.ones([3, 2])
    >>> rows = 1 << (len(index) - 1).bit_length()  # 4, to which 3 rows are padded
    >>> pad = lambda x: jnp.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])
    >>> serve(state, own.anonymous(), pad(index), pad(inputs))[:3]
    Array([22., 12., 22.], dtype=float32)
  """
  check_likelihood("likelihood", likelihood)
  check_deltas("deltas", deltas)
  whole = isinstance(state, MetaState)
  phi, constants = (state.phi, state.constants) if whole else (state, None)
  parameter_tree("state", phi)
  _check_phi(state, deltas)
  validate.array("index", index, "an array [N] of integers, as deltas.index(ids) makes it")
  index = _checked_index(index, deltas.num_tasks)
  _check_rows(inputs, index.shape[0])
  check_automatic({"deltas": deltas.thetas, "index": index, "inputs": inputs})
  return _of_rows(with_constants(likelihood, constants), phi, deltas.thetas, index, inputs)


def _of_rows(
  likelihood: Likelihood, phi: PyTree, thetas: PyTree, index: jax.Array, inputs: PyTree
) -> PyTree:
  """Return the outputs of `predict_tasks`, from a likelihood that holds its constants."""
  # Without wrap_negative_indices=False the index -1 would mean the last task.
  take = lambda x: (
    jnp.asarray(x).at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
  )
  attached = isinstance(getattr(likelihood.predict, "predict", None), Attached)

  def one(own: PyTree, task: jax.Array, example: PyTree) -> PyTree:
    rows = {"rows": (thetas, task)} if attached else {}
    batch = jax.tree.map(lambda x: x[None], example)
    outputs = likelihood.predict(merge(own, phi), batch, **rows)
    for name, leaf in validate.leaves_with_names(outputs, "outputs"):
      if jnp.shape(leaf)[:1] != (1,):
        raise ValueError(
          f"likelihood.predict must return {name.rstrip('/')} with the leading axis of inputs; "
          f"for a batch of one example it returned shape {jnp.shape(leaf)}."
        )
    return jax.tree.map(lambda x: x[0], outputs)

  return jax.vmap(one)(jax.tree.map(take, thetas), index, jax.tree.map(jnp.asarray, inputs))


def _check_phi(state: MetaState | PyTree, deltas: Deltas) -> None:
  """Raise an error unless `deltas` fit phi and, if its values are known, come from it."""
  whole = isinstance(state, MetaState)
  phi = state.phi if whole else state
  shared = dict(validate.leaves_with_names(phi))
  for path, leaf in validate.leaves_with_names(deltas.thetas):
    if path not in shared:
      raise ValueError(f"deltas have {path!r}, which is no parameter of state: {list(shared)}.")
    want = (deltas.num_tasks, *jnp.shape(shared[path]))
    if jnp.shape(leaf) != want or jnp.result_type(leaf) != jnp.result_type(shared[path]):
      raise ValueError(
        f"deltas.thetas/{path} is {jnp.result_type(leaf)}{list(jnp.shape(leaf))}; by state.phi it "
        f"must be {jnp.result_type(shared[path])}{list(want)}."
      )
  wanted = {path for path, _ in validate.leaves_with_names(phi, "phi")}
  have = {k: v for k, v in deltas.fingerprint.items() if k.split("/")[0] == "phi"}
  if have.keys() != wanted:
    raise TypeError(
      "state must be the shrinkmeta.MetaState of deltas, or its phi with the same structure; it "
      f"has the leaves {list(shared)}, and deltas come from {list(have)}."
    )
  used = (phi, state.constants if isinstance(state, MetaState) else None)
  if validate.readable(used):
    check_fingerprint(deltas.fingerprint if whole else have, fingerprint(state), "These Deltas")


def _checked_index(index: Any, num_tasks: int) -> jax.Array:
  """Return `index` as an array [N] of integers, after a check that known entries are in [0, T)."""
  shape, dtype = jnp.shape(index), jnp.result_type(index)
  if len(shape) != 1 or not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"index must be integers [N], the place of each row's task; got {dtype}{list(shape)}. "
      "deltas.index(ids) makes it from ids."
    )
  value = validate.known(index)
  if value is not None and value.size and not (0 <= value.min() and value.max() < num_tasks):
    bad = int(np.flatnonzero((value < 0) | (value >= num_tasks))[0])
    raise ValueError(
      f"index[{bad}] is {value[bad]}; it must be in [0, T) with T = {num_tasks}, the tasks of "
      "deltas. deltas.index(ids) makes it from ids."
    )
  return jnp.asarray(index)


def _check_rows(inputs: PyTree, rows: int) -> None:
  """Raise an error unless every leaf has the leading axis N = `rows`."""
  check_inputs(inputs)
  for name, leaf in validate.leaves_with_names(inputs, "inputs"):
    if jnp.shape(leaf)[:1] != (rows,):
      raise ValueError(
        f"{name.rstrip('/')} must lead with N = {rows}, the length of index; its shape is "
        f"{jnp.shape(leaf)}."
      )
