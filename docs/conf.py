"""The configuration of the documentation: ``sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / '_ext'), str(HERE.parent)]

from pygments.lexers.special import TextLexer  # noqa: E402
from sphinx.highlighting import lexers  # noqa: E402

import celery_triggers  # noqa: E402

# Shown as its text; hosts of code draw it.
lexers['mermaid'] = TextLexer()

project = 'celery_triggers'
author = 'the celery_triggers developers'
project_copyright = author
release = version = celery_triggers.__version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'from_code',
]
exclude_patterns = ['_build', '_data', '_ext']
nitpicky = False

myst_enable_extensions = ['colon_fence', 'deflist']
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_typehints_format = 'short'
autodoc_preserve_defaults = True
autoclass_content = 'class'
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = 'furo'
html_title = f'celery_triggers {release}'
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {'navigation_with_keys': True}
html_static_path = ['_static']
html_css_files = ['custom.css']
