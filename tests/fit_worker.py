"""A small training run in a process of its own, for tests that need devices, processes or kills.

Writes the last state to `--out`, as .npz, in process 0.
"""

import argparse
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from shrinkmeta.checks.validate import leaves_with_names

ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("--devices", type=int, default=1)
ARGUMENTS.add_argument("--coordinator", default=None)
ARGUMENTS.add_argument("--processes", type=int, default=1)
ARGUMENTS.add_argument("--process", type=int, default=0)
ARGUMENTS.add_argument("--x64", action="store_true")
ARGUMENTS.add_argument("--algorithm", default="sigma_imaml")
ARGUMENTS.add_argument("--steps", type=int, default=20)
ARGUMENTS.add_argument("--meta_batch", type=int, default=8)
ARGUMENTS.add_argument("--micro_batches", type=int, default=1)
ARGUMENTS.add_argument("--batch_size", type=int, default=None)
ARGUMENTS.add_argument("--width", type=int, default=8)
ARGUMENTS.add_argument("--folder", default=None)
ARGUMENTS.add_argument("--every", type=int, default=5)
ARGUMENTS.add_argument("--out", default=None)


def source(first: int, count: int) -> sm.Task:
  """Sinusoids of random amplitude and phase, task i by its index alone."""

  def one(i: jax.Array) -> sm.Task:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
    amplitude = jax.random.uniform(keys[0], minval=0.1, maxval=5.0)
    phase = jax.random.uniform(keys[1], maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (12, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x[:, 0] - phase)
    return sm.Task(sm.Batch(x[:6], y[:6]), sm.Batch(x[6:], y[6:]))

  return jax.vmap(one)(jnp.arange(first, first + count))


def make_learner(
  algorithm: str,
  mesh: jax.sharding.Mesh | None,
  width: int,
  steps: int = 5,
  batch_size: int | None = None,
) -> tuple[sm.MetaLearner, dict[str, dict[str, jax.Array]]]:
  """A learner of a 1-width-width-1 network, and its first parameters."""
  keys = jax.random.split(jax.random.key(0), 3)
  sizes = [1, width, width, 1]
  params = {
    f"layer_{i}": {"w": jax.random.normal(keys[i], (a, b)) / a**0.5, "b": jnp.zeros(b)}
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
  }

  def predict(p: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for i in range(2):
      x = jnp.tanh(x @ p[f"layer_{i}"]["w"] + p[f"layer_{i}"]["b"])
    return (x @ p["layer_2"]["w"] + p["layer_2"]["b"])[:, 0]

  make = getattr(sm, algorithm)
  inner = sm.Inner(optax.sgd(0.02), steps=steps, batch_size=batch_size)
  labels = sm.by_layer(params)
  return make(sm.gaussian(predict, 1.0), labels, inner=inner, mesh=mesh), params


def main() -> None:
  """Runs what the arguments say."""
  arguments = ARGUMENTS.parse_args()
  jax.config.update("jax_enable_x64", arguments.x64)
  jax.config.update("jax_num_cpu_devices", arguments.devices)
  if arguments.processes > 1:
    jax.distributed.initialize(
      arguments.coordinator, arguments.processes, arguments.process, initialization_timeout=60
    )
  mesh = sm.task_mesh() if jax.device_count() > 1 else None
  settings = (arguments.algorithm, mesh, arguments.width)
  learner, params = make_learner(*settings, batch_size=arguments.batch_size)
  records: list[dict[str, float]] = []
  callbacks = [sm.recorder(records)]
  checkpoints = None
  if arguments.folder is not None:
    checkpoints = sm.Checkpoints(arguments.folder, every=arguments.every)
    callbacks.append(sm.json_lines(os.path.join(arguments.folder, "log.jsonl")))
  state = sm.fit(
    learner,
    learner.init(params),
    source,
    arguments.steps,
    meta_batch=arguments.meta_batch,
    micro_batches=arguments.micro_batches,
    key=None if arguments.batch_size is None else jax.random.key(7),
    callbacks=callbacks,
    checkpoints=checkpoints,
  )
  if arguments.out is not None and jax.process_index() == 0:
    leaves = {name: np.asarray(leaf) for name, leaf in leaves_with_names(state)}
    names = records[0] if records else ()
    metrics = {f"metrics/{name}": np.array([r[name] for r in records]) for name in names}
    path = pathlib.Path(arguments.out)
    with path.with_suffix(".part").open("wb") as file:
      np.savez(file, **leaves, **metrics)
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
  main()
