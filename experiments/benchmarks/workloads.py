"""The workloads that are timed: their tasks, networks, and inner and implicit settings.

Images, points and tokens are random numbers in arrays of the named shapes, because speed does not
depend on their values.

Other libraries minimise the mean loss plus a proximal term lambda |theta - phi|^2 / 2. `prior` is
this lambda. Here the likelihood is a sum over N examples, so sigma^2 = 1 / (lambda N). A step of
size r in theta on their objective is a step of size r lambda N in z.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments import networks

PyTree = Any
Net = Literal["conv", "mlp", "transformer"]


@dataclasses.dataclass(frozen=True)
class Workload:
  """Sizes and settings; a task has `ways * shots` training, `ways * queries` validation examples.

  Attributes:
    width: channels of the convolutions, hidden units, or width of the Transformer.
    depth: blocks of the convolutional net or Transformer, hidden layers of the MLP.
    rate: the size of an inner step in theta, for the mean loss.
    steps: inner steps of algorithms that do not search the mode; `mode_steps` is for those that do.
    batch_size: examples in an inner step; None takes all.
    cg: iterations of conjugate gradients.
    moving: the task-specific modules; None stands for all.
    compute: dtype in which the network is computed.
  """

  net: Net
  algorithms: tuple[str, ...]
  ways: int
  shots: int
  queries: int
  tasks: int
  width: int
  depth: int
  rate: float
  steps: int
  mode_steps: int
  cg: int
  batch_size: int | None = None
  prior: float = 2.0
  size: int = 28
  vocabulary: int = 1000
  moving: tuple[str, ...] | None = None
  compute: Literal["float32", "bfloat16"] = "float32"

  @property
  def examples(self) -> int:
    """N, the number of training examples of a task."""
    return self.ways * self.shots

  @property
  def sigma(self) -> float:
    """The sigma that is equivalent to the proximal weight `prior`."""
    return (self.prior * self.examples) ** -0.5


_FEW_SHOT = ("maml", "fomaml", "imaml", "sigma_imaml", "reptile")
_W1 = Workload("conv", _FEW_SHOT, 5, 1, 15, 16, 64, 4, 0.4, steps=5, mode_steps=16, cg=5)
WORKLOADS = {
  "w1": _W1,
  "w2": Workload(
    "conv", ("imaml", "sigma_imaml", "maml"), 20, 15, 5, 4, 64, 4, 0.1, 25, 100, 10, 20
  ),
  "w3": Workload("mlp", _FEW_SHOT, 1, 10, 10, 25, 40, 2, 0.01, steps=5, mode_steps=16, cg=5),
  "w4": Workload(
    "transformer", ("sigma_imaml",), 1, 8, 8, 8, 256, 8, 0.01, 5, 16, 5,
    size=32, moving=("block_7", "norm", "head"),
  ),
  "w5": dataclasses.replace(_W1, algorithms=("adapt",), tasks=256),
}  # fmt: skip
_TINY_CONV = {"width": 4, "depth": 1, "size": 8, "queries": 2, "steps": 2, "mode_steps": 3, "cg": 2}
_TINY: dict[str, dict[str, Any]] = {
  "w1": _TINY_CONV | {"tasks": 2},
  "w2": _TINY_CONV | {"tasks": 2, "ways": 3, "shots": 2, "batch_size": 3},
  "w3": {"tasks": 2, "width": 5},
  "w4": {"tasks": 2, "shots": 2, "queries": 2, "width": 8, "depth": 2, "size": 4,
         "vocabulary": 7, "steps": 2, "mode_steps": 2, "cg": 2, "moving": ("block_1", "head")},
  "w5": _TINY_CONV | {"tasks": 4},
}  # fmt: skip


def load(name: str, tiny: bool = False, **changes: Any) -> Workload:
  """Return the workload `name`, or its miniature for tests, with the changes that are not None."""
  changes = {key: value for key, value in changes.items() if value is not None}
  return dataclasses.replace(WORKLOADS[name], **(_TINY[name] if tiny else {}) | changes)


class Problem(NamedTuple):
  """Tasks and a network for them."""

  params: PyTree
  labels: sm.Labels
  likelihood: sm.Likelihood
  tasks: sm.Task  # leaves lead with [T]


def network(workload: Workload) -> nn.Module:
  """Return the network of a workload."""
  if workload.net == "conv":
    return networks.ConvNet(workload.ways, workload.width, "batch", workload.depth)
  if workload.net == "transformer":
    heads = max(1, workload.width // 32)
    return networks.Transformer(workload.vocabulary, workload.width, workload.depth, heads)
  hidden = [layer for _ in range(workload.depth) for layer in (nn.Dense(workload.width), nn.relu)]
  return nn.Sequential([*hidden, nn.Dense(1)])


def make_tasks(workload: Workload, seed: int) -> sm.Task:
  """Draw T random tasks; for images and sinusoids, train and val share what defines the task."""
  random = np.random.default_rng(seed)
  part = {"conv": _images, "mlp": _sinusoids, "transformer": _tokens}[workload.net](
    workload, random
  )
  return sm.Task(part(workload.shots), part(workload.queries))


Part = Callable[[int], sm.Batch]  # examples a class -> leaves [T, N, ...]


def _images(workload: Workload, random: np.random.Generator) -> Part:
  """One prototype for each class, plus noise."""
  t, ways, pixels = workload.tasks, workload.ways, (workload.size, workload.size, 1)
  prototypes = random.uniform(size=(t, ways, 1, *pixels))

  def part(shots: int) -> sm.Batch:
    images = prototypes + 0.3 * random.normal(size=(t, ways, shots, *pixels))
    labels = np.tile(np.repeat(np.arange(ways, dtype=np.int32), shots), (t, 1))
    return sm.Batch(jnp.asarray(images.reshape(t, -1, *pixels), jnp.float32), jnp.asarray(labels))

  return part


def _sinusoids(workload: Workload, random: np.random.Generator) -> Part:
  """y = a sin(x + b); each task has its own a and b."""
  t = workload.tasks
  amplitude, phase = random.uniform(0.1, 5, (t, 1, 1)), random.uniform(0, np.pi, (t, 1, 1))

  def part(shots: int) -> sm.Batch:
    x = random.uniform(-5, 5, (t, workload.ways * shots, 1))
    y = amplitude * np.sin(x + phase)
    return sm.Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))

  return part


def _tokens(workload: Workload, random: np.random.Generator) -> Part:
  """Sequences of random tokens; the target is the next token."""

  def part(shots: int) -> sm.Batch:
    shape = (workload.tasks, workload.ways * shots, workload.size + 1)
    tokens = random.integers(workload.vocabulary, size=shape, dtype=np.int32)
    return sm.Batch(jnp.asarray(tokens[..., :-1]), jnp.asarray(tokens[..., 1:]))

  return part


def make_problem(workload: Workload, seed: int) -> Problem:
  """Return parameters, labels, likelihood and tasks, all from one seed."""
  net, tasks = network(workload), make_tasks(workload, seed)
  first = jax.tree.map(lambda x: x[0], tasks.train.inputs)
  params = jax.jit(net.init)(jax.random.key(seed), first)["params"]

  def predict(theta: PyTree, inputs: PyTree) -> jax.Array:
    return cast(jax.Array, net.apply({"params": theta}, inputs))

  likelihood, labels = sm.categorical(predict), sm.by_layer(params)
  if workload.net == "mlp":  # the squared error is the density of this scale, less a constant
    likelihood = sm.gaussian(predict, 0.5**0.5)
  if workload.net == "transformer":  # a block is a module
    labels = sm.by_path(params, {f"^{name}(/|$)": name for name in params})
  if workload.compute != "float32":
    likelihood = sm.in_precision(likelihood, workload.compute)
  return Problem(params, labels, likelihood, tasks)


def make_learner(
  workload: Workload,
  algorithm: str,
  problem: Problem,
  *,
  curvature: Literal["hessian", "gauss_newton"] = "hessian",
  **keywords: Any,
) -> sm.MetaLearner:
  """Return the learner of `algorithm` with the settings of the workload.

  Args:
    curvature: "hessian" is what other libraries use.
    keywords: arguments of the learner, such as batching and mesh; inner and implicit replace the
      workload's own.
  """
  keywords = {"phi_optimizer": optax.sgd(1e-3)} | keywords
  known = sm.FAMILY["reptile" if algorithm == "adapt" else algorithm]
  if known.gradient == "implicit":
    keywords = {
      "inner": sm.Inner(
        optax.sgd(workload.rate / workload.sigma**2),
        steps=workload.mode_steps,
        batch_size=workload.batch_size,
      ),
      # A tolerance of 0 asks for all iterations, as the other libraries run.
      "implicit": sm.Implicit(curvature, "cg", max_steps=workload.cg, tol=0.0),
      "init_sigma": init_sigma(workload, problem.labels),
    } | keywords
  else:
    inner = sm.Inner(optax.sgd(workload.rate), workload.steps, batch_size=workload.batch_size)
    keywords = {"inner": inner} | keywords
  make = sm.reptile if algorithm == "adapt" else getattr(sm, algorithm)
  return make(problem.likelihood, problem.labels, **keywords)


def init_sigma(workload: Workload, labels: sm.Labels) -> dict[str, float]:
  """Return the workload's sigma for task-specific modules, and 0 for the others."""
  free = lambda name: workload.moving is None or name in workload.moving
  return {name: workload.sigma * free(name) for name in jax.tree.leaves(labels)}
