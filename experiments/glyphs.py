"""Which modules of a network are task-specific? Few-shot recognition of unseen writing systems.

    python -m experiments.glyphs
    python -m experiments.glyphs --algorithms=all --seeds=0,1,2
    python -m experiments.glyphs --dataset=omniglot --data_dir=FOLDER

Trains each algorithm on episodes of the training writing systems, adapts it to episodes of unseen
ones for up to 1000 steps, and prints tables and writes pictures, CSV, JSON and TensorBoard logs.
"""

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from absl import app, flags, logging

import shrinkmeta as sm
from experiments.datasets.characters import characters, episodes, glyphs, omniglot
from experiments.datasets.files import cache
from experiments.datasets.source import Source
from experiments.networks import convnet
from experiments.report.pictures import adaptation, sigma_plots
from experiments.report.tables import summaries
from experiments.runs import learners, problems, results, training
from experiments.settings import machine, schema

_ALGORITHMS = flags.DEFINE_list(
  "algorithms", list(learners.DEFAULT), f"Of {', '.join(learners.ALL)}; or all."
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of initial parameters and training episodes.")
_PRESET = flags.DEFINE_enum("preset", "default", list(schema.PRESETS), "Size of the run.")
_SET = flags.DEFINE_multi_string("set", [], "Changes one setting: --set=meta_steps=100.")
_DATASET = flags.DEFINE_enum("dataset", "glyphs", ["glyphs", "omniglot"], "What is read.")
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of Omniglot's two zips; default $SHRINKMETA_DATA/omniglot."
)
_SPLIT = flags.DEFINE_enum(
  "split", "test", ["test", "validation"], "Systems adapted to; choose settings on validation."
)
_CHECKPOINTS = flags.DEFINE_string(
  "checkpoints",
  None,
  "Folder from which an arm that was stopped goes on; None: no checkpoints.",
)
_CHECKPOINT_EVERY = flags.DEFINE_integer(
  "checkpoint_every", 20, "Meta-steps between checkpoints.", lower_bound=1
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder in which compiled programs are kept for the next run."
)
_OUT = flags.DEFINE_string("out", "runs/glyphs", "Folder for tables, pictures and logs.")
machine.define_flags()

_TEST_KEY = 20_000  # seed of the test episodes: the same for every algorithm and training seed


class Data(NamedTuple):
  """Writing systems to train on, and unseen ones to adapt to."""

  train: characters.Characters
  test: characters.Characters


class Sources(NamedTuple):
  """Episodes of them; those to test on take the systems in turn."""

  train: Source
  test: Source


def load_data(dataset: str, data_dir: str | None, split: str, ways: int) -> Data:
  """Both sides of the split, without systems of fewer than `ways` characters."""
  if dataset == "glyphs":
    everything = glyphs.load()
    train, test = (characters.select(everything, glyphs.SPLITS[s]) for s in ("train", split))
  else:
    background, evaluation = omniglot.load(cache.data_folder("omniglot", data_dir))
    kept = [s for s in background.systems if s not in omniglot.VALIDATION]
    train = characters.select(background, kept)
    validation = characters.select(background, omniglot.VALIDATION)
    test = evaluation if split == "test" else validation
  return Data(characters.with_at_least(train, ways), characters.with_at_least(test, ways))


def make_sources(config: schema.Config, data: Data) -> Sources:
  """Episodes of both sides of the split, of the shape that the settings ask for."""
  shape = episodes.EpisodeConfig(config.ways, config.shots, config.queries, config.size)
  return Sources(
    episodes.source(shape, data.train), episodes.source(shape, data.test, in_turn=True)
  )


def rounds(config: schema.Config, sources: Sources) -> int:
  """Episodes of each system to test on: together at least config.test_episodes."""
  return math.ceil(config.test_episodes / cast(int, sources.test.tasks))


def prepare(name: str, config: schema.Config) -> tuple[sm.MetaLearner, problems.Model]:
  """The learner of an algorithm, and its network."""
  net = convnet.ConvNet(config.ways, config.features, config.norm)
  init = lambda key: net.init(key, jnp.zeros((1, config.size, config.size, 1)))["params"]

  def predict(theta: Any, inputs: Any) -> jax.Array:
    return cast(jax.Array, net.apply({"params": theta}, inputs))

  likelihood = sm.in_precision(sm.categorical(predict), config.compute)
  shapes = jax.eval_shape(init, jax.random.key(0))
  labels = convnet.modules(shapes, config.arms[name].modules)
  mesh = training.host_mesh(config.meta_batch)
  learner = learners.make_learner(name, config, likelihood, labels, mesh)
  return learner, problems.Model(init, likelihood, shapes)


