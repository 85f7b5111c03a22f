"""Which modules of a network are task-specific? Few-shot recognition of unseen writing systems.

    python -m experiments.glyphs
    python -m experiments.glyphs --algorithms=all --seeds=0,1,2
    python -m experiments.glyphs --dataset=omniglot --data_dir=FOLDER

The command trains each algorithm on episodes of the training writing systems. It then adapts to
episodes of unseen systems for up to 1000 steps. It prints tables, and writes an HTML page,
pictures, CSV, JSON and TensorBoard logs; --open opens the page. The settings are those of the table
`glyphs` of experiments.train.

By default sigma_imaml, reptile and fomaml are trained from seed 0, into runs/glyphs.
"""

import pathlib
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence

import jax
from absl import app, flags, logging

import shrinkmeta as sm
from experiments.datasets.source import Problem
from experiments.report import browser, page
from experiments.report.evaluated import Evaluated
from experiments.report.pictures import adaptation, sigma_plots
from experiments.report.tables import comparison, sigma
from experiments.runs import files, pipeline, problems, results, store
from experiments.settings import algorithms, machine, paths, tables
from experiments.settings import flags as shared
from experiments.settings.schema import Config

_PRESETS = {"default": "cpu", "full": "full", "smoke": "smoke"}  # preset -> size of the table

_ALGORITHMS = shared.algorithms()
_SEEDS = shared.seeds()
_PRESET = flags.DEFINE_enum(
  "preset", "default", list(_PRESETS), "Size of the run: for two cores, for a GPU, or for a test."
)
_SET = shared.changes()
_DATASET = flags.DEFINE_enum(
  "dataset", "glyphs", ["glyphs", "omniglot"], "Characters drawn from fonts, or Omniglot's."
)
_DATA_DIR = shared.data_dir()
_SPLIT = shared.split()
_CHECKPOINTS = paths.define(
  "checkpoints",
  "Folder of states, from which a stopped run continues. Default: no states are saved.",
)
_CHECKPOINT_EVERY = flags.DEFINE_integer(
  "checkpoint_every", 20, "Meta-steps between checkpoints.", lower_bound=1
)
_CACHE = shared.compilation_cache()
_OUT = shared.out()
_OPEN = shared.open_page()
shared.define_processes()

_RESULTS = ("results.json", "results.csv", "index.html")
_PICTURES = ("adaptation.png", "sigma.png", "sigma_history.png")
_NOT_OF_TRAINING = (
  *("arms", "adapt_steps", "report_step", "evaluation"),
  *("validation_episodes", "test_episodes"),
)


def run(
  names: Sequence[str],
  seeds: Sequence[int],
  config: Config,
  data_dir: str | None,
  split: str,
  out: pathlib.Path,
  checkpoints: pathlib.Path | None = None,
  checkpoint_every: int = 20,
  command: str = "python -m experiments.glyphs",
) -> tuple[str, list[str]]:
  """Train, evaluate and report. Results are saved after every arm; a diverged run has none.

  Args:
    names: the names of the algorithms.
    seeds: fix the initial parameters and the training tasks.
    config: the settings of the table `glyphs`.
    data_dir: the folder of the data set.
    split: "test" or "validation".
    out: the folder of the results.
    checkpoints: the folder of states, with a folder for each arm and seed; None saves none.
    checkpoint_every: meta-steps between checkpoints.
    command: the command line that the page shows.

  Returns:
    The tables and the list of diverged runs. Only the first process writes; the others return "".
  """
  with shared.usage():
    chosen = algorithms.chosen(names)
    problem = problems.make_problem(config.problem, data_dir)
    pipeline.check_processes(config, problem, chosen, seeds)
    if checkpoints is not None:
      sm.check_shared("--checkpoints", checkpoints)
    arms = {name: pipeline.prepare(name, config, problem) for name in chosen}
    judged = pipeline.evaluation(config, problem, split)
    keeps = {}
    if checkpoints is not None:
      keeps = _checkpoints(arms, seeds, config, problem, checkpoints, checkpoint_every)
  settings = config.to_dict()
  settings |= {"protocol": pipeline.protocol(config, problem), "split": split, "freeze": 0.0}
  out.mkdir(parents=True, exist_ok=True)
  if jax.process_index() == 0:
    _remove_earlier(out, {name for name, (_, continues) in keeps.items() if continues})
  curves, diverged, lost = [], [], []
  for seed in seeds:
    for name, prepared in arms.items():
      run_name = f"{name}-{seed}"
      keep, _ = keeps.get(run_name, (None, False))
      log = sm.tensorboard(out / "tensorboard" / run_name)
      try:
        trained = pipeline.train(prepared, name, seed, config, keep, [log])
        curves.append(pipeline.curve(prepared, name, seed, config, split, trained))
      except FloatingPointError as error:
        logging.error("%s diverged: %s", run_name, error)
        diverged.append(run_name)
        lost.append(f"{name}, seed {seed}")
        continue
      if jax.process_index() == 0:
        results.write_json(out / "results.json", settings, curves, files.environment())
  if not curves or jax.process_index() != 0:
    return "", diverged
  norm = config.network.norm
  line = (
    f"{config.problem.dataset}, {split} systems, {config.problem.ways}-way "
    f"{config.problem.shots}-shot, {config.problem.size} x {config.problem.size} pixels, "
    f"norm: {norm}{' (transductive)' if norm == 'batch' else ''}, {judged.source.tasks} systems, "
    f"the mean of {judged.rounds} episodes each, seeds {', '.join(map(str, seeds))}"
  )
  arms = settings.pop("arms")
  environment = files.environment()
  members = [Evaluated(out, settings, arms[c.algorithm], c, environment) for c in curves]
  return f"{line}\n\n{report(out, members, lost, command)}", diverged


