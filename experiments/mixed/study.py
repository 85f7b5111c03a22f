"""What the studies of the search share: flags, the comparison of every design, what is printed."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments.settings import flags as shared
from shrinkmeta import mixed

ONE = "(Intercept)"
_PRINTED = 1e-3  # nats below the reference from which a design gets a line of its own


class Simulated(NamedTuple):
  """A design, and what the reference needs of it."""

  design: mixed.Design
  family: mixed.Family
  estimator: mixed.Estimator
  kind: str
  about: str


class Reference(NamedTuple):
  """The highest log likelihood that the reference found.

  Attributes:
    value: in nats, with all constants.
    infinite: the likelihood rises towards it as a parameter goes to infinity.
  """

  value: float
  infinite: bool = False


class Settings(NamedTuple):
  """The flags of a study."""

  designs: flags.FlagHolder[int]
  first: flags.FlagHolder[int]
  starts: flags.FlagHolder[int]
  tolerance: flags.FlagHolder[float]
  seed: flags.FlagHolder[int]


def define(designs: int, starts: int) -> Settings:
  """Define the flags of a study, with its own defaults of two of them."""
  return Settings(
    flags.DEFINE_integer("designs", designs, "Number of simulated designs.", 1),
    flags.DEFINE_integer("first", 0, "Number of the first design of the seed.", 0),
    flags.DEFINE_integer("starts", starts, "Starts of the reference.", 1),
    flags.DEFINE_float("tolerance", 0.01, "Nats below the reference that count as missed."),
    shared.seed(),
  )


def random_terms(g: np.ndarray, columns: dict[str, np.ndarray], names: Sequence[Sequence[str]]):
  """One term of the factor `g` for each list of names; a term of several columns is correlated."""
  labels = tuple(map(str, range(int(g.max()) + 1)))
  return tuple(
    mixed.RandomTerm(
      "g", labels, g, tuple(part), np.stack([columns[n] for n in part], 1), len(part) > 1
    )
    for part in names
  )


def compare(
  settings: Settings,
  draw: Callable[[int, int], Simulated],
  reference: Callable[[Simulated, int, int], Reference],
) -> None:
  """Fit every design, and print how far it lies from the reference.

  Args:
    settings: the flags.
    draw: (seed, number) -> a design.
    reference: (design, starts, seed of the starts) -> its highest log likelihood.
  """
  first, designs = settings.first.value, settings.designs.value
  tolerance, starts = settings.tolerance.value, settings.starts.value
  losses, seconds = [], 0.0
  unconverged = singular = infinite = unsaid = 0
  for number in range(first, first + designs):
    simulated = draw(settings.seed.value, number)
    began = time.perf_counter()
    try:
      found = mixed.fit_design(simulated.design, simulated.family, simulated.estimator)
    except Exception as error:
      error.add_note(f"Design {number}: {simulated.kind}, {simulated.about}.")
      raise
    seconds += time.perf_counter() - began
    best = reference(simulated, starts, number)
    losses.append(best.value - found.criterion)
    unconverged += not found.converged
    singular += bool(found.singular or found.singular_correlation)
    infinite += best.infinite
    silent = best.infinite and found.converged and not found.undetermined
    unsaid += silent
    if losses[-1] > _PRINTED or not found.converged or silent:
      state = "" if found.converged else f", not converged, gradient {found.gradient:.2g}"
      state += ", a maximum at infinity that the fit does not name" if silent else ""
      print(
        f"{number}: {losses[-1]:.4f} nats below, {simulated.kind}, {simulated.estimator}, "
        f"{simulated.about}{state}",
        flush=True,
      )
  below = np.array(losses)
  print(
    f"{designs} designs from {first}, seed {settings.seed.value}: "
    f"{(below > tolerance).sum()} more than {tolerance:g} nats below the best of {starts} starts, "
    f"{(below < -tolerance).sum()} as much above it, {unconverged} not converged, {singular} "
    f"singular, {infinite} with a maximum at infinity, {unsaid} of them not named; at most "
    f"{max(below.max(), 0):.2g} nats below and {max(-below.min(), 0):.2g} above, "
    f"{seconds / designs:.3f} s a fit."
  )
