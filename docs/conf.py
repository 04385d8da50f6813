"""How Sphinx builds these pages; `make docs` does it, with every warning an error.

Sphinx, because it reads the docstrings of the package as they stand (autodoc), checks links and anchors itself, and is
maintained; pages are Markdown (MyST), so that they can be read on their own, too.
"""

import contextlib
import io
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

from depthfuse import __version__
from depthfuse.cli import COMMANDS, EXIT_CODES, main

project = "depthfuse"
author = "the depthfuse contributors"
project_copyright = f"{author}. Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"depthfuse {__version__}"
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `x` for code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


_COMMANDS = "<!-- the commands -->"
# A link to a Markdown file of the repository that is no page here.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[\w./-]+\.md)(?:#[\w-]+)?\)")


def help_of(name: str) -> str:
    """What `depthfuse NAME --help` prints, without colours, 100 columns wide."""
    told = io.StringIO()
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with contextlib.redirect_stdout(told):
        assert main([name, "--help"]) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", told.getvalue()).strip()


def put_commands(app: Sphinx, page: str, text: list[str]) -> None:
    """Write the codes and the help of every command into the page of them: it cannot go stale."""
    if _COMMANDS in text[0]:
        parts = [
            f"## depthfuse {name}\n\n{command.about}\n\n```text\n{help_of(name)}\n```"
            for name, command in COMMANDS.items()
        ]
        codes = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
        told = "\n".join(["| exit code | meaning |", "|---|---|", *codes])
        text[0] = text[0].replace(_COMMANDS, "\n\n".join([told, *parts]))


def as_downloads(app: Sphinx, page: str, text: list[str]) -> None:
    """Such a link opens on a forge; here the file is given as it is."""

    def download(found: re.Match) -> str:
        is_page = (
            (Path(app.srcdir, page).parent / found[2]).resolve().is_relative_to(Path(app.srcdir).resolve())
        )
        return found[0] if is_page else f"{{download}}`{found[1]} <{found[2]}>`"

    text[0] = _OUTSIDE.sub(download, text[0])


def as_text(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text with code in backticks: what reStructuredText would take for its marks is escaped."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"(\*|\||(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", put_commands)
    app.connect("source-read", as_downloads)
    app.connect("autodoc-process-docstring", as_text, priority=400)  # before napoleon makes marks of its own
    return {"parallel_read_safe": True}