def _checkpoints(
  arms: Mapping[str, pipeline.Prepared],
  seeds: Sequence[int],
  config: Config,
  problem: Problem,
  folder: pathlib.Path,
  every: int,
) -> dict[str, tuple[sm.Checkpoints, bool]]:
  """Return {"maml-0": (its checkpoints, whether it continues from one)} of all arms and seeds.

  Raises:
    ValueError: a folder holds states of a run with other settings or other data.
  """
  common = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_TRAINING}
  common["protocol"] = pipeline.protocol(config, problem)
  common["checksums"] = store.checksums(problem)  # words and counts do not show other pictures
  found = {}
  for name, prepared in arms.items():
    for seed in seeds:
      own = common | {"seed": seed, "arm": config.arms[name].to_dict()}
      keep = sm.Checkpoints(folder / f"{name}-{seed}", every, settings=own)
      saved = None
      if (folder / f"{name}-{seed}").is_dir():
        start = prepared.learner.init(prepared.model.init(jax.random.key(seed)))
        saved = sm.restore(keep, prepared.learner, start)
      found[f"{name}-{seed}"] = keep, saved is not None
  return found


def _remove_earlier(out: pathlib.Path, continued: Collection[str]) -> None:
  """Remove what an earlier run of this command wrote to `out`, and no other file.

  The new run may write fewer files, for example if all its arms diverge.

  Args:
    out: the folder of the results.
    continued: the runs, such as "maml-0", that continue from a checkpoint. They keep their
      TensorBoard logs.
  """
  for name in (*_RESULTS, *_PICTURES):
    (out / name).unlink(missing_ok=True)
  runs = re.compile(rf"({'|'.join(algorithms.ALL)})-\d+")
  for folder in (out / "tensorboard").glob("*"):
    if runs.fullmatch(folder.name) and folder.name not in continued:
      for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
      if not any(folder.iterdir()):
        folder.rmdir()


def report(
  out: pathlib.Path, members: Sequence[Evaluated], diverged: Sequence[str], command: str
) -> str:
  """Write the page, its pictures and the CSV, and return the tables."""
  curves, over = [one.curve for one in members], members[0].settings["evaluation"]["over"]
  results.write_csv(out / "results.csv", curves)
  learned = [c for c in curves if algorithms.learns_sigma(c.algorithm)]
  pictures = {"adaptation.png": "accuracy and loss against adaptation steps"}
  adaptation.adaptation_curves(out / "adaptation.png", curves, over)
  if learned:
    sigma_plots.sigma_per_module(out / "sigma.png", learned)
    sigma_plots.sigma_history(out / "sigma_history.png", learned)
    pictures |= {"sigma.png": "σ of each module", "sigma_history.png": "σ during training"}
  shown = {c.algorithm: c for c in reversed(learned)}  # the first seed of each
  tables = [*comparison.tables(curves, over=over), *map(sigma.module_table, shown.values())]
  page.write_one(out, command, members, diverged, tables, pictures)
  return "\n\n".join(tables)


def main(argv: Sequence[str]) -> None:
  """Read the flags and run."""
  shared.no_arguments(argv)
  with shared.usage():
    machine.start_jax(cache=_CACHE.value, processes=shared.processes())
    seeds = shared.parse_seeds(shared.or_default(_SEEDS, ["0"]))
    if any(change.partition("=")[0] == "problem.dataset" for change in _SET.value):
      raise ValueError("--dataset chooses the data: leave --set=problem.dataset out.")
    changes = [f"problem.dataset={_DATASET.value}", *_SET.value]
    names = algorithms.chosen(shared.or_default(_ALGORITHMS, ["sigma_imaml", "reptile", "fomaml"]))
    config = tables.load("glyphs", _PRESETS[_PRESET.value], changes, names=names)
  out = pathlib.Path(shared.or_default(_OUT, "runs/glyphs"))
  found, diverged = run(
    names,
    seeds,
    config,
    _DATA_DIR.value,
    _SPLIT.value,
    out,
    pathlib.Path(_CHECKPOINTS.value) if _CHECKPOINTS.value is not None else None,
    _CHECKPOINT_EVERY.value,
    shlex.join(["python", "-m", "experiments.glyphs", *sys.argv[1:]]),
  )
  if found:
    print(f"\n{found}\n")
    logging.info("The page is %s; tables, pictures and logs are beside it.", out / "index.html")
    if _OPEN.value:
      browser.show(out / "index.html")
  if diverged:
    logging.error("Without a result: %s. Lower their rates by --set.", ", ".join(diverged))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
