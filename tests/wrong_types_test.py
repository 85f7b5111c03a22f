"""Every public function refuses arguments of the wrong type, by name and before any work.

Each function is called once with valid arguments. Then each argument is replaced by wrong values,
one at a time. A wrong value must raise TypeError or ValueError with the argument's name in the
message, unless the table ALLOWED says that the argument takes it.
"""

import dataclasses
import functools
import inspect
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shrinkmeta as sm
from shrinkmeta import mixed
from shrinkmeta.choice.tables import CurvePoint, ModuleLoss

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros([])}
LABELS = {"w": "body", "b": "head"}


def predict(theta, inputs):
  return inputs @ theta["w"] + theta["b"]


def predict_scale(theta, inputs):
  return inputs @ theta["w"], theta["b"]


def predict_with(theta, inputs, constants):
  return inputs @ constants["w"] + theta["b"]


LIKELIHOOD = sm.gaussian(predict)
EVALUATION = sm.Evaluation(np.ones(3), None, np.ones(3, bool))
BATCH = sm.Batch(jnp.ones((4, 2)), jnp.ones(4))
BATCHES = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
TASKS = sm.Task(BATCHES, BATCHES)
THETAS = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
INNER = sm.Inner(optax.sgd(0.1), 1)
ADAM = optax.adam(1e-3)


@functools.cache
def learner():
  return sm.sigma_imaml(LIKELIHOOD, LABELS, inner=INNER)


@functools.cache
def state():
  return learner().init(PARAMS)


@functools.cache
def compiled():
  return jax.jit(lambda x: x + 1).lower(1.0).compile()


@functools.cache
def sums():
  shapes = jax.eval_shape(lambda: learner().sums(state(), TASKS))
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


@functools.cache
def deltas():
  frozen_body = sm.hand_picked(LIKELIHOOD, LABELS, task_specific=("head",))
  thetas = {"w": None, "b": jnp.zeros(2)}
  return sm.deltas(frozen_body, frozen_body.init(state().phi), thetas, ["ann", "bob"])


@functools.cache
def saved():
  """A folder of deltas."""
  folder = os.path.join(tempfile.mkdtemp(), "deltas")
  sm.save_deltas(folder, deltas())
  return folder


def chosen():
  row = ModuleLoss("head", 0.3, 0.1, 1, 4, 1.0, 0.1, 1.2, 0.1)
  point = CurvePoint(None, (), 1.2, 0.1, 0.0, 0, 0, 0.1)
  return sm.Choice((), (row,), (point, point), 2, 0, None)


@functools.cache
def mixed_model():
  return mixed.fit("y ~ (1 | g)", {"y": [1, 2, 3, 3, 7, 8.0], "g": [*"aabbcc"]})


@functools.cache
def laplace():
  sigma = {"body": 0.0, "head": 0.0}
  return sm.posterior(LIKELIHOOD, LABELS, PARAMS, sigma, PARAMS, BATCH)


