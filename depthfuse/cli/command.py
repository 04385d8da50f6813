"""What a command of the command line is, what all of them share, and the codes that they end with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from depthfuse.effort import ABOUT, EFFORTS
from depthfuse.errors import UsageError
from depthfuse.origins import allow_named

DONE, FAILED, WRONG_USAGE, BUDGET_MISSED, INTERRUPTED, READER_GONE = 0, 1, 2, 3, 130, 141
EXIT_CODES = {
    DONE: "done",
    FAILED: "failed; the message says what to do",
    WRONG_USAGE: "wrong usage: the command line cannot be understood",
    BUDGET_MISSED: "done, but the pruned net misses the budget",
    INTERRUPTED: "stopped by Ctrl-C",
    READER_GONE: "the reader of the output went away, as in: depthfuse env | head -1",
}
COMMON_FLAGS = {
    "--verbose": "show details, and where an error came from",
    "--quiet": "no progress: only warnings and results",
}
VALUED_FLAGS = {
    "--config": "the path of a YAML file: --config FILE",
    "--effort": f"a word: --effort {'|'.join(EFFORTS)}",
}

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Given:
    """A command line, taken apart."""

    words: list[str]
    """The command and its own flags."""
    verbosity: int
    """As for `depthfuse.log.setup`: -1 quiet, 0, 1 verbose."""
    config: str | None
    """The file of --config."""
    effort: str | None
    """The word of --effort."""


def take_apart(args: Sequence[str]) -> Given:
    """Find the flags that every command takes, wherever they stand. Raises UsageError for a contradiction."""
    words: list[str] = []
    common: set[str] = set()
    valued: dict[str, str] = {}
    rest = iter(args)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in VALUED_FLAGS:
            value = value if equals else next(rest, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{flag} needs {VALUED_FLAGS[flag]}")
            if flag in valued:
                raise UsageError(f"{flag} is given more than once ({valued[flag]}, {value}): give one")
            valued[flag] = value
        elif word in COMMON_FLAGS:
            common.add(word)
        else:
            words.append(word)
    if len(common) > 1:
        raise UsageError(f"{' and '.join(COMMON_FLAGS)} contradict each other: give one of them")
    effort = valued.get("--effort")
    if effort is not None and effort not in EFFORTS:
        raise UsageError(f"unknown effort {effort!r:.60}; known: {', '.join(EFFORTS)}")
    verbosity = 1 if "--verbose" in common else -1 if "--quiet" in common else 0
    return Given(words, verbosity, valued.get("--config"), effort)


@dataclass(frozen=True)
class Command:
    """One command. What it needs is imported when it runs."""

    name: str
    function: str
    """MODULE:FUNCTION in this package; called with an `Invocation`, returns the exit code, or None for done."""
    about: str
    examples: tuple[str, ...]
    takes_config: bool = False
    """Whether --config FILE gives its defaults."""
    takes_effort: bool = False
    """Whether --effort WORD does."""
    resumes: bool = False
    """Whether it goes on where it was stopped."""

    def run(self, given: Given) -> int:
        """Do it. Raises UsageError, other errors of depthfuse, or OSError; tyro raises SystemExit after --help."""
        if given.config is not None and not self.takes_config:
            raise UsageError(f"depthfuse {self.name} takes no --config")
        if given.effort is not None and not self.takes_effort:
            raise UsageError(f"depthfuse {self.name} takes no --effort")
        allow_named(given.words)
        module, _, name = self.function.partition(":")
        function: Callable[[Invocation], int | None] = getattr(
            importlib.import_module(f"depthfuse.cli.{module}"), name
        )
        code = function(Invocation(self, given.words[1:], given.config, given.effort))
        return DONE if code is None else code


@dataclass(frozen=True)
class Invocation:
    """A command and what it was given."""

    command: Command
    args: list[str]
    config: str | None
    effort: str | None = None

    def settings(self, kind: type[Settings]) -> Settings:
        """The flags as an instance of a dataclass: flags over --config's entries over --effort's over the defaults.

        Raises ConfigError for a file that cannot be used; SystemExit after --help (0) and for wrong flags (2).
        """
        import tyro

        from depthfuse.config import from_dict, load_yaml

        under = {} if self.effort is None else EFFORTS[self.effort]
        given: dict[str, Any] = {}
        if self.config is not None:
            given = {"default": load_yaml(self.config, kind, under=under)}
        elif under:
            given = {"default": from_dict(kind, under)}
        prog = f"depthfuse {self.command.name}"
        return tyro.cli(kind, args=self.args, prog=prog, description=self._description(), **given)

    def _description(self) -> str:
        lines = [self.command.about, ""]
        if self.command.takes_config:
            lines.append("Every flag can also stand in a YAML file, --config FILE; what stands here wins.")
        if self.command.takes_effort:
            lines += [
                "--effort WORD sets what goes together; a file and flags win. How long it will take is told first.",
                *(f"  {effort}: {about}." for effort, about in ABOUT.items()),
            ]
        lines += [f"{flag}: {meaning}." for flag, meaning in COMMON_FLAGS.items()]
        return "\n".join([*lines, "", "Examples:", *(f"  {example}" for example in self.command.examples)])
