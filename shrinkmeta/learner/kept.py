"""Keep the compiled programs of a learner for as long as the learner lives.

`jax.jit` keeps what it traced and compiled for a function as long as that function lives. If a
function is made anew at each call, it is also traced and compiled anew at each call. So `fit` and
`evaluate` make their functions once for a learner.
"""

import weakref
from collections.abc import Callable
from typing import Any

from shrinkmeta.base import MetaLearner
from shrinkmeta.learner.learner import learner_of

# {update of a learner: {build: build(learner)}}. What is built holds another learner of the same
# spec and so does not keep the key alive: the entry goes when the caller's learner goes.
_KEPT: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def kept(learner: MetaLearner, build: Callable[[MetaLearner], Any]) -> Any:
  """Return build(learner), which is made at the first call with this learner.

  Args:
    learner: the learner.
    build: a function of a module, which makes functions from a learner.

  Returns:
    build(learner). A learner in which the caller replaced a function has no entry of its own: its
    functions are made anew at each call.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> built = lambda learner: lambda state: learner.spec.inner.steps
  >>> kept(learner, built) is kept(learner, built)
  True
  """
  own = learner_of(learner.spec)
  if learner != own:
    return build(learner)
  programs = _KEPT.setdefault(learner.update, {})
  if build not in programs:
    programs[build] = build(own)
  return programs[build]
