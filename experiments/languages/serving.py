"""Store the languages' parameters, answer a batch of mixed languages, and export one language."""

import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shrinkmeta as sm
from experiments.datasets.text import windows
from experiments.datasets.text.declarations import Version
from experiments.languages import model
from experiments.networks import llama
from experiments.settings.schema import Config

PyTree = Any


def serve(
  config: Config,
  learner: sm.MetaLearner,
  state: sm.MetaState,
  thetas: PyTree,
  versions: Sequence[Version],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Save the deltas of all languages, serve a mixed batch, and export the first language.

  Args:
    config: the settings.
    learner: the learner of sigma_imaml_chosen.
    state: the state of the learner. Its constants are a `sm.lora.Base`.
    thetas: the adapted parameters of the languages, leaves [T, ...].
    versions: the T languages.
    folder: receives the folders `deltas`, `peft` and `merged`, which are replaced.

  Returns:
    Bytes, seconds and differences, for the report.
  """
  for name in ("deltas", "peft", "merged"):
    shutil.rmtree(folder / name, ignore_errors=True)
  ids = [version.code for version in versions]
  sm.save_deltas(folder / "deltas", sm.deltas(learner, state, thetas, ids))
  deltas = sm.load_deltas(folder / "deltas", state)
  same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), deltas.thetas, thetas)
  mixed, seconds = _mixed(config, learner, state, deltas, versions)
  return {
    "languages": len(ids),
    "bytes_on_disk": sum(f.stat().st_size for f in (folder / "deltas").rglob("*") if f.is_file()),
    "bytes_a_language": sum(x.nbytes for x in jax.tree.leaves(thetas)) // len(ids),
    "read_as_written": all(jax.tree.leaves(same)),
    **mixed,
    **seconds,
    **_export(config, state, thetas, versions[0], folder),
  }


def _mixed(
  config: Config,
  learner: sm.MetaLearner,
  state: sm.MetaState,
  deltas: sm.Deltas,
  versions: Sequence[Version],
) -> tuple[dict[str, Any], dict[str, float]]:
  """Answer the first window of all languages at once, and each language by itself."""
  batches = model.judged(config, versions, 1)
  index = deltas.index([version.code for version in versions])
  inputs = jnp.asarray(np.concatenate([batch.inputs for batch in batches]))
  targets = jnp.asarray(np.concatenate([batch.targets for batch in batches]))
  likelihood = learner.spec.likelihood
  serve = jax.jit(lambda *arguments: sm.predict_tasks(likelihood, *arguments))
  constants = sm.with_constants(likelihood, state.constants)
  alone = jax.jit(lambda theta, inputs: constants.predict(sm.merge(theta, state.phi), inputs))

  def together() -> jax.Array:
    return serve(state, deltas.anonymous(), index, inputs)

  def one_by_one() -> jax.Array:
    thetas = [jax.tree.map(lambda x, t=t: x[t], deltas.thetas) for t in range(len(versions))]
    return jnp.concatenate([alone(theta, inputs[t : t + 1]) for t, theta in enumerate(thetas)])

  logits, seconds = {}, {}
  for name, run in (("together", together), ("one_by_one", one_by_one)):
    jax.block_until_ready(run())  # compiles
    start = time.perf_counter()
    logits[name] = jax.block_until_ready(run())
    seconds[f"seconds_{name}"] = time.perf_counter() - start
  count = windows.num_targets(sm.Batch(None, targets))
  bits = {
    f"bits_{name}": float(
      windows.bits_per_byte(-np.sum(np.asarray(likelihood.log_prob(x, targets))), count)
    )
    for name, x in logits.items()
  }
  far = float(jnp.max(jnp.abs(logits["together"] - logits["one_by_one"])))
  return {"rows": len(versions), "largest_logit_difference": far, **bits}, seconds


def _export(
  config: Config,
  state: sm.MetaState,
  thetas: PyTree,
  version: Version,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Write one language for PEFT and as a whole Llama model; read the model and compare logits."""
  base = state.constants
  own = sm.merge(jax.tree.map(lambda x: x[0], thetas), state.phi)
  whole = sm.lora.join(own, base.A)
  sm.export.peft(folder / "peft", whole, llama.modules(), alpha=None, base="base")
  names, about = llama.names(model.network(config)), model.document(config)
  sm.export.merged(folder / "merged", base.params, whole, names, config=about)
  found, params = llama.read(folder / "merged")
  inputs = jnp.asarray(model.judged(config, [version], 4)[0].inputs)
  likelihood = sm.lora.attach(model.predict(config))
  want = jax.jit(likelihood)(own, inputs, base)
  have = jax.jit(lambda p, x: llama.apply(found, p, x.astype(jnp.int32)))(params, inputs)
  return {
    "exported": version.code,
    "peft_bytes": (folder / "peft" / "adapter_model.safetensors").stat().st_size,
    "merged_bytes": (folder / "merged" / "model.safetensors").stat().st_size,
    "export_logit_difference": float(jnp.max(jnp.abs(want - have))),
  }
