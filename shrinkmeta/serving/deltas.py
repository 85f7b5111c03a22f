"""The adapted parameters of many tasks, in their task-specific modules, tied to one phi.

`Deltas` holds theta and not the difference theta - phi. In floating point phi + (theta - phi) can
differ from theta: the subtraction can round if theta and phi differ by more than a factor of two. A
stored theta comes back to the bit, and serving needs no addition. Files with rounded numbers
(`files.py`) store theta - phi, because rounding a small difference makes a smaller error than
rounding theta.
"""

import dataclasses
import functools
import hashlib
import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.base import MetaLearner, MetaState, check_learner, check_state
from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import is_key, parameter_tree
from shrinkmeta.mode.frozen import check_own
from shrinkmeta.model import modules

PyTree = Any
TaskId = str | int

# {id(array): (reference to the array, its fingerprint)}, while the array is alive.
_DIGESTS: dict[int, tuple[weakref.ref[jax.Array], str]] = {}


class About:
  """The static data of `Deltas`: the ids, the labels and the fingerprint.

  Two objects are equal if all three are equal. JAX compares the objects when it looks up a compiled
  program. So each object stores a hash, and only the first comparison takes longer.
  """

  def __init__(
    self, ids: tuple[TaskId, ...] | None, labels: modules.Labels, fingerprint: Mapping[str, str]
  ):
    self.ids = ids
    self.labels = labels
    self.fingerprint = dict(fingerprint)

  @functools.cached_property
  def positions(self) -> dict[TaskId, int]:
    """The position of each task on the axis T, {id: position}."""
    return {task: place for place, task in enumerate(self.ids or ())}

  @functools.cached_property
  def digest(self) -> bytes:
    """The SHA-256 hash of the ids, the labels and the fingerprint."""
    labels = validate.leaves_with_names(self.labels)
    text = repr((self.ids, labels, sorted(self.fingerprint.items())))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

  def __eq__(self, other: object) -> bool:
    return self is other or (isinstance(other, About) and self.digest == other.digest)

  def __hash__(self) -> int:
    return hash(self.digest)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["thetas"], meta_fields=["about"])
@dataclasses.dataclass(frozen=True, eq=False)
class Deltas:
  """The adapted parameters of T tasks: the leaves of their task-specific modules only.

  Deltas are a pytree with the leaves of `thetas`. So `jax.device_put`, `jax.grad` and
  `jax.tree.map` accept them. The whole parameters of task t are
  `sm.merge(jax.tree.map(lambda x: x[t], deltas.thetas), state.phi)`.

  The ids belong to the structure of the pytree. A jitted function that takes Deltas therefore
  compiles again for other ids. `anonymous()` leaves out the ids and so avoids this.

  Attributes:
    thetas: a tree with the structure of phi. Leaves are [T, ...] in task-specific modules and None
      in frozen ones.
    about: the ids, the labels, and the fingerprint of the phi and constants from which the tasks
      were adapted.
  """

  thetas: PyTree
  about: About

  @property
  def ids(self) -> tuple[TaskId, ...] | None:
    """The T ids in order, or None after `anonymous()`."""
    return self.about.ids

  @property
  def labels(self) -> modules.Labels:
    """The module of every parameter, as a pytree of strings."""
    return self.about.labels

  @property
  def fingerprint(self) -> dict[str, str]:
    """The fingerprint of the phi and the constants from which the tasks were adapted.

    It is {path: dtype, shape and SHA-256} for every leaf.
    """
    return self.about.fingerprint

  @property
  def num_tasks(self) -> int:
    """The number of tasks T."""
    return jax.tree.leaves(self.thetas)[0].shape[0]

  def anonymous(self) -> "Deltas":
    """Return the same parameters without ids, so that one compiled program serves any T tasks.

    Returns:
      Deltas whose `ids` is None.

    Example:
      >>> import jax.numpy as jnp, shrinkmeta as sm
      >>> learner = sm.maml(sm.gaussian(lambda p, x: x * p["w"]), {"w": "w"})
      >>> own = sm.deltas(learner, learner.init({"w": 0.0}), {"w": jnp.ones(2)}, ["ann", "bob"])
      >>> own.ids, own.anonymous().ids
      (('ann', 'bob'), None)
    """
    return Deltas(self.thetas, About(None, self.labels, self.fingerprint))

  def index(self, ids: Iterable[TaskId]) -> np.ndarray:
    """Return the positions of tasks on the axis T, for `sm.predict_tasks`.

    Args:
      ids: N ids. An id may occur several times.

    Returns:
      the positions, [N] int32.

    Example:
      >>> import jax.numpy as jnp, shrinkmeta as sm
      >>> learner = sm.maml(sm.gaussian(lambda p, x: x * p["w"]), {"w": "w"})
      >>> own = sm.deltas(learner, learner.init({"w": 0.0}), {"w": jnp.ones(2)}, ["ann", "bob"])
      >>> own.index(["bob", "ann", "bob"])
      array([1, 0, 1], dtype=int32)

    Raises:
      KeyError: these Deltas do not have an id.
      ValueError: these Deltas are anonymous, the leaves have other tasks than the ids, or `ids` is
        empty.
      TypeError: `ids` is a single string, or has an entry that is neither a string nor an integer.
    """
    if self.ids is None:
      raise ValueError("These Deltas are anonymous: ask the Deltas that still have their ids.")
    check_deltas("deltas", self)
    wanted = task_ids("ids", ids)
    places = self.about.positions
    check_known(wanted, places, f"these Deltas of {len(places)} tasks")
    return np.array([places[task] for task in wanted], np.int32)


