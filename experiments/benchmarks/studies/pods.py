"""A cost model of a meta-step on many chips: seconds of computation and of communication.

n devices share T tasks. A device computes for

    ceil(T / n) * flops of a task / (peak * utilisation)

seconds. Once in a meta-step, the devices add up the gradients of phi and sigma and the metrics, b
bytes in all. b does not depend on the number of inner steps or of products in a solve. The sum
takes

    2 (n - 1) / n * b / bandwidth + hops * latency

seconds, with 2 (n - 1) hops on a ring, 4 (sqrt n - 1) on a torus of two dimensions and 2 log2 n on
a tree. The study checks b against programs that XLA compiles for meshes of simulated devices.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax

import shrinkmeta as sm
from experiments.benchmarks import flops, hlo, report, workloads
from experiments.benchmarks.worker import Config, run_python


class Chip(NamedTuple):
  """One device and its links, in flops, bytes and seconds."""

  peak: float
  bandwidth: float  # bytes a second that a device sends while all send
  latency: float  # of one hop
  links: Literal["ring", "torus", "tree"]
  utilisation: float = 0.3


# Peaks of bfloat16, makers' figures; latencies and the utilisation are guesses to be replaced.
CHIPS = {
  "TPU v5e": Chip(197e12, 100e9, 1e-6, "torus"),
  "H100": Chip(989e12, 50e9, 5e-6, "tree"),
}


def compute_seconds(chip: Chip, task_flops: float, tasks: int, devices: int) -> float:
  """Return the seconds for which the busiest device computes."""
  return -(-tasks // devices) * task_flops / (chip.peak * chip.utilisation)


def reduce_seconds(chip: Chip, size: int, devices: int) -> float:
  """Return the seconds of one all-reduce of `size` bytes."""
  hops = {
    "ring": 2 * (devices - 1),
    "torus": 4 * (math.sqrt(devices) - 1),
    "tree": 2 * math.log2(devices),
  }[chip.links]
  return 2 * (devices - 1) / devices * size / chip.bandwidth + hops * chip.latency


def communication(chip: Chip, row: Mapping[str, float], steps: int, tasks_a_device: int) -> float:
  """Return the share of a meta-step's seconds spent on communication, if it overlaps no work."""
  devices = int(row["devices"])
  work = row["task_flops_a_step"] * steps + row["task_flops_besides"]
  seconds = compute_seconds(chip, work, tasks_a_device * devices, devices)
  sent = reduce_seconds(chip, int(row["all_reduce_bytes"]), devices)
  return sent / (seconds + sent)


def pods(config: Config) -> Iterator[report.Record]:
  """Yield a record for meshes of 8, 64 and 512 devices, one task each; programs are not run."""
  for devices in (8,) if config.tiny else (8, 64, 512):
    row = _spawn(config, devices)
    for name, chip in CHIPS.items():
      for steps in (10, 100, 1000):
        row[f"% communication, {name}, L = {steps}"] = 100 * communication(chip, row, steps, 1)
    yield row


def _spawn(config: Config, devices: int) -> report.Record:
  request = json.dumps({"workload": config.workload, "tiny": config.tiny, "devices": devices})
  program = "import sys; from experiments.benchmarks.studies import pods; pods.main(sys.argv[1])"
  return run_python(["-c", program, request], f"Compiling for {devices} devices")


def main(request: str) -> None:
  """Print the record of one mesh as a line; `_spawn` starts the process that calls this."""
  wanted = json.loads(request)
  jax.config.update("jax_num_cpu_devices", wanted["devices"])
  print(json.dumps(compiled_for(wanted["workload"], wanted["tiny"])), flush=True)


def compiled_for(name: str, tiny: bool) -> report.Record:
  """Return sizes of sigma_imaml's compiled update on all devices, for L and 10 L inner steps."""
  mesh, found = sm.task_mesh(), []
  devices = mesh.size
  workload = workloads.load(name, tiny, tasks=devices)
  whole, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("tasks")))
  for steps in (workload.mode_steps, 10 * workload.mode_steps):
    workload = workloads.load(name, tiny, tasks=devices, mode_steps=steps)
    problem = workloads.make_problem(workload, 0)
    learner = workloads.make_learner(
      workload, "sigma_imaml", problem, mesh=mesh, batching="vmap", curvature="gauss_newton"
    )
    like = lambda sharding: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(like(whole), jax.eval_shape(learner.init, problem.params))
    tasks = jax.tree.map(like(split), problem.tasks)
    key = jax.tree.map(like(whole), jax.eval_shape(lambda: jax.random.key(0)))
    compiled = jax.jit(learner.update).lower(state, tasks, key).compile()
    found.append((hlo.collectives(compiled.as_text() or ""), sm.program_cost(compiled)))
  if found[0][0] != found[1][0] or [kind for kind, _ in found[0][0]] != ["all-reduce"]:
    raise AssertionError(f"Not one all-reduce of one size: {[sent for sent, _ in found]}.")
  needed = [n.bytes if n is not None else None for _, n in found]
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  per_step = lambda steps: (
    flops.step(
      workloads.load(name, tiny, tasks=devices, mode_steps=steps), "sigma_imaml", "gauss_newton"
    )
    / devices
  )
  return {
    "workload": name,
    "devices": devices,
    "all_reduce_bytes": found[0][0][0][1],
    "phi_and_sigma_bytes": size((state.phi, state.log_sigma2)),
    "task_flops_a_step": per_step(2) - per_step(1),
    "task_flops_besides": per_step(0),
    "bytes_a_device": needed[0],
    "bytes_a_device_at_10_L": needed[1],
  }