KERNEL = {"dense": {"kernel": jnp.ones([3, 2])}}
ADAPTERS = {"dense": {"kernel": {"A": jnp.ones([3, 1]), "B": jnp.zeros([1, 2])}}}
# What each argument takes, by its name. A value that is a function without arguments is called
# when it is needed. An argument that is not listed keeps its default.
VALID = {
  "adapters": ADAPTERS,
  "algorithm": sm.FAMILY["sigma_imaml"],
  "batch": BATCH,
  "batches": BATCHES,
  "callbacks": (),
  "checkpoints": None,
  "compiled": compiled,
  "count": 2,
  "deltas": deltas,
  "dtype": "int8",
  "f": lambda shared, task: (shared, task),
  "folder": "runs",
  "ids": ["ann", "bob"],
  "implicit": sm.Implicit(),
  "index": jnp.array([1, 0, 1, 1]),
  "init_sigma": 0.3,
  "inner": INNER,
  "inputs": jnp.ones((4, 2)),
  "integrated": ("head",),
  "key": jax.random.key(0),
  "labels": LABELS,
  "learner": learner,
  "likelihood": LIKELIHOOD,
  "log_sigma2": {"body": 0.0, "head": 0.0},
  "mesh": None,
  "n": 2,
  "meta_batch": 2,
  "params": PARAMS,
  "part": PARAMS,
  "path": "log.jsonl",
  "norm": 1.0,
  "phi": PARAMS,
  "phi_optimizer": ADAM,
  "predict": predict,
  "records": [],
  "rest": PARAMS,
  "rules": None,
  "shared": PARAMS,
  "sigma_optimizer": ADAM,
  "state": state,
  "steps": 0,
  "task_specific": ("head",),
  "tasks": TASKS,
  "theta": PARAMS,
  "thetas": THETAS,
}
# What only one function takes, by its name.
OWN = {
  "by_path": {"rules": {"w": "body", ".*": "head"}},
  "choose_modules": {"repeats": 0, "tolerance": 1.0},
  "calibration": {
    "log_probabilities": jnp.log(jnp.full((2, 2), 0.5)),
    "targets": jnp.array([0, 1]),
  },
  "coverage": {"mean": jnp.zeros(2), "sd": jnp.ones(2), "targets": jnp.zeros(2)},
  "deltas": {"thetas": {"w": None, "b": jnp.zeros(2)}},
  "export.merged": {"params": KERNEL},
  "export.peft": {"names": {"dense/kernel": "dense"}, "alpha": 1.0, "base": "base"},
  "fit": {"tasks": lambda first, count: TASKS},
  "format_summary": {"summaries": (sm.ModuleSummary("body", 2, 0.3, 0.1),)},
  "gaussian_with_scale": {"predict": predict_scale},
  "in_precision": {"dtype": jnp.bfloat16},
  "learner.adapt": {"steps": None},
  "learner.adapt_tasks": {"steps": None},
  "learner.apply": {"sums": lambda: sums()[0], "per_task": lambda: sums()[1]},
  "load_deltas": {"folder": saved},
  "lora.init": {"params": KERNEL, "rules": {"kernel": 1}},
  "lora.join": {"first": {"kernel": {"A": 1.0}}, "second": {"kernel": {"B": 1.0}}},
  "lora.merge": {"params": KERNEL},
  "mean_and_scale": {"outputs": jnp.full((4, 2), -0.5)},
  "paired": {"a": EVALUATION, "b": EVALUATION},
  "plots.adaptation_curves": {"evaluations": {"maml": {0: EVALUATION}}},
  "plots.choice_curve": {"choice": lambda: chosen()},
  "plots.mixed_model": {"model": lambda: mixed_model()},
  "plots.reliability_diagram": {
    "log_probabilities": np.log(np.full((2, 2), 0.5)),
    "targets": np.array([0, 1]),
  },
  "plots.shrunk_estimates": {"mean": np.zeros(2), "sd": np.ones(2)},
  "plots.sigma_by_module": {"runs": {"body": 0.3}},
  "plots.sigma_history": {"runs": [{"step": 0, "sigma/body": 0.3}]},
  "plots.sigma_picture": {"path": "sigma.png"},
  "priors.normal": {"scale": 1.0},
  "restore": {"checkpoints": lambda: sm.Checkpoints("runs")},
  "save_state": {"checkpoints": lambda: sm.Checkpoints(tempfile.mkdtemp())},
  "stack_batches": {"batches": [BATCH, BATCH]},
  "stack_tasks": {"tasks": [sm.Task(BATCH, BATCH)] * 2},
  "check_alike": {"settings": {"rate": 0.1}},
  "check_shared": {"what": "--out"},
  "with_constants": {"likelihood": sm.gaussian(predict_with), "constants": PARAMS},
  "with_randomness": {"likelihood": sm.gaussian(lambda theta, x, key=None: x)},
}
WRONG = {
  "object": object(),
  "str": "wrong",
  "int": 7,
  "None": None,
  "list": [1, "a"],
  "function": lambda: None,
  "optimizer": optax.sgd(0.1),
  "nnx": nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
  "params": PARAMS,
  "predict": predict,
}
CALLABLE = "function predict nnx"
# {argument: the things of WRONG that it takes}. None is allowed wherever it is the default.
ALLOWED = {
  "alpha": "int",
  "batch_size": "int",
  "batching": "int",
  "bins": "int",
  "count": "int",
  "damping": "int",
  "every": "int",
  "f": CALLABLE,
  "folder": "str",
  "init_sigma": "int",
  "keep": "int",
  "limit": "int",
  "log_p_phi": CALLABLE,
  "log_p_sigma": CALLABLE,
  "max_steps": "int",
  "median": "int",
  "mesh": "None",
  "meta_batch": "int",
  "n": "int",
  "name": "str",
  "norm": "int",
  "num_batches": "int",
  "optimizer": "optimizer",
  "part": "params",
  "path": "str",
  "phi": "params",
  "phi_optimizer": "optimizer",
  "predict": CALLABLE,
  "probes": "int",
  "rank": "int",
  "records": "list",
  "rest": "params",
  "rows": "int",
  "scale": "int",
  "shard_bytes": "int",
  "share": "int",
  "sigma_optimizer": "optimizer",
  "spread": "int",
  "stall_seconds": "int",
  "steps": "int",
  "theta": "params",
  "tol": "int",
  "wait": "int",
}
# {function: {argument: things}}, the same for one function alone. A string is a tree of one label.
ALLOWED_OF = {
  **{name: {"labels": "str"} for name in (*sm.FAMILY, "make_learner")},
  # A number is a pytree of one array.
  **{name: {"params": "params nnx int"} for name in ("by_layer", "by_leaf", "by_path")},
  "check_alike": {"settings": "params"},
  "check_shared": {"what": "str"},
  "choose_modules": {"repeats": "int", "tolerance": "int"},
  "deltas": {"ids": "list params"},  # ids are strings and integers
  "export.peft": {"alpha": "None", "base": "str", "task_type": "str None"},
  "fit": {"tasks": CALLABLE},
  "lbfgs": {"memory_size": "int"},
  "learner.init": {"params": "params"},
  "learner.sums": {"first": "int"},
  "load_deltas": {"ids": "list params"},
  "lora.split_layers": {"paths": "str"},
  "plots.adaptation_curves": {"xlabel": "str"},
  "plots.shrunk_estimates": {"centre": "int"},
  "log_likelihood": {"theta": "params int"},
  "num_tasks": {"tasks": "nnx"},
  "over_tasks": {"shared": "int None params nnx", "tasks": "nnx", "first": CALLABLE},
  "place_tasks": {"tasks": "nnx"},
  "place_state": {"state": " ".join(WRONG)},  # any tree
  "predict_tasks": {"state": "params"},
  "priors.normal": {"centre": "int params nnx"},
  "source": {"buckets": "int"},
  "with_constants": {"constants": "params nnx"},
}
# {function: arguments} that take a wrong thing today, or refuse it without their name. Delete an
# argument as soon as it is mended: the test fails if an entry is no gap any more.
KNOWN_GAPS = {}


