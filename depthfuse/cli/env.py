"""`depthfuse env`."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from depthfuse.cli.command import DONE, FAILED, Invocation

log = logging.getLogger(__name__)


@dataclass
class EnvArguments:
    """Flags of the command."""

    selftest: bool = False
    """Run every op's kernel once in each dtype, and compare it with float64; what fails is left to PyTorch from then
    on. With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on the CPU."""
    device: str | None = None
    """Where the self-test runs, as cuda:1; the first GPU by default, or the CPU where there is none."""


def env(invocation: Invocation) -> int:
    arguments = invocation.settings(EnvArguments)
    from depthfuse.env import render

    sys.stdout.write(render() + "\n")
    return _self_test(arguments.device) if arguments.selftest else DONE


def _self_test(name: str | None) -> int:
    import torch

    from depthfuse.cli.tables import print_checks
    from depthfuse.errors import UsageError
    from depthfuse.selftest.run import Check, self_test, tested_backend

    gpus = torch.cuda.device_count()
    names = [*(f"cuda:{index}" for index in range(gpus)), "cpu"]
    name = names[0] if name is None else "cuda:0" if name == "cuda" and gpus else name
    if name not in names:
        raise UsageError(f"--device {name} is not here; expected one of {', '.join(names)}")
    device = torch.device(name)
    tested = "Triton kernels" if tested_backend(device) == "triton" else "PyTorch, in place of kernels,"

    def progress(check: Check) -> None:
        log.info("%s, %s, %s: %s", check.op, check.case, check.dtype, check.state)

    log.info("testing the %s on %s", tested, device)
    checks = self_test(device, report=progress)
    print_checks(checks, f"{tested} on {device}")
    return FAILED if any(check.state == "failed" for check in checks) else DONE
