"""Open orbax's checkpoint manager for a folder, and keep orbax's messages out of the log."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging


def open_manager(
  folder: pathlib.Path, keep: int, asynchronous: bool, items: tuple[str, ...]
) -> Any:
  """Make orbax's manager of the folder, which keeps the `keep` latest states and the best one."""
  ocp = orbax()
  policies = ocp.checkpoint_managers
  options = ocp.CheckpointManagerOptions(
    best_fn=value_of,
    preservation_policy=policies.AnyPreservationPolicy(
      [
        policies.LatestN(keep),
        policies.BestN(get_metric_fn=value_of, n=1, keep_checkpoints_without_metrics=False),
      ]
    ),
    cleanup_tmp_directories=True,
    enable_async_checkpointing=asynchronous,
  )
  return ocp.CheckpointManager(folder, options=options, item_names=items)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keep orbax's messages out of the log, except for errors (docs/hazards.md#orbax-log)."""
  logger = logging.get_absl_logger()
  loud = ("ERROR", "CRITICAL")
  from_orbax = lambda record: "/orbax/checkpoint/" in record.pathname.replace("\\", "/")
  wanted = lambda record: record.levelname in loud or not from_orbax(record)
  logger.addFilter(wanted)
  try:
    yield
  finally:
    logger.removeFilter(wanted)


def orbax() -> Any:
  """Import orbax, or raise an error that says how to install it."""
  try:
    import orbax.checkpoint
  except ImportError as error:
    raise ImportError("Checkpoints need orbax: pip install orbax-checkpoint.") from error
  return orbax.checkpoint


def value_of(metrics: Mapping[str, float]) -> float:
  """Return minus the value: orbax maximises this number, and a small value is good."""
  return -metrics["value"]