def public_functions():
  """{name: function} of the public names, of `priors` and of a learner; and the configurations."""
  found = {}
  for name in sm.__all__:
    value = getattr(sm, name)
    if inspect.isfunction(value) or dataclasses.is_dataclass(value) and _is_checked(value):
      found[name] = value
    elif inspect.ismodule(value):
      listed = {n: getattr(value, n) for n in getattr(value, "__all__", ())}
      own = lambda f, module=value: inspect.isfunction(f) and f.__module__ == module.__name__
      own_functions = {n: f for n, f in vars(value).items() if n[0] != "_" and own(f)}
      functions = listed or own_functions
      found |= {f"{name}.{n}": f for n, f in functions.items() if inspect.isfunction(f)}
  for name in ("sample", "predictive", "outputs", "log_predictive"):
    found[f"Posterior.{name}"] = getattr(laplace(), name)
  names = ("init", "update", "adapt", "meta_gradient", "adapt_tasks", "no_start", "sums", "apply")
  return found | {f"learner.{name}": getattr(learner(), name) for name in names}


def _is_checked(value):
  """Whether a dataclass is one that users fill in: it checks its own fields."""
  return "__post_init__" in vars(value)


FUNCTIONS = public_functions()
# Their work is no tracing, so they run as they are; the others are only traced, which compiles
# nothing.
CONCRETE = {
  *(
    "check_meta_gradient",
    "choose_modules",
    "source",
    "fit",
    "module_summary",
    "place_state",
    "place_tasks",
    "program_cost",
  ),
  *("restore", "stack_batches", "stack_tasks", "task_mesh", "format_summary", "learner.init"),
  *("deltas", "load_deltas", "predict_tasks", "rounding_loss", "save_deltas"),
  "save_state",
  *("export.merged", "export.peft"),
  *(f"plots.{name}" for name in sm.plots.__all__),
}
NEED_SAFETENSORS = ("load_deltas", "save_deltas", "export.merged", "export.peft")


