"""The same calls by PEFT, in a Python that has torch, transformers and peft.

    PYTHON with_peft.py FOLDER

FOLDER is what `Problem.write` wrote. The program reads lines [name of a call, number of runs] from
its input, and prints the seconds of one run as a line of JSON. It writes the result into
FOLDER/NAME.npy at the first call. It imports nothing of this project.
"""

import json
import pathlib
import sys
import time

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]


def make_calls(folder: pathlib.Path):
  """Return {name: call}, with the names of `ours.calls`."""
  sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
  rows = torch.from_numpy(np.load(folder / "rows.npy")).long()
  data = torch.from_numpy(np.load(folder / "data.npy")).long()
  load = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder / "base").eval()
  base, names = load(), [f"task{i}" for i in range(sizes["tasks"])]
  many = peft.PeftModel.from_pretrained(load(), str(folder / "task0"), adapter_name="task0")
  for name in names[1:]:
    many.load_adapter(str(folder / name), adapter_name=name)
  many.eval()
  one = peft.PeftModel.from_pretrained(load(), str(folder / "start"), is_trainable=True)
  one.eval()  # without dropout; gradients flow all the same
  trained = [p for p in one.parameters() if p.requires_grad]
  start = [p.detach().clone() for p in trained]

  def loss_of(batch):
    logits = one(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

  def adapt():
    total = 0.0
    for batch in data:
      with torch.no_grad():
        for p, value in zip(trained, start, strict=True):
          p.copy_(value)
      optimizer = torch.optim.SGD(trained, sizes["rate"])
      for _ in range(sizes["steps"]):
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
      with torch.no_grad():
        total += float(loss_of(batch))
    return np.float32(total / len(data))

  def logits(model, tokens, **more):
    with torch.no_grad():
      return model(input_ids=tokens, use_cache=False, **more).logits.numpy()

  return {
    "base": lambda: logits(base, rows),
    "mixed": lambda: logits(many, rows, adapter_names=names),
    "base, one token": lambda: logits(base, rows[:, :1]),
    "mixed, one token": lambda: logits(many, rows[:, :1], adapter_names=names),
    "adapt": adapt,
  }


def main(folder: pathlib.Path):
  """Run the calls that the input names."""
  calls = make_calls(folder)
  versions = {m.__name__: m.__version__ for m in (peft, torch, transformers)}
  print(json.dumps(versions), flush=True)
  for line in sys.stdin:
    name, times = json.loads(line)
    began = time.perf_counter()
    found = calls[name]()
    for _ in range(times - 1):
      found = calls[name]()
    seconds = (time.perf_counter() - began) / times
    file = folder / f"{name}.npy"
    if not file.exists():
      np.save(file, found)
    print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
