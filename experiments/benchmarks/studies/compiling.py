"""Where the seconds before the first update go: which cache, which phase, which part."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.benchmarks import hlo, measure, report, workloads
from experiments.benchmarks.worker import Config, place, spawn
from experiments.runs import training

PyTree = Any
_OPERATIONS = 5  # of a program, that a record names
_RULES = {  # rank 4 on the kernels of attention, [in, heads, size] and back, and of the MLP
  r"attention/(query|key|value)/kernel": (4, "ioo"),
  r"attention/out/kernel": (4, "iio"),
  r"mlp_\d/kernel": 4,
}


def compilation(config: Config) -> Iterator[report.Record]:
  """Yield the seconds to trace, to compile, and from process start to the first finished update.

  XLA's compilation cache is off, then empty, then filled. Each measurement is a new process.
  """
  rounds = 1 if config.tiny else 3
  rows: dict[str, list[report.Record]] = {}
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as folder:
      for name, cache in (("off", None), ("being filled", folder), ("filled", folder)):
        once = dataclasses.replace(config, repetitions=1, max_seconds=1.0, cache=cache)
        rows.setdefault(name, []).append(spawn(once))
  for name, records in rows.items():
    fields = ("trace_seconds", "compile_seconds", "cold_start_seconds")
    spreads = {f: measure.spread([r[f] for r in records])._asdict() for f in fields}
    update = measure.spread([r["seconds"]["median"] for r in records])._asdict()
    row = {"workload": config.workload, "algorithm": config.algorithm, "cache": name}
    yield row | spreads | {"update_seconds": update}


class _Program(NamedTuple):
  """An update, with what the functions inside it are made of."""

  likelihood: sm.Likelihood
  params: PyTree
  tasks: sm.Task  # leaves lead with [T]
  learner: Callable[..., sm.MetaLearner]  # with the keyword mesh


def parts(config: Config) -> Iterator[report.Record]:
  """Yield the seconds to trace, lower and compile an update, and each part of it by itself.

  The parts are nested: the gradient holds the network, the inner loop holds the gradient, and so
  on. All but `update` are of one task on one device. A part occurs in the next one more than once
  if that one differentiates it, or has it inside and outside of a loop.

  `operations` counts those of the program that XLA gets, the body of a loop or of a function once.
  `kernels` counts the fused operations of the compiled program, for each of which LLVM is called,
  unless it is equal to another one. `most_kernels` names the operations of JAX that have most.
  """
  repetitions = min(config.repetitions, 1 if config.tiny else 3)
  for name, program in _programs(config):
    for part, (function, arguments) in _parts(program).items():
      phases = [measure.phases(function, *arguments) for _ in range(repetitions)]
      of = lambda field, phases=phases: measure.spread([getattr(p, field) for p in phases])
      kernels = hlo.kernels(phases[-1].compiled.as_text())
      most = kernels.most_common(_OPERATIONS)
      yield {
        "program": name,
        "part": part,
        "operations": phases[-1].operations,
        "trace_seconds": of("trace_seconds")._asdict(),
        "lower_seconds": of("lower_seconds")._asdict(),
        "compile_seconds": of("compile_seconds")._asdict(),
        "kernels": kernels.total(),
        "most_kernels": ", ".join(f"{operation} {count}" for operation, count in most),
      }


def _parts(program: _Program) -> dict[str, tuple[Callable[..., Any], Any]]:
  """Return {part: (function, arguments)}, from the inside out; the last one is the update."""
  learner, likelihood = program.learner(), program.likelihood
  state, one = learner.init(program.params), jax.tree.map(lambda x: x[:1], program.tasks)
  train = jax.tree.map(lambda x: x[0], program.tasks.train)

  def of_outputs(batch: sm.Batch, outputs: Any) -> jax.Array:
    return -jnp.mean(likelihood.log_prob(outputs, batch.targets))

  def loss(phi: PyTree, batch: sm.Batch) -> jax.Array:
    return of_outputs(batch, likelihood.predict(phi, batch.inputs))

  def product(phi: PyTree, batch: sm.Batch) -> PyTree:
    if learner.spec.implicit.curvature == "hessian":
      return jax.linearize(lambda phi: jax.grad(loss)(phi, batch), phi)[1](phi)
    outputs, jvp = jax.linearize(lambda phi: likelihood.predict(phi, batch.inputs), phi)
    along = jax.jvp(jax.grad(functools.partial(of_outputs, batch)), (outputs,), (jvp(phi),))[1]
    return jax.linear_transpose(jvp, phi)(along)[0]

  def mode_by(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    inner = dataclasses.replace(learner.spec.inner, optimizer=optimizer)
    given = likelihood, learner.labels
    return lambda phi, batch: sm.map_estimate(*given, phi, state.log_sigma2, batch, inner)

  mesh = training.host_mesh(sm.num_tasks(program.tasks))
  whole = program.learner(mesh=mesh)
  of_phi = state.phi, train
  return {
    "network, value": (loss, of_phi),
    "network, gradient": (jax.value_and_grad(loss), of_phi),
    "curvature product": (product, of_phi),
    "inner loop, SGD": (mode_by(optax.sgd(0.1)), of_phi),
    "inner loop, L-BFGS": (mode_by(sm.lbfgs()), of_phi),
    "meta-gradient of one task": (learner.meta_gradient, (state, one)),
    "update": (whole.update, place(mesh, whole.init(program.params), program.tasks)),
  }


def _programs(config: Config) -> Iterator[tuple[str, _Program]]:
  """Yield the programs by name: w1, low-rank adapters of a Transformer, README's first example."""
  w1 = workloads.load("w1", config.tiny)
  problem = workloads.make_problem(w1, config.seed)
  for algorithm in ("imaml",) if config.tiny else ("maml", "imaml", "sigma_imaml"):
    learner = functools.partial(
      workloads.make_learner, w1, algorithm, problem,
      curvature=config.curvature, batching=config.batching,
    )  # fmt: skip
    yield f"w1 {algorithm}", _Program(problem.likelihood, problem.params, problem.tasks, learner)
  yield "adapters sigma_imaml", _adapters(config)
  yield "README sigma_imaml", _readme(config)