def run_arm(
  name: str,
  seed: int,
  config: schema.Config,
  learner: sm.MetaLearner,
  model: problems.Model,
  sources: Sources,
  log_dir: pathlib.Path,
  checkpoints: sm.Checkpoints | None = None,
) -> results.Curve:
  """Trains one algorithm from one seed and adapts it to the test episodes.

  Episodes of one system are alike: they are averaged, and the curve has a column a system.
  """
  init_key, train_key, step_key = jax.random.split(jax.random.key(seed), 3)
  sample = jax.jit(Source.sample, static_argnums=3)
  test_key = jax.random.key(_TEST_KEY)

  trained = training.train(
    learner,
    model.init(init_key),
    lambda start, count: sample(sources.train, train_key, start, count),
    config.meta_steps,
    config.meta_batch,
    name,
    [sm.tensorboard(log_dir)],
    checkpoints,
    step_key,
  )
  count = cast(int, sources.test.tasks) * rounds(config, sources)
  adapted = training.adapt(
    learner,
    model.likelihood,
    trained.state,
    lambda start, count: sample(sources.test, test_key, start, count),
    count,
    tuple(config.adapt_steps),
    min(8, count),
    name,
    jax.random.key(_TEST_KEY + 1),  # for mini-batches of inner steps
  )
  by_system = lambda x: x.reshape(len(x), rounds(config, sources), -1).mean(1)
  adapted = adapted._replace(accuracy=by_system(adapted.accuracy), nll=by_system(adapted.nll))
  return training.as_curve(learner, name, seed, config.adapt_steps, trained, adapted)


def report(out: pathlib.Path, curves: Sequence[results.Curve]) -> str:
  """Writes the pictures and the CSV; returns the tables."""
  results.write_csv(out / "results.csv", curves)
  learned = [c for c in curves if results.learns_sigma(c.algorithm)]
  if learned:
    sigma_plots.sigma_per_module(out / "sigma.png", learned)
    sigma_plots.sigma_history(out / "sigma_history.png", learned)
  over = "writing systems"
  adaptation.adaptation_curves(out / "adaptation.png", curves, over)
  parts = [summaries.accuracy_table(curves, over), summaries.overfitting_table(curves, over)]
  if {"sigma_imaml"} < {c.algorithm for c in curves}:
    parts.append(summaries.paired_table(curves, over=over))
  shown = {c.algorithm: c for c in reversed(learned)}  # the first seed of each
  parts += [summaries.module_table(curve) for curve in shown.values()]
  return "\n\n".join(parts)


def run(
  algorithms: Sequence[str],
  seeds: Sequence[int],
  config: schema.Config,
  dataset: str,
  data_dir: str | None,
  split: str,
  out: pathlib.Path,
  checkpoints: pathlib.Path | None = None,
  checkpoint_every: int = 20,
) -> tuple[str, list[str]]:
  """Everything but the flags. Results are saved after every arm; one that diverges has none.

  Args:
    checkpoints: a folder for each arm and seed lies in it; None for none.

  Returns:
    The tables, and which runs diverged. The first process writes; in others the tables are "".
  """
  with machine.usage():
    prepared = {name: prepare(name, config) for name in learners.chosen(algorithms)}
    sources = make_sources(config, load_data(dataset, data_dir, split, config.ways))
  out.mkdir(parents=True, exist_ok=True)
  settings = config.to_dict() | {"dataset": dataset, "split": split}
  not_of_training = ("arms", "test_episodes", "adapt_steps", "split")
  shared = {key: value for key, value in settings.items() if key not in not_of_training}
  curves, diverged = [], []
  for seed in seeds:
    for name, (learner, model) in prepared.items():
      arm = f"{name}-{seed}"
      keep = None
      if checkpoints is not None:
        own = shared | {"seed": seed, "arm": settings["arms"][name]}
        keep = sm.Checkpoints(checkpoints / arm, checkpoint_every, settings=own)
      try:
        log_dir = out / "tensorboard" / arm
        curves.append(run_arm(name, seed, config, learner, model, sources, log_dir, keep))
      except FloatingPointError as error:
        logging.error("%s diverged: %s", arm, error)
        diverged.append(arm)
        continue
      if jax.process_index() == 0:
        results.write_json(out / "results.json", settings, curves, results.environment())
  if not curves or jax.process_index() != 0:
    return "", diverged
  protocol = (
    f"{dataset}, {split} systems, {config.ways}-way {config.shots}-shot, {config.size} x "
    f"{config.size} pixels, norm: {config.norm}"
    + (" (transductive)" if config.norm == "batch" else "")
    + f", {sources.test.tasks} systems, the mean of {rounds(config, sources)} episodes each, "
    + f"seeds {', '.join(map(str, seeds))}"
  )
  return f"{protocol}\n\n{report(out, curves)}", diverged


def main(argv: Sequence[str]) -> None:
  """Reads the flags, once."""
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  machine.start_jax(cache=_CACHE.value, processes=machine.processes())
  with machine.usage():
    seeds = machine.parse_seeds(_SEEDS.value)
    config = schema.load(_PRESET.value, _SET.value)
    if _DATASET.value == "glyphs" and _DATA_DIR.value is not None:
      raise ValueError(
        "Glyphs are drawn, not read: leave --data_dir out, or add --dataset=omniglot."
      )
  out = pathlib.Path(_OUT.value)
  tables, diverged = run(
    _ALGORITHMS.value,
    seeds,
    config,
    _DATASET.value,
    _DATA_DIR.value,
    _SPLIT.value,
    out,
    pathlib.Path(_CHECKPOINTS.value) if _CHECKPOINTS.value is not None else None,
    _CHECKPOINT_EVERY.value,
  )
  if tables:
    print(f"\n{tables}\n")
    logging.info("Tables, pictures and logs are in %s", out)
  if diverged:
    logging.error("Without a result: %s. Lower their rates by --set.", ", ".join(diverged))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
