"""Run a depthfuse command and kill it, by SIGKILL, at its n-th write to the disk.

python -m benchmarks.tools.killed --at 7 prune --config c.yaml --out runs/x

A write counts twice, once before its bytes are sure to be on the disk (os.fsync) and once before its file gets its name
(os.replace), so that every moment at which a crash can tear something is one of the n. With --count FILE nothing is
killed, and the number of moments is written there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", type=int, default=0, help="the moment to be killed at, from 1; 0: never")
    parser.add_argument("--rank", default="0", help="under torchrun, the rank to be killed")
    parser.add_argument("--count", type=Path, help="write the number of moments here")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="of depthfuse, with its flags")
    args = parser.parse_args()
    moments = 0
    ours = os.environ.get("RANK", "0") == args.rank

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal moments
            moments += 1
            if ours and moments == args.at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    from depthfuse.cli import main as depthfuse

    code = depthfuse(args.command)
    if args.count is not None and ours:
        args.count.write_text(str(moments))
    return code


if __name__ == "__main__":
    sys.exit(main())
