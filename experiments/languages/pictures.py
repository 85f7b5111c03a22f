"""Pictures of runs: bits per byte against adaptation steps, and sigma by layer and kernel."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.pictures import canvas

_LINES = {  # method -> its name in pictures, and the algorithm whose hue it has
  "sigma_imaml": ("σ-iMAML, all kernels", "imaml"),
  "sigma_imaml_chosen": ("σ-iMAML, chosen", "boil"),
  "fine_tuning": ("fine-tuning", "fine_tuning"),
  "qv": ("LoRA on q, v", "maml"),
  "head": ("head only", "anil"),
  "reptile": ("Reptile, LoRA", "reptile"),
  "fomaml": ("FOMAML, LoRA", "fomaml"),
}
KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def draw(folder: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Write adaptation.png and sigma.png, with means over the languages and seeds of all results."""
  _adaptation(folder / "adaptation.png", results)
  _sigma(folder / "sigma.png", results)


def _adaptation(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  own = results[0]["config"]["adapt"]
  panels = [k for k in own["articles"] if k in own["long"]] or list(own["articles"])
  figure = Figure((7.5, 2.9 * len(panels)), layout="constrained")
  axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
  for ax, articles in zip(axes, panels, strict=True):
    # In JSON the NaN of a network that diverged is null.
    mean = lambda values: float(np.mean(np.array(values, float)))
    none = mean([r["methods"]["fine_tuning"]["bits"][str(articles)]["0"] for r in results])
    ax.axhline(none, color="#222222", linewidth=0.8, linestyle=":")
    low, high = none, none
    for method in dict.fromkeys(m for r in results for m in r["methods"]):
      name, hue = _LINES[method]
      some = [r["methods"][method] for r in results if method in r["methods"]]
      found = [one["bits"][str(articles)] for one in some]
      steps = [s for s in own["steps"][1:] if all(str(s) in one for one in found)]
      means = np.array([mean([one[str(s)] for one in found]) for s in steps])
      canvas.line(ax, steps, means, name, hue, method)
      low, high = np.nanmin([low, *means]), np.nanmax([high, means[0]])
    ax.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    ax.set_xscale("log")
    ax.set_title(f"{articles} articles; dotted: no adaptation")
    ax.set_ylabel("bits per byte")
  axes[-1].set_xlabel("adaptation steps")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
  canvas.save(path, figure)


def _sigma(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  layers = sorted({row["layer"] for row in results[0]["sigma"]})
  figure = Figure((7.5, 2.8), layout="constrained")
  axes = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
  for ax, layer in zip(axes, layers, strict=True):
    for n, result in enumerate(results):
      of = {r["kernel"]: r["sigma"] for r in result["sigma"] if r["layer"] == layer}
      chosen = {m.split("/")[1] for m in result["chosen"] if m.endswith(f"[{layer}]")}
      for place, kernel in enumerate(KERNELS):
        at = place + 0.15 * (n - (len(results) - 1) / 2)
        face = canvas.hue("imaml") if kernel in chosen else "white"
        ax.plot([at], [of[kernel]], "o", color=canvas.hue("imaml"), markerfacecolor=face)
    ax.set_xticks(range(len(KERNELS)), [k.removesuffix("_proj") for k in KERNELS], rotation=60)
    ax.set_yscale("log")
    ax.set_title(f"layer {layer}")
  axes[0].set_ylabel("σ (filled: chosen)")
  canvas.save(path, figure)