def deltas(learner: MetaLearner, state: MetaState, thetas: PyTree, ids: Iterable[TaskId]) -> Deltas:
  """Collect the adapted parameters of T tasks.

  The result has a fingerprint of `state.phi` and `state.constants`, a SHA-256 of the bytes of every
  leaf. `save_deltas`, `load_deltas` and `predict_tasks` compare fingerprints, and raise ValueError
  for another phi or other constants. Call this function outside jit.

  Args:
    learner: the learner that adapted the tasks.
    state: the state from which the learner adapted them.
    thetas: the first result of `learner.adapt_tasks`, leaves [T, ...], None in frozen modules.
    ids: T different strings or integers.

  Returns:
    Deltas of T tasks, in the order of `ids`.

  Raises:
    TypeError: `learner`, `state` or an id has the wrong type.
    ValueError: `thetas` does not fit `state.phi` or has a number that is not finite, or `ids` are
      not T different ids.

  Example:
    >>> import jax.numpy as jnp, shrinkmeta as sm
    >>> from shrinkmeta.serving.deltas import deltas
    >>> params = {"level": jnp.zeros(()), "slope": jnp.ones(2)}
    >>> likelihood = sm.gaussian(lambda p, x: x @ p["slope"] + p["level"], scale=1.0)
    >>> learner = sm.hand_picked(likelihood, sm.by_leaf(params), task_specific=["level"])
    >>> state = learner.init(params)
    >>> thetas, _ = learner.adapt_tasks(state, sm.Batch(jnp.ones([3, 4, 2]), jnp.ones([3, 4])))
    >>> own = deltas(learner, state, thetas, ["ann", "bob", "cleo"])
    >>> own.thetas["slope"], own.thetas["level"].shape, own.index(["cleo", "ann"])
    (None, (3,), array([2, 0], dtype=int32))
  """
  check_learner("learner", learner)
  check_state("state", state)
  modules.check_labels(learner.labels, state.phi, "state.phi")
  check_own(learner.spec, state.log_sigma2)
  names = task_ids("ids", ids)
  if len(set(names)) != len(names):
    seen: set[TaskId] = set()
    twice = next(task for task in names if task in seen or seen.add(task))
    raise ValueError(f"ids must differ from each other; {twice!r} occurs more than once.")
  parameter_tree("thetas", thetas)
  leaves = dict(validate.leaves_with_names(thetas))
  _check_leaves(leaves, state.phi, learner.labels, names)
  about = About(names, learner.labels, fingerprint(state))
  return Deltas(with_structure(state.phi, leaves), about)


def _check_leaves(
  leaves: Mapping[str, Any], phi: PyTree, labels: modules.Labels, ids: tuple[TaskId, ...]
) -> None:
  """Raise ValueError unless `leaves` are whole modules of phi with a leading axis T."""
  shared, module = dict(validate.leaves_with_names(phi)), dict(validate.leaves_with_names(labels))
  if not leaves:
    raise ValueError("thetas has no arrays: every module is frozen, so the tasks own nothing.")
  for path, leaf in leaves.items():
    if path not in shared:
      raise ValueError(f"thetas/{path} is no parameter of state.phi, which has {list(shared)}.")
    shape, dtype = jnp.shape(shared[path]), jnp.result_type(shared[path])
    if jnp.shape(leaf)[:1] != (len(ids),) or jnp.shape(leaf)[1:] != shape:
      raise ValueError(
        f"thetas/{path} must have shape [T, ...] = {(len(ids), *shape)}, T being the number of "
        f"ids; its shape is {jnp.shape(leaf)}. Pass the thetas of learner.adapt_tasks."
      )
    if jnp.result_type(leaf) != dtype:
      raise ValueError(f"thetas/{path} is {jnp.result_type(leaf)}; state.phi/{path} is {dtype}.")
    value = validate.known(leaf)
    if value is None:
      raise ValueError(f"thetas/{path} is traced or on another host. Call sm.deltas outside jit.")
    check_finite(f"thetas/{path}", value, ids)
  for path in shared:
    other = next((p for p in leaves if module[p] == module[path]), None)
    if path not in leaves and other is not None:
      raise ValueError(
        f"thetas has {other!r} and lacks {path!r} of the same module {module[path]!r}: a module is "
        "task-specific or frozen as a whole."
      )


def check_finite(name: str, leaf: np.ndarray, ids: tuple[TaskId, ...]) -> None:
  """Raise ValueError if a leaf [T, ...] has an entry that is not finite."""
  finite = np.isfinite(leaf.astype(np.float64)).reshape(len(ids), -1).all(1)
  if not finite.all():
    bad = [ids[i] for i in np.flatnonzero(~finite)]
    raise ValueError(
      f"{name} has NaN or infinite entries in {len(bad)} tasks, the first being {bad[0]!r}. Their "
      "adaptation failed: leave them out."
    )


