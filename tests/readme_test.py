"""README's example runs as pasted and prints what README shows."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).absolute().parents[1] / "README.md"


def test_the_first_example(capsys):
  code, shown = re.search(
    r"```python\n(.*?)```\n\n```\n(.*?)```", README.read_text(), re.S
  ).groups()
  exec(code, {})
  words, wanted = capsys.readouterr().out.split(), shown.split()
  number = re.compile(r"[\d.]+$")
  assert [number.sub("0", w) for w in words] == [number.sub("0", w) for w in wanted]
  numbers = lambda words: [float(w) for w in words if number.match(w)]
  np.testing.assert_allclose(numbers(words), numbers(wanted), rtol=0.01)
