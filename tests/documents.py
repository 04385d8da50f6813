"""Documents whose code is run as it stands there: the README's and the pages of docs/."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import depthfuse
from depthfuse.cli import main
from depthfuse.cli.command import Invocation

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\w+\.py)\n")
_LINK = re.compile(r"\]\(([^)\s#]*)(#[^)\s]+)?\)")


@dataclass(frozen=True)
class Block:
    """One fenced block. heading: the nearest one above it, without its marks. line: of the fence, in `page`."""

    page: Path
    line: int
    heading: str
    language: str
    code: str

    @property
    def file(self) -> str | None:
        """The file that it is, where its first line says so: "# my_nets.py"."""
        named = _FILE.match(self.code) if self.language == "python" else None
        return named[1] if named else None

    def run(self, names: dict) -> None:
        """Execute Python in these names; tracebacks show the page and its line."""
        exec(compile("\n" * self.line + self.code, str(self.page), "exec"), names)

    def commands(self) -> list[str]:
        """The lines of a console, continuations joined, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def blocks_of(page: Path, language: str | None = None, heading: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        above = re.findall(r"^#+ (.*)$", _FENCE.sub("", text[: match.start()]), flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, above[-1] if above else "", match[1], match[2]))
    return [b for b in found if language in (None, b.language) and heading in (None, b.heading)]


def names() -> dict:
    """What a reader of a page has imported by the README's quick start."""
    import torch

    return {"__name__": "page", "depthfuse": depthfuse, "torch": torch}


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


class Understood(Exception):
    """A command's flags make sense."""


def check_flags(command: str, monkeypatch) -> None:
    """Raise AssertionError unless the command line takes the flags of `depthfuse ...` or of what torchrun starts."""
    arguments = words(command)
    start = arguments.index("depthfuse.cli" if arguments[0] == "torchrun" else "depthfuse")
    settings = Invocation.settings

    def only_read(self, kind):
        settings(self, kind)
        raise Understood

    with monkeypatch.context() as patch:
        patch.setattr(Invocation, "settings", only_read)
        try:
            code = main(arguments[start + 1 :])
        except Understood:
            return
    assert code == 0, command  # --help and --version


def links_of(page: Path) -> Iterator[tuple[str, str]]:
    """(address without anchor, anchor) of all links of a page."""
    for address, anchor in _LINK.findall(_FENCE.sub("", page.read_text())):
        yield address, anchor.removeprefix("#")


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}
