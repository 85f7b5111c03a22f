"""Builds the package. All settings but the long description are in setup.cfg."""

import pathlib
import re


def long_description(readme: str) -> str:
  """README.md as it can be read away from the repository.

  A relative link is dead on a package index and after installation, and the project has no address
  yet that it could be made absolute with. So its text stays and its target goes. Pictures and HTML
  comments go.
  """
  text = re.sub(r"<!--.*?-->\n?", "", readme, flags=re.S)
  text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
  return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


README = pathlib.Path(__file__).with_name("README.md")

if __name__ == "__main__":
  from setuptools import setup

  setup(
    long_description=long_description(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
  )
