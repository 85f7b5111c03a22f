"""The stages of a run: base, sigma, rates, adaptation, samples.

A stage writes its result whole or not at all. A second start reads the existing results, and
continues with the first missing one.
"""

import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shrinkmeta as sm
from experiments.datasets.speech.voices import Voices
from experiments.networks.audio import wavenet
from experiments.runs import files, training
from experiments.settings.schema import Config
from experiments.speech import arms, model, samples
from experiments.speech.arms import Arm

PyTree = Any
FORMAT = "shrinkmeta.experiments.speech/1"


def run(config: Config, seed: int, folder: pathlib.Path, data_dir: str | None) -> dict[str, Any]:
  """Run the stages whose results are missing in `folder`, and return the content of results.json.

  Raises:
    FileNotFoundError, ValueError: the data are missing or damaged, or the folder holds a run with
      other settings.
  """
  speakers = model.load(config, data_dir)
  about = {"format": FORMAT, "config": config.to_dict(), "seed": seed}
  about["data"] = files.fingerprint([v.levels for v in speakers.values()])
  files.begin_run(folder, about)
  base, losses = model.train_base(config, speakers["train"], seed, folder / "base")
  state = arms.learn_sigma(config, base, speakers["train"], seed, folder / "sigma_imaml")
  log = list(sm.read_json_lines(folder / "sigma_imaml" / "log.jsonl"))
  makers = {"sigma_imaml": arms.sigma_imaml(config, base), **arms.baselines(config, base)}
  methods = {}
  for name in config.methods:
    fresh = makers[name](sm.Inner(arms.decaying(0.1, 1.0), steps=0)).init(base)
    arm = Arm(makers[name], state if name == "sigma_imaml" else fresh)
    method = _Method(config, speakers, seed, arm, samples.deltas(folder, name))
    tuned = files.stage(folder / f"rate_{name}.json", lambda m=method, n=name: m.tune(n))
    methods[name] = tuned | files.stage(
      folder / f"adapted_{name}.json", lambda m=method, rate=tuned["rate"]: m.adapt(rate)
    )
  drawn = files.stage(
    folder / "samples.json", lambda: samples.stage(config, state, speakers["test"], seed, folder)
  )
  result = about | {
    "speakers": {split: list(v.names) for split, v in speakers.items()},
    "parameters": sum(x.size for x in jax.tree.leaves(base)),
    "base_nats": training.thinned(losses),
    "sigma": _sigma(config, state),
    "sigma_log": [{k: v for k, v in r.items() if k != "seconds"} for r in log],
    "methods": methods,
    "samples": drawn,
  }
  files.write_document(folder / "results.json", result)
  return result


def _sigma(config: Config, state: sm.MetaState) -> list[dict[str, Any]]:
  """Return sigma, size and the expected norm of an update, sigma sqrt(parameters), by layer."""
  table = []
  for module in wavenet.layers(model.network(config)):
    size = sum(x.size for x in jax.tree.leaves(state.phi[module]))
    sigma = float(jnp.exp(0.5 * state.log_sigma2[module]))
    norm = sigma * math.sqrt(size)
    table.append({"module": module, "parameters": size, "norm": norm, "sigma": sigma})
  return table


class _Method:
  """One method on the validation and test speakers."""

  def __init__(
    self, config: Config, speakers: Mapping[str, Voices], seed: int, arm: Arm, deltas: pathlib.Path
  ):
    self.config, self.speakers, self.seed = config, speakers, seed
    self.arm, self.deltas = arm, deltas
    self.programs: dict[tuple[int, ...], Any] = {}  # one for each tuple of steps

  def run(
    self, split: str, recordings: int, rate: float, steps: tuple[int, ...]
  ) -> tuple[PyTree, np.ndarray]:
    """Return (thetas after the last step, nats per sample [held out and train, T, S])."""
    voices, config = self.speakers[split], self.config
    everyone = range(len(voices.names))
    train = voices.batch(everyone, model.ADAPT[: recordings // 10])
    parts = (
      voices.batch(everyone, model.EVALUATE),
      voices.batch(everyone, model.ADAPT[:1]),
    )
    if steps not in self.programs:
      self.programs[steps] = arms.adapt_and_evaluate(config, self.arm.make, steps)
    rows = 10 * config.pieces.count * len(model.ADAPT)
    return jax.device_get(
      self.programs[steps](
        self.arm.state,
        arms.padded(train, rows),
        tuple(sm.Batch(*map(jnp.asarray, (b.inputs, b.targets))) for b in parts),
        jnp.float32(rate),
        jax.random.fold_in(jax.random.key(self.seed), 4),
      )
    )

  def tune(self, name: str) -> dict[str, Any]:
    """Return the rate and the step with the fewest nats on the validation speakers."""
    tune, found = self.config.tune, {}
    for rate in self.config.rates[name]:
      _, nats = self.run("val", tune.recordings, rate, tuple(tune.steps))
      found[rate] = np.nan_to_num(nats[0].mean(0), nan=math.inf)
    best = min(found, key=lambda rate: found[rate].min())
    return {
      "rate": best,
      "stop": int(tune.steps[int(found[best].argmin())]),
      "validation_nats": {str(r): v.tolist() for r, v in found.items()},
    }

  def adapt(self, rate: float) -> dict[str, Any]:
    """Return {"nats": {recordings: {part: [T, S]}}, "parameters": of one speaker}."""
    own, found, size = self.config.adapt, {}, 0
    shutil.rmtree(self.deltas, ignore_errors=True)
    for recordings in own.recordings:
      thetas, nats = self.run("test", recordings, rate, tuple(own.steps))
      found[str(recordings)] = {"held_out": nats[0].tolist(), "train": nats[1].tolist()}
      size = sum(x[0].size for x in jax.tree.leaves(thetas))
      if recordings == own.recordings[0]:
        learner = self.arm.make(sm.Inner(arms.decaying(rate, own.decay), steps=0))
        deltas = sm.deltas(learner, self.arm.state, thetas, self.speakers["test"].names)
        sm.save_deltas(self.deltas, deltas, state=self.arm.state)
    return {"nats": found, "parameters": size}
