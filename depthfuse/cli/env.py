"""`depthfuse env`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from depthfuse.cli.command import Invocation


@dataclass
class EnvArguments:
    """None."""


def env(invocation: Invocation) -> None:
    invocation.settings(EnvArguments)
    from depthfuse.env import render

    sys.stdout.write(render() + "\n")