def with_structure(phi: PyTree, leaves: Mapping[str, Any]) -> PyTree:
  """Return a tree with the structure of phi, the leaves {path: leaf}, and None elsewhere."""
  return jax.tree_util.tree_map_with_path(lambda at, _: leaves.get(validate.path_name(at)), phi)


def task_ids(name: str, ids: Iterable[TaskId]) -> tuple[TaskId, ...]:
  """Return `ids` as a tuple of str and int.

  Raises:
    TypeError: an id has another type, or `ids` is not a sequence.
    ValueError: `ids` is empty.
  """
  if isinstance(ids, str | bytes | set | frozenset) or not isinstance(ids, Iterable):
    hint = " Its order is random: pass a list." if isinstance(ids, set | frozenset) else ""
    raise TypeError(f"{name} must be a sequence of strings or integers; got {ids!r}.{hint}")

  def plain(task: Any) -> TaskId:
    if isinstance(task, str):
      return str.__str__(task)  # the text of an enum.Enum, not its name
    if isinstance(task, bool | np.bool_) or not hasattr(task, "__index__"):
      raise TypeError(f"{name} must hold strings or integers; got {task!r}, {type(task)}.")
    return operator.index(task)

  found = tuple(map(plain, ids))
  if not found:
    raise ValueError(f"{name} is empty: name at least one task.")
  return found


def check_known(wanted: Iterable[TaskId], known: Any, holder: str) -> None:
  """Raise KeyError if an id of `wanted` is not in `known`."""
  if unknown := [task for task in dict.fromkeys(wanted) if task not in known]:
    more = f" and {len(unknown) - 1} more ids" if len(unknown) > 1 else ""
    raise KeyError(f"{unknown[0]!r}{more}: unknown to {holder}. Adapt and save the task first.")


def check_deltas(name: str, deltas: Any) -> None:
  """Raise an error unless `deltas` are Deltas whose leaves have the tasks of their ids."""
  hint = "Collect them: sm.deltas(learner, state, thetas, ids)."
  validate.instance(name, deltas, Deltas, "shrinkmeta.Deltas", hint)
  lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(deltas.thetas)}
  if deltas.ids is not None and lengths != {(len(deltas.ids),)}:
    leading = {path: jnp.shape(x)[:1] for path, x in validate.leaves_with_names(deltas.thetas)}
    raise ValueError(
      f"{name} has {len(deltas.ids)} ids, and the leading axes of its leaves are {leading}: it was "
      "changed after sm.deltas. Collect the tasks again, with the ids of these alone."
    )


def fingerprint(state: MetaState | PyTree) -> dict[str, str]:
  """Return {path: dtype, shape, SHA-256} for every leaf of state.phi and state.constants.

  Args:
    state: a MetaState, or phi alone.
  """
  trees = {"phi": state}
  if isinstance(state, MetaState):
    trees = {"phi": state.phi} | ({} if state.constants is None else {"constants": state.constants})
  return {name: _print(name, leaf) for name, leaf in validate.leaves_with_names(trees)}


def check_fingerprint(have: Mapping[str, str], want: Mapping[str, str], holder: str) -> None:
  """Raise ValueError if two fingerprints differ.

  Args:
    have: the fingerprint of the state from which `holder` was adapted.
    want: the fingerprint of the current state.
    holder: the subject of the error message, such as "These Deltas".
  """
  differ = [name for name in {**want, **have} if have.get(name) != want.get(name)]
  if differ:
    short = lambda text: "absent" if text is None else text[: text.rindex(" ") + 9]
    name, more = differ[0], f" {len(differ) - 1} more leaves differ." if len(differ) > 1 else ""
    kinds = {name.partition("/")[0] for name in differ}
    words = {"phi": "another phi", "constants": "other constants"}
    what = " and ".join(word for kind, word in words.items() if kind in kinds)
    raise ValueError(
      f"{holder} belong to {what}: state.{name} was {short(have.get(name))} when the tasks "
      f"were adapted and is {short(want.get(name))} now.{more} Use the state from which they were "
      "adapted, or adapt the tasks again."
    )


def _print(name: str, leaf: Any) -> str:
  """Return the dtype, shape and SHA-256 of an array as text; hash each jax.Array only once."""
  cached = isinstance(leaf, jax.Array)
  if cached and id(leaf) in _DIGESTS:
    return _DIGESTS[id(leaf)][1]
  plain = jax.random.key_data(leaf) if is_key(leaf) else leaf
  if (value := validate.known(plain)) is None:
    raise ValueError(f"state.{name} is traced or on another host. Call this outside jit.")
  little = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<"), copy=False))
  digest = hashlib.sha256(little.reshape(-1).view(np.uint8).data).hexdigest()
  text = f"{value.dtype.name}{list(value.shape)} {digest}"
  if cached:
    place = id(leaf)
    _DIGESTS[place] = weakref.ref(leaf, lambda _: _DIGESTS.pop(place, None)), text
  return text
