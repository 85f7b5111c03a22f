"""Pictures of a fit in files, as `shrinkmeta.plots.mixed_model` draws them."""

import pathlib

import matplotlib
from matplotlib.backend_bases import FigureCanvasBase

import shrinkmeta as sm
from experiments.runs import files
from shrinkmeta import mixed

_KNOWN = sorted(FigureCanvasBase.get_supported_filetypes())
SUFFIXES = (".png", *(f".{name}" for name in _KNOWN if name != "png"))


def write(path: pathlib.Path, model: mixed.Model, kind: str) -> None:
  """Write a picture in the format that the file's suffix names."""
  matplotlib.use("agg")
  figure = sm.plots.mixed_model(model, kind)
  with files.atomic(path) as temporary:
    figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
