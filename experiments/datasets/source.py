"""What experiments/ knows of a data set: its tasks, its likelihood and its protocol.

A data set is one file with a function that returns a `Problem`. Code that takes a `Problem` knows
nothing of pictures or files.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import shrinkmeta as sm

Draw = Callable[[Any, Any, jax.Array, jax.Array], sm.Task]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("data",),
  meta_fields=("draw", "config", "tasks", "shuffle"),
)
@dataclasses.dataclass(frozen=True)
class Source:
  """Tasks by index: task i of a key depends on `fold_in(key, i)` alone, not on the batch.

  This holds for JAX's default keys, threefry2x32 (docs/hazards.md#rbg-keys).

  A source is a pytree. Pass it to a jitted function as an argument, so that its data are on the
  device once and are not compiled into the program, as `sample_tasks` does.
  """

  draw: Draw  # (config, data, number, key) -> one Task; pure, and the key is its own
  config: Hashable  # static
  data: Any  # arrays
  tasks: int | None = None  # length of a finite list of tasks; None: every index is another task
  shuffle: bool = False  # whether each round through the list has an order of its own

  def sample(self, key: jax.Array, start: jax.typing.ArrayLike, count: int) -> sm.Task:
    """Return the tasks `start` to `start + count - 1` of `key`.

    Args:
      key: the same for all tasks of a run. It is folded with the index of a task, and never split.
        `_threefry` converts keys of other kinds.
      start: [], the index of the first task; it may be traced.
      count: T, static.

    Returns:
      Task with leaves [T, N, ...]. In a finite list, index i is task number i modulo `tasks`. With
      `shuffle`, each round through the list has a random order. What is random in a task is drawn
      anew for every index, so tasks i and i + tasks differ in it.
    """
    if count < 1:
      raise ValueError(f"Source.sample wants count >= 1; got {count}.")
    key = _threefry(key)
    indices = jnp.asarray(start).astype(jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)

    def one(i: jax.Array) -> sm.Task:
      return self.draw(self.config, self.data, self._number(key, i), jax.random.fold_in(key, i))

    return jax.vmap(one)(indices)

  def mapped(self, change: Callable[[sm.Task], sm.Task]) -> "Source":
    """Return the source of the tasks change(task). `change` takes one task and draws nothing."""
    return dataclasses.replace(self, draw=_draw_mapped, config=(change, self.draw, self.config))

  def _number(self, key: jax.Array, i: jax.Array) -> jax.Array:
    """Return the number in the list of the task with index i."""
    if self.tasks is None:
      return i
    if not self.shuffle:
      return i % self.tasks
    # Twice folded, since fold_in(key, round) is the key of a task.
    round_key = jax.random.fold_in(jax.random.fold_in(key, i // self.tasks), self.tasks)
    return jax.random.permutation(round_key, self.tasks)[i % self.tasks]


# Source.sample, compiled once for all callers: sample_tasks(source, key, start, count).
sample_tasks = jax.jit(Source.sample, static_argnames="count")


def _draw_mapped(config: Any, data: Any, number: jax.Array, key: jax.Array) -> sm.Task:
  change, draw, own = config
  return change(draw(own, data, number, key))


def _threefry(key: jax.Array) -> jax.Array:
  """Return a key itself if it is a threefry key, and else a threefry key made from its words.

  Under vmap, the draws of an "rbg" key depend on the batch: task i would differ from batch to
  batch.
  """
  typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  typed_key = key if typed else jax.random.wrap_key_data(key)
  if str(jax.random.key_impl(typed_key)) == "threefry2x32":
    return key
  words = jax.random.key_data(typed_key)
  made = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for word in words[2:]:
    made = jax.random.fold_in(made, word)
  return made


class Protocol(NamedTuple):
  """A description of the data for results, in words and numbers; `_asdict()` is a mapping."""

  data: str
  split: str  # how many classes or tasks in each part, and how they were chosen
  ways: int | None  # classes of a task
  shots: int | str  # examples to adapt on, of each class or of a task without classes
  queries: int  # examples to evaluate on, likewise
  augmentation: str  # in both parts of a task, unless it says otherwise
  evaluation: str  # where validation and test tasks come from


class Problem(NamedTuple):
  """Tasks for training, validation and tests, and the outputs that a network has to predict."""

  train: Source
  validation: Source
  test: Source
  kind: Literal["categorical", "gaussian"]
  outputs: int  # logits, or numbers regressed on (1: a network may return [N])
  inputs: tuple[int, ...]  # shape of one input
  protocol: Protocol
  scale: float = 1.0  # standard deviation of a "gaussian"

  def likelihood(self, predict: Callable[[Any, Any], jax.Array]) -> sm.Likelihood:
    """Return the likelihood of a network `predict(theta, inputs)`."""
    if self.kind == "categorical":
      return sm.categorical(predict)
    return sm.gaussian(predict, self.scale)


def pooled(task: sm.Task) -> sm.Task:
  """Return the task that adapts on the examples of both parts; the val part stays as it is.

  An algorithm that takes no gradient on val, such as Reptile, learns from all examples this way.
  """
  parts = (task.train, task.val)
  if any(part.mask is not None for part in parts):
    parts = [part._replace(mask=example_weights(part, jnp.float32)) for part in parts]
  return task._replace(train=jax.tree.map(lambda *x: jnp.concatenate(x), *parts))


def example_weights(batch: sm.Batch, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Return the mask of a batch as numbers [N]; ones if it has no mask."""
  if batch.mask is None:
    return jnp.ones(len(jax.tree.leaves(batch.targets)[0]), dtype)
  return batch.mask.astype(dtype)
