"""Configuration of the site. BUILD.md has the command that builds it.

The source folder is the root of the repository, so that the pages of docs/, results/ and the others
are read where they lie, and the links between them are right on GitHub and in the site.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).absolute().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

import shrinkmeta  # noqa: E402

project = "shrinkmeta"
author = "The shrinkmeta authors"
copyright = author  # Sphinx's name for the line at the foot of a page
version = release = shrinkmeta.__version__

extensions = [
  "myst_nb",
  "folders",
  "reference",
  "signatures",
  "sources",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
  "tables",
]
root_doc = "docs/index"
include_patterns = [
  "BUILD.md",
  "CHANGELOG.md",
  "CONTRIBUTING.md",
  "docs/**",
  "experiments/README.md",
  "experiments/**/README.md",
  "findings/README.md",
  "results/**",
]
exclude_patterns = [
  ".*",
  "**/*.csv",
  "**/*.text.md",
  "**/.ipynb_checkpoints",
  "docs/_build",
  "docs/extensions",
  "docs/root",
  "docs/static",
  "reports",
  "runs",
  "searches",
]

smartquotes_action = "D"  # -- becomes a dash; quotes and ... stay

# Markdown and notebooks. Notebooks are text without outputs. They run, and show them, only with
# SHRINKMETA_NOTEBOOKS=cache, which takes minutes; those that have not changed do not run again.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = os.environ.get("SHRINKMETA_NOTEBOOKS", "off")
nb_execution_in_temp = True
os.environ["PYTHONPATH"] = (
  os.pathsep.join(  # of the kernels: one notebook takes data of experiments/
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  )
)
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # seconds a notebook

# Docstrings.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 70
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False

# A formula is an indented block of text; no language colours it.
highlight_language = "none"
pygments_style = "github-light"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = "shrinkmeta"
html_static_path = ["static"]
html_extra_path = ["root"]  # index.html, which leads to docs/index.html
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div.highlight-python pre, div.highlight-sh pre, div.highlight-default pre"
