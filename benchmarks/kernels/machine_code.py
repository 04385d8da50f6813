"""Cycles that LLVM's machine code analyser counts for one turn of a kernel's loop, to compare two compilations.

    python -m benchmarks.kernels.machine_code --target gfx908 --ops conv2d linear --networks resnet34
    python -m benchmarks.kernels.machine_code --ops conv2d --option llvm_fn_attrs=target-features=+back-off-barrier
    python -m benchmarks.kernels.machine_code --assembly before.s after.s

Of each kernel the innermost loops with matrix instructions, and of each loop the ways once around it. A cycle is 4
clocks. The analyser knows one wave alone, whose loads all take the same time: it ranks compilations, and predicts no
time. It is llvm-mca, which distributions have among LLVM's tools.
"""

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kernels.amd_code import AmdCode

CLOCKS_A_CYCLE = 4  # of the analyser: one vector instruction
_ITERATIONS = 100
_UNREADABLE = re.compile(r"^[^:\n]+:(\d+):\d+: error:", re.MULTILINE)
_NOT_CODE = re.compile(r"\s*(?:\.\w|\w[\w.$]*:|$)")  # directives, labels, nothing


@dataclass(frozen=True)
class Turn:
    """One way once around a loop.

    Attributes:
        header: label of the loop.
        instructions: that the analyser read.
        dropped: instructions that it could not read; they are missing from `cycles`.
        matrix: matrix instructions.
        matrix_cycles: below which the turn cannot go: the matrix unit alone.
        vector_cycles: the vector unit alone.
        cycles: of the turn, in the long run.
    """

    header: str
    instructions: int
    dropped: tuple[str, ...]
    matrix: int
    matrix_cycles: float
    vector_cycles: float
    cycles: float


def turns(assembly: str, arch: str, tool: str) -> Iterator[Turn]:
    """Each way around each innermost loop with matrix instructions of AMD assembly.

    Args:
        tool: llvm-mca's path.

    Raises:
        RuntimeError: llvm-mca does not know `arch`, or reads none of the loop.
    """
    code = AmdCode(assembly)
    for loop in code.matrix_loops():
        for path in code.flow.paths(loop):
            lines = instructions(code.lines[number] for number in code.flow.lines(path))
            cycles, dropped = analyse(lines, arch, tool)
            vector, matrix = code.path_clocks(path, arch)
            yield Turn(
                header=code.lines[code.flow.blocks[path[0]][0]].split(":")[0],
                instructions=len(lines) - len(dropped),
                dropped=dropped,
                matrix=sum(line.startswith("v_mfma") for line in lines),
                matrix_cycles=matrix / CLOCKS_A_CYCLE,
                vector_cycles=vector / CLOCKS_A_CYCLE,
                cycles=cycles,
            )


def instructions(lines: Iterator[str]) -> list[str]:
    """Without comments, labels and directives."""
    stripped = (line.split(";")[0].strip() for line in lines)
    return [line for line in stripped if not _NOT_CODE.match(line)]


def analyse(lines: list[str], arch: str, tool: str) -> tuple[float, tuple[str, ...]]:
    """Cycles of one iteration of these instructions, and those of them that llvm-mca cannot read.

    A newer LLVM than the analyser's may write an operand in a way that it does not know. What it names as unreadable is
    left out and handed back, so that whoever compares can see whether both sides lack the same.
    """
    dropped: list[str] = []
    command = [tool, "-mtriple=amdgcn-amd-amdhsa", f"-mcpu={arch}", f"-iterations={_ITERATIONS}"]
    command += ["-instruction-info=false", "-resource-pressure=false"]
    while True:
        result = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
        if "is not a recognized processor" in result.stderr:
            raise RuntimeError(f"{tool} does not know {arch}: it needs a newer LLVM")
        unreadable = {int(number) - 1 for number in _UNREADABLE.findall(result.stderr)}
        if not unreadable:
            break
        dropped += [lines[number] for number in sorted(unreadable)]
        lines = [line for number, line in enumerate(lines) if number not in unreadable]
    total = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if not total:
        raise RuntimeError(f"{tool} read none of the loop: {result.stderr.strip() or dropped}")
    return int(total.group(1)) / _ITERATIONS, tuple(dropped)


def _compiled(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(name, assembly) of each kernel, once."""
    from benchmarks.kernels.prove import DTYPES, tile_of
    from benchmarks.kernels.registry import unique_cases
    from benchmarks.kernels.resources import compile_launch, key_of
    from depthfuse.kernels.launch import TARGETS

    target, done = TARGETS[options.target], set()
    extra = dict(option.split("=", 1) for option in options.option)
    for network, batch, name in itertools.product(options.networks, options.batches, options.dtypes):
        for case in unique_cases(network, batch):
            if (options.ops and case.op not in options.ops) or not case.supports(DTYPES[name]):
                continue
            for launch in case.launches(DTYPES[name], target):
                launch = replace(launch, options=launch.options | extra)
                key = key_of(launch, target)
                if key not in done:
                    done.add(key)
                    label = f"{name} {launch.kernel.fn.__name__} {case.shape()} [{tile_of(launch)}]"
                    yield label, compile_launch(launch, target).asm["amdgcn"]


def main() -> int:
    from benchmarks.kernels.prove import DTYPES
    from benchmarks.kernels.registry import BATCHES, NETWORKS
    from depthfuse.kernels.launch import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    amd = [name for name, target in TARGETS.items() if target.backend == "hip"]
    parser.add_argument("--target", choices=amd, default=amd[0])
    parser.add_argument(
        "--assembly", nargs="+", type=Path, help="files to read instead of kernels to compile"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet34"])
    parser.add_argument("--batches", nargs="+", type=int, default=[max(BATCHES)])
    parser.add_argument("--ops", nargs="+", help="only these operators, such as conv2d")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16"])
    parser.add_argument("--option", nargs="+", default=[], help="compiler options of text, NAME=VALUE")
    parser.add_argument("--save", type=Path, help="folder for the assembly of what is compiled")
    parser.add_argument("--mca", default="llvm-mca", help="the analyser's name or path")
    options = parser.parse_args()
    tool = shutil.which(options.mca)
    if tool is None:
        parser.error(f"{options.mca} is not installed; it is part of LLVM's tools")
    given = ((str(path), path.read_text()) for path in options.assembly or ())
    print("cycles a turn (matrix unit alone, vector unit alone), instructions, matrix instructions")
    for number, (name, assembly) in enumerate(given if options.assembly else _compiled(options)):
        print(name)
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            (options.save / f"{number}.s").write_text(f"; {name}\n{assembly}")
        for turn in turns(assembly, options.target, tool):
            note = (
                f", without {len(turn.dropped)} it cannot read: {set(turn.dropped)}" if turn.dropped else ""
            )
            print(
                f"    {turn.header}: {turn.cycles:.0f} ({turn.matrix_cycles:.0f}, {turn.vector_cycles:.0f}), "
                f"{turn.instructions}, {turn.matrix}{note}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
