"""Settings of Sphinx, which writes the site to docs/_build/html: `make docs`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import bitdance

project, author = "BitDance", "The contributors"
release = bitdance.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"BitDance {release}"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Of Markdown files outside of docs/, which are not on the site; tests/test_links.py checks that all links exist.
suppress_warnings = ["myst.xref_missing"]
