"""The functions of formulas, and the page that lists them."""

import pathlib

from shrinkmeta.formulas.language.functions import FUNCTIONS

PAGE = pathlib.Path(__file__).absolute().parents[3] / "docs" / "mixed.md"


def test_the_page_lists_every_function():
  part = PAGE.read_text(encoding="utf-8").partition("A formula can call these functions")[2]
  listed = part.partition("`weights`")[0].split("`")[1::2]
  assert sorted(set(listed)) == sorted(FUNCTIONS)