def _adapters(config: Config) -> _Program:
  """Adapters of rank 4, on all kernels of a Transformer that the network closes over."""
  sizes = {"tasks": 2, "shots": 2, "queries": 2} if config.tiny else {"tasks": 8, "depth": 3}
  w4 = workloads.load("w4", config.tiny, **sizes, width=8 if config.tiny else 64)
  base = workloads.make_problem(w4, config.seed)
  adapted = sm.lora.attach(base.likelihood.predict)
  predict = lambda adapters, tokens: adapted(adapters, tokens, base.params)
  likelihood = sm.Likelihood(predict, base.likelihood.log_prob)
  adapters = sm.lora.init(jax.random.key(config.seed), base.params, _RULES)
  learner = functools.partial(sm.sigma_imaml, likelihood, sm.lora.labels(adapters))
  return _Program(likelihood, adapters, base.tasks, learner)


def _readme(config: Config) -> _Program:
  """A level and a slope of two inputs, a level for each of 100 tasks."""
  random = np.random.default_rng(config.seed)
  x = random.normal(size=(100, 16, 2)).astype(np.float32)
  noise = random.normal(size=(100, 16)) + random.normal(size=(100, 1))
  y = (x @ [2.0, -1.0] + noise).astype(np.float32)
  tasks = sm.Task(sm.Batch(x[:, :8], y[:, :8]), sm.Batch(x[:, 8:], y[:, 8:]))
  params = {"slope": np.zeros(2, np.float32), "level": np.zeros((), np.float32)}
  likelihood = sm.gaussian(lambda p, x: x @ p["slope"] + p["level"], scale=1.0)
  learner = functools.partial(sm.sigma_imaml, likelihood, sm.by_leaf(params))
  return _Program(likelihood, params, tasks, learner)
