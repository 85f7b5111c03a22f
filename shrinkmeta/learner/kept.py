"""Keep the compiled programs of a learner for as long as the learner lives.

`jax.jit` keeps what it traced and compiled for a function as long as that function lives. If a
function is made anew at each call, it is also traced and compiled anew at each call. So `fit` and
`evaluate` make their functions once for a learner.
"""

from collections.abc import Callable
from typing import Any

from shrinkmeta.base import MetaLearner
from shrinkmeta.learner.learner import learner_of


def kept(learner: MetaLearner, build: Callable[[MetaLearner], Any]) -> Any:
  """Return build(learner), which is made at the first call with this learner.

  Args:
    learner: the learner.
    build: a function of a module, which makes functions from a learner.

  Returns:
    build(learner). For a learner in which the caller replaced a function it is made anew at each
    call.

  >>> import shrinkmeta as sm
  >>> learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  >>> steps = lambda learner: lambda: learner.spec.inner.steps
  >>> kept(learner, steps) is kept(learner, steps)
  True
  """
  spec = learner.spec
  if any(getattr(f, "__self__", None) is not spec for f in learner if f is not spec):
    return build(learner)
  if build not in spec.programs:
    # JAX keeps what a traced program refers to as long as the program lives. If this were `spec`,
    # which holds the program, neither would ever go (docs/hazards.md#custom-rules-keep-models). So
    # the program gets a learner of its own.
    spec.programs[build] = build(learner_of(spec))
  return spec.programs[build]
