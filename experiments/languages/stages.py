"""The stages of a run: base, sigma, choice, rates, adaptation, serving.

A stage writes its result whole or not at all. A second start reads the existing results, and
continues with the first missing one.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

import shrinkmeta as sm
from experiments.datasets.text import declarations, windows
from experiments.datasets.text.declarations import Version
from experiments.languages import arms, model, serving
from experiments.languages.arms import Arm
from experiments.runs import files, training
from experiments.settings.schema import Config

PyTree = Any
FORMAT = "shrinkmeta.experiments.languages/1"
_TOGETHER = 16  # languages that adapt in one call
_NO_STEPS = sm.Inner(optax.sgd(0.1), steps=0)  # for learners that only make or read states


class Split(NamedTuple):
  """The versions of the four groups of languages; no language is in two groups."""

  test: tuple[Version, ...]  # one version a language
  validation: tuple[Version, ...]  # likewise
  meta: tuple[Version, ...]  # sigma is learned on them
  base: tuple[Version, ...]  # the base is trained on them


class Ready(NamedTuple):
  """A method that can adapt to new languages."""

  arm: Arm
  state: sm.MetaState


def split_languages(config: Config, versions: Sequence[Version], seed: int) -> Split:
  """Return the groups of languages of a seed."""
  own = config.languages
  parts = declarations.split(versions, (own.test, own.validation, own.meta), seed)
  one = declarations.one_a_language
  return Split(one(parts[0]), one(parts[1]), parts[2], parts[3])


def run(config: Config, seed: int, folder: pathlib.Path, data_dir: str | None) -> dict[str, Any]:
  """Run the stages whose results are missing in `folder`, and return the content of results.json.

  Raises:
    FileNotFoundError, ValueError: the data are missing or damaged, or the folder holds a run with
      other settings.
  """
  synthetic = config.data == "synthetic"
  versions = declarations.synthetic() if synthetic else declarations.load(data_dir)
  split = split_languages(config, versions, seed)
  about = {"format": FORMAT, "config": config.to_dict(), "seed": seed}
  about["data"] = declarations.digest(versions)
  files.begin_run(folder, about)
  logging.info("%s: the base on %d versions", folder, len(split.base))
  base, losses = model.train_base(config, split.base, seed, folder / "base")
  made = arms.make_arms(config, base, seed)
  ready = {}
  for name, arm in made.items():
    if name not in (*config.methods, "sigma_imaml"):
      continue
    if name in arms.LEARNED:
      logging.info("%s: %s learns from %d languages", folder, name, config.languages.meta)
      state = arms.train(config, name, arm, split.meta, seed, folder / name)
    else:
      state = arm.make(_NO_STEPS).init(arm.params, constants=arm.constants)
    ready[name] = Ready(arm, state)
  choice = files.stage(folder / "choice.json", lambda: _choice(config, ready["sigma_imaml"], split))
  chosen = tuple(choice["modules"]) or (choice["curve"][1]["added"],)
  ready["sigma_imaml_chosen"] = _kept(config, ready["sigma_imaml"], chosen)
  judge = _Judge(config, split, seed)
  methods = {}
  for name in config.methods:
    method = judge.method(name, ready[name])
    tuned = files.stage(folder / f"rate_{name}.json", method.tune)
    methods[name] = tuned | files.stage(
      folder / f"adapted_{name}.json", lambda m=method, rate=tuned["rate"]: m.adapt(rate)
    )
  served = files.stage(
    folder / "served.json",
    lambda: judge.serve(ready["sigma_imaml_chosen"], methods["sigma_imaml_chosen"]["rate"], folder),
  )
  result = about | {
    "languages": {part: [v.code for v in getattr(split, part)] for part in Split._fields},
    "names": {v.code: v.name for v in (*split.test, *split.validation)},
    "judged_bytes": judge.counts["test"].tolist(),
    "parameters": sum(x.size for x in jax.tree.leaves(base)),
    "base_bits": training.thinned(losses),
    "sigma": _sigma(ready["sigma_imaml"]),
    "choice": choice,
    "chosen": list(chosen),
    "methods": methods,
    "served": served,
  }
  files.write_document(folder / "results.json", result)
  return result


def _up(count: int, multiple: int) -> int:
  """Return the smallest number that is at least `count` and divisible by `multiple`."""
  return -(-count // multiple) * multiple


def _sigma(ready: Ready) -> list[dict[str, Any]]:
  """Return sigma, size and the expected norm of an update, sigma sqrt(parameters), by module."""
  table = []
  sizes = jax.tree.leaves(jax.tree.map(lambda x: x.size, ready.arm.params))
  labels = jax.tree.leaves(sm.lora.labels(ready.arm.params))
  for module, size in zip(labels, sizes, strict=True):
    _, kernel, layer = module.split("/")
    sigma = float(jnp.exp(0.5 * ready.state.log_sigma2[module]))
    table.append(
      {"module": module, "kernel": kernel, "layer": int(layer.strip("[]"))}
      | {"parameters": size, "sigma": sigma, "norm": sigma * math.sqrt(size)}
    )
  return sorted(table, key=lambda row: (row["layer"], row["kernel"]))


def _choice(config: Config, ready: Ready, split: Split) -> dict[str, Any]:
  """Choose modules on the validation languages, among those with the largest expected updates."""
  own, versions = config.meta, split.validation
  by_norm = sorted(_sigma(ready), key=lambda row: -row["norm"])
  candidates = [row["module"] for row in by_norm[: config.choice.candidates]]
  learner = arms.learner_in_training(config, "sigma_imaml", ready.arm)
  small, state = learner.keep(ready.state, candidates)
  train = model.texts(config, versions, config.tune.articles, own.windows)
  val = model.judged(config, versions, 2 * own.windows)
  tasks = sm.Task(windows.padded(train, own.windows), windows.padded(val, 2 * own.windows))
  choice = sm.choose_modules(small, state, jax.tree.map(jnp.asarray, tasks), repeats=0)
  return {
    "candidates": candidates,
    "modules": list(choice.modules),
    "table": [row._asdict() for row in choice.table if row.module in candidates],
    "curve": [point._asdict() for point in choice.curve],
    "text": str(choice),
  }


def _kept(config: Config, ready: Ready, chosen: Sequence[str]) -> Ready:
  """Return sigma_imaml with only the chosen modules task-specific."""
  learner = arms.learner_in_training(config, "sigma_imaml", ready.arm)
  _, state = learner.keep(ready.state, chosen)
  return Ready(arms.with_frozen(config, ready.arm, chosen), state)


class _Judge:
  """The texts and evaluated windows of validation and test languages, in one shape for both."""

  def __init__(self, config: Config, split: Split, seed: int):
    self.config, self.split, self.seed = config, split, seed
    judged = {part: model.judged(config, getattr(split, part)) for part in ("validation", "test")}
    texts = [b for part in judged for b in model.texts(config, getattr(split, part), 20)]
    # Rounded up, so that seeds mostly have the same shapes, and a program compiles once for all.
    self.rows = _up(max(len(batch.inputs) for batch in texts), 64)
    count = max(sum(-(-len(b.inputs) // 8) for b in batches) for batches in judged.values())
    count = _up(count, 16)
    self.judged = {part: arms.blocks(batches, count) for part, batches in judged.items()}
    self.counts = {
      part: np.array([windows.num_targets(b) for b in batches]) for part, batches in judged.items()
    }

  def method(self, name: str, ready: Ready) -> "_Method":
    return _Method(self, name, ready)

  def texts(self, part: str, articles: int) -> sm.Batch:
    """Return the windows [T, rows, S] of the first articles of all languages of a part."""
    batches = model.texts(self.config, getattr(self.split, part), articles)
    return jax.tree.map(jnp.asarray, windows.padded(batches, self.rows))

  def serve(self, ready: Ready, rate: float, folder: pathlib.Path) -> dict[str, Any]:
    """Adapt all languages on the largest number of articles, test languages first; serve them."""
    own = self.config
    versions = [v for part in self.split for v in declarations.one_a_language(part)]
    adapt = jax.jit(arms.adapting(own, ready.arm.make, rate).adapt_tasks, static_argnums=2)
    most = own.adapt.articles[-1]
    rows = _up(max(len(batch.inputs) for batch in model.texts(own, versions, most)), 64)
    parts = []
    for first in range(0, len(versions), _TOGETHER):
      some = versions[first : first + _TOGETHER]
      filled = [*some, *[some[0]] * (_TOGETHER - len(some))]  # one shape, so one program
      texts = jax.tree.map(jnp.asarray, windows.padded(model.texts(own, filled, most), rows))
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 4), first)
      thetas, _ = adapt(ready.state, texts, own.tune.steps, key)
      parts.append(jax.tree.map(lambda x, count=len(some): x[:count], thetas))
    thetas = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    learner = ready.arm.make(_NO_STEPS)
    return serving.serve(own, learner, ready.state, thetas, versions, folder)


class _Method:
  """One method on the validation and test languages, with one compiled program."""

  def __init__(self, judge: _Judge, name: str, ready: Ready):
    self.judge, self.name, self.state = judge, name, ready.state
    self.program = arms.adapt_and_judge(judge.config, ready.arm.make)

  def run(self, part: str, articles: int, rate: float, steps: int) -> tuple[PyTree, np.ndarray]:
    """Adapt for `steps` steps on `articles` articles; return (thetas, bits per byte [T])."""
    texts = self.judge.texts(part, articles)
    key = jax.random.fold_in(jax.random.key(self.judge.seed), 3)
    arguments = (self.state, texts, self.judge.judged[part], jnp.float32(rate), jnp.int32(steps))
    thetas, nats = self.program(*arguments, key)
    return thetas, windows.bits_per_byte(np.asarray(nats), self.judge.counts[part])

  def tune(self) -> dict[str, Any]:
    """Return the rate with the fewest bits per byte on the validation languages."""
    tune = self.judge.config.tune
    rates = self.judge.config.rates[self.name]
    bits = {r: self.run("validation", tune.articles, r, tune.steps)[1].mean() for r in rates}
    best = min(bits, key=lambda r: bits[r] if math.isfinite(bits[r]) else math.inf)
    return {"rate": best, "validation_bits": {str(r): float(b) for r, b in bits.items()}}

  def adapt(self, rate: float) -> dict[str, Any]:
    """Return {"bits": {articles: {steps: [T] bits per byte}}, "bytes": of one language}."""
    own, tune, bits, size = self.judge.config.adapt, self.judge.config.tune, {}, 0
    for articles in own.articles:
      bits[str(articles)] = {}
      for steps in own.steps:
        if steps > tune.steps and articles not in own.long:
          continue
        thetas, found = self.run("test", articles, rate, steps)
        bits[str(articles)][str(steps)] = found.tolist()
        size = sum(x.nbytes for x in jax.tree.leaves(thetas)) // len(found)
    return {"bits": bits, "bytes": size}
