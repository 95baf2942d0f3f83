"""The settings of the documentation site, which Sphinx makes of README.md, the pages of docs/ and the docstrings.

The sources are the repository itself, so that a link between any two of its files is right both on a forge and here. A
link to a file that is no page gives that file as a download. `make docs` builds the site; it needs no network.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

from imaml_ext import __version__ as release  # noqa: E402  (the package of this checkout)

project = "imaml_ext"
author = copyright = "imaml_ext contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "package_pages"]

# Markdown, as a forge shows it.
root_doc = "README"
include_patterns = ["README.md", "docs/**.md", "imaml_ext/pretrained/weights/*.md"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in ("README.md", "docs", "imaml_ext")]
myst_heading_anchors = 6
smartquotes = False  # An option is --name.
highlight_language = "text"  # of indented blocks, most of which are command lines

# Docstrings, whose names in `…` package_pages.py turns into links.
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # What a base class says of a method stands there.
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
nitpicky = True  # A name in a signature or a docstring's section that leads nowhere is an error.
nitpick_ignore_regex = [  # but those of other libraries, and types that only annotations name
    (r"py:.*", r"(torch|np|numpy|pathlib|collections|enum|PIL)\..*"),
    (r"py:class", r"\w+|imaml_ext\..*"),
]

html_theme = "furo"
html_title = f"imaml_ext {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
