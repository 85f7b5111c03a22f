"""Pictures of runs: nats against adaptation steps, sigma by layer, and spectrograms of sound."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import shrinkmeta as sm
from experiments.datasets.speech import mu_law
from experiments.datasets.speech.spoken_digits import RATE
from experiments.report.pictures import canvas

_LINES = {  # method -> its name in pictures, and the algorithm whose hue it has
  "sigma_imaml": ("σ-iMAML, all layers", "imaml"),
  "fine_tuning": ("fine-tuning, all layers", "fine_tuning"),
  "head": ("head only", "anil"),
  "biases": ("biases of the gates only", "reptile"),
}
_ROWS = {
  "recordings": "held-out recordings, loudest pieces joined",
  "no_adaptation": "drawn, no adaptation",
  "sigma_imaml": "drawn, σ-iMAML",
  "fine_tuning": "drawn, fine-tuning",
}


def draw(folder: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Write adaptation.png, sigma.png, sigma_history.png and samples.png; the last is of one run."""
  _adaptation(folder / "adaptation.png", results)
  sigma = [{row["module"]: row["sigma"] for row in r["sigma"]} for r in results]
  canvas.save(folder / "sigma.png", sm.plots.sigma_by_module(sigma))
  history = [r["sigma_log"] for r in results]
  canvas.save(folder / "sigma_history.png", sm.plots.sigma_history(history))
  _spectrograms(folder / "samples.png", results[0]["samples"])


def _adaptation(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Draw nats of held-out samples, a panel for each number of recordings."""
  own = results[0]["config"]["adapt"]
  steps = np.array(own["steps"])
  figure = Figure((7.5, 3.0 * len(own["recordings"])), layout="constrained")
  axes = figure.subplots(len(own["recordings"]), 1, squeeze=False, sharex=True)[:, 0]
  for ax, recordings in zip(axes, own["recordings"], strict=True):
    means = lambda method, part, k=recordings: np.array(
      [r["methods"][method]["nats"][str(k)][part] for r in results], float
    ).mean((0, 1))
    none = means("fine_tuning", "held_out")[0]
    ax.axhline(none, color="#222222", linewidth=0.8, linestyle=":")
    shown = [none]
    for method in results[0]["methods"]:
      name, hue = _LINES[method]
      found = means(method, "held_out")[1:]
      shown += list(found[np.isfinite(found)])
      canvas.line(ax, steps[1:], found, name, hue, method)
    room = max(max(shown) - min(shown), 1e-3)
    ax.set_ylim(min(shown) - 0.08 * room, max(shown) + 0.08 * room)
    ax.set_xscale("log")
    ax.set_xticks(steps[1:], [f"{s:,}" for s in steps[1:]])
    ax.minorticks_off()
    ax.set_title(f"{recordings} recordings; dotted: no adaptation")
    ax.set_ylabel("nats per held-out sample")
  axes[-1].set_xlabel("adaptation steps")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
  canvas.save(path, figure)


def _spectrograms(path: pathlib.Path, sounds: Mapping[str, Any]) -> None:
  """Draw the spectrogram of each sound, in dB below the loudest part of all."""
  figure = Figure((7.5, 1.75 * len(_ROWS)), layout="constrained")
  axes = figure.subplots(len(_ROWS), 1, sharex=True, sharey=True)
  for ax, (name, title) in zip(axes, _ROWS.items(), strict=True):
    sound = mu_law.decode(np.array(sounds[name]["levels"]))
    window = min(256, len(sound) // 2)
    starts = np.arange(0, len(sound) - window + 1, window // 4)
    frames = sound[starts[:, None] + np.arange(window)] * np.hanning(window)
    power = np.square(np.abs(np.fft.rfft(frames, axis=-1))).T
    decibels = 10 * np.log10(power / (window / 8) ** 2 + 1e-9)
    extent = (0.0, len(sound) / RATE, 0.0, RATE / 2_000)
    ax.imshow(
      decibels,
      origin="lower",
      aspect="auto",
      extent=extent,
      vmin=-50,
      vmax=10,
      cmap="magma",
      interpolation="nearest",
    )
    ax.set_title(title)
    ax.set_ylabel("kHz")
  axes[-1].set_xlabel("seconds")
  figure.colorbar(axes[-1].get_images()[0], ax=list(axes), label="dB", shrink=0.6)
  canvas.save(path, figure)
