"""Memory of an update, and its precision in bfloat16."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

import shrinkmeta as sm
from experiments.benchmarks import measure, report, workloads
from experiments.benchmarks.studies.solves import against
from experiments.benchmarks.worker import Config, make_step


def memory(config: Config) -> Iterator[report.Record]:
  """Yield the temporaries of an update on W2 by XLA's analysis; the program is not run.

  In the records, `sample` is `Implicit.batch_size`, which is also the batch size of an inner step,
  and `batches` is `Implicit.num_batches`. None stands for all examples.
  """
  long = 4 if config.tiny else 100
  w2 = workloads.load("w2", config.tiny)
  whole = sm.Implicit(max_steps=w2.cg, tol=0.0)
  one = dataclasses.replace(whole, batch_size=w2.batch_size)
  all_in_turn = dataclasses.replace(one, num_batches=None)
  for algorithm, steps, implicit in (
    ("sigma_imaml", long, whole),
    ("sigma_imaml", 4 * long, whole),
    ("sigma_imaml", long, one),
    ("sigma_imaml", long, all_in_turn),
    ("sigma_imaml", 4 * long, all_in_turn),
    ("maml", long // 4, None),
  ):
    workload = workloads.load("w2", config.tiny, steps=steps, mode_steps=steps, tasks=config.tasks)
    keywords: dict[str, Any] = {} if implicit is None else {"implicit": implicit}
    step = make_step(workload, algorithm, config.seed, batching=config.batching, **keywords)
    compiled = measure.compile_step(step.call, *step.arguments)
    temp = None if compiled.temp_bytes is None else compiled.temp_bytes / 2**20
    yield {
      "algorithm": algorithm,
      "steps": steps,
      "sample": implicit and implicit.batch_size,
      "batches": implicit and implicit.num_batches,
      "devices": jax.device_count(),
      "temp_MB_a_device": temp,
      "trace_seconds": compiled.trace_seconds,
      "compile_seconds": compiled.compile_seconds,
    }


def precision(config: Config) -> Iterator[report.Record]:
  """Compare the meta-gradient of sigma_imaml in bfloat16 and float32: bias, time and memory.

  The third record is float32 on other random tasks. It shows how much two meta-batches differ
  anyway.
  """
  calls, results, temporaries = {}, {}, {}
  for name, compute, seed in (
    ("float32", "float32", config.seed),
    ("bfloat16", "bfloat16", config.seed),
    ("float32, other tasks", "float32", config.seed + 1),
  ):
    workload = workloads.load(config.workload, config.tiny, tasks=config.tasks, compute=compute)
    make = lambda seed, workload=workload: make_step(
      workload, "sigma_imaml", seed, batching=config.batching, curvature="gauss_newton"
    )
    step = make(config.seed)
    state, tasks, key = step.arguments
    if seed != config.seed:
      tasks = make(seed).arguments[1]
    arguments = (state, tasks, key)
    gradient = lambda state, tasks, key, step=step: step.learner.meta_gradient(state, tasks, key)
    compiled = measure.compile_step(gradient, *arguments)
    calls[name] = lambda call=compiled.call, arguments=arguments: call(*arguments)
    results[name] = jax.block_until_ready(calls[name]())
    temporaries[name] = compiled.temp_bytes
  timings = measure.time_in_turn(calls, config.repetitions, config.max_seconds)
  exact = results["float32"][0]
  for name, (grad, metrics) in results.items():
    yield {
      "network": name,
      **against(grad, exact),
      "loss": float(metrics.loss),
      "temp_bytes": temporaries[name],
      **measure.timing_fields(timings[name]),
    }
