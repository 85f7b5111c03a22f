"""Every fault of `mutations.py` still has its place in the code, and a test that is there."""

import ast
import pathlib

import pytest

from tests import mutations

ROOT = pathlib.Path(__file__).absolute().parents[1]


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: f"{fault.file}-{fault.named}")
def test_a_fault_has_its_place(fault):
  path = ROOT / "shrinkmeta" / f"{fault.file}.py"
  text = path.read_text()
  assert text.count(fault.old) == 1 and fault.old != fault.new
  ast.parse(text.replace(fault.old, fault.new))
  assert (ROOT / "tests" / f"{fault.test}_test.py").exists()