def valid_arguments(name):
  """{argument: value} of a valid call."""
  found = {}
  for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
      continue
    if (own := OWN.get(name, {})) and parameter.name in own:
      value = own[parameter.name]
    elif parameter.default is not parameter.empty:
      continue
    else:
      assert parameter.name in VALID, f"add to VALID what {name} takes as {parameter.name!r}"
      value = VALID[parameter.name]
    is_maker = inspect.isfunction(value) or hasattr(value, "cache_info")
    is_maker = is_maker and not inspect.signature(value).parameters
    found[parameter.name] = value() if is_maker else value
  return found


def call(name, arguments):
  function = FUNCTIONS[name]
  if name in CONCRETE or inspect.isclass(function):
    return function(**arguments)
  result = []  # results need not be arrays
  jax.eval_shape(lambda: result.append(function(**arguments)))
  return result


def allowed(name, parameter):
  """The wrong things that an argument may take."""
  found = set(ALLOWED.get(parameter.name, "").split())
  found |= set(ALLOWED_OF.get(name, {}).get(parameter.name, "").split())
  return found | ({"None"} if parameter.default is None else set())


def complaints(name, parameter):
  """What is wrong with how a function takes each wrong thing, [] if nothing."""
  found, fine = [], allowed(name, parameter)
  for kind, value in WRONG.items():
    if kind in fine:
      continue
    try:
      call(name, valid_arguments(name) | {parameter.name: value})
      found.append(f"{kind}: accepted")
    except (TypeError, ValueError) as error:
      if not re.search(rf"\b{parameter.name}\b", str(error)):
        found.append(f"{kind}: {type(error).__name__} without the name: {str(error)[:100]!r}")
    except Exception as error:
      found.append(f"{kind}: {type(error).__name__}: {str(error)[:100]!r}")
  return found


def arguments_of(name):
  kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
  return [p for p in inspect.signature(FUNCTIONS[name]).parameters.values() if p.kind not in kinds]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_things_are_refused_by_name(name):
  if name in NEED_SAFETENSORS:
    pytest.importorskip("safetensors")
  new, mended = {}, []
  for parameter in arguments_of(name):
    found = complaints(name, parameter)
    if parameter.name not in KNOWN_GAPS.get(name, "").split():
      new |= {parameter.name: found} if found else {}
    elif not found:
      mended.append(parameter.name)
  shown = "\n".join(f"  {argument}: {'; '.join(found)}" for argument, found in new.items())
  assert not new, f"{name} takes wrong things:\n{shown}"
  assert not mended, f"{name}: no gap any more, delete from KNOWN_GAPS: {mended}"


# `check_meta_gradient` compiles two programs: tests/diagnostics/gradient_check_test.py calls it.
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"check_meta_gradient"}))
def test_the_valid_arguments_are_valid(name):
  if name in NEED_SAFETENSORS:
    pytest.importorskip("safetensors")
  call(name, valid_arguments(name))


def test_the_tables_name_what_there_is():
  for table in (OWN, ALLOWED_OF, KNOWN_GAPS):
    for name, arguments in table.items():
      assert name in FUNCTIONS, name
      names = arguments.split() if isinstance(arguments, str) else arguments
      unknown = set(names) - {parameter.name for parameter in arguments_of(name)}
      assert not unknown, (name, unknown)
