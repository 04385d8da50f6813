"""Compile the native kernels of csrc/gpu for cards that are not there, and read off what their code uses.

    python -m benchmarks.kernels.native --out benchmarks/results/native.csv

A row for each kernel and each target whose compiler is here (hipcc: gfx908, gfx90a; nvcc: sm_80, sm_90). Exit status 1
where one spills, takes private memory, or fits no compute unit.
"""

import argparse
import csv
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.kernels.occupancy import amd_workgroups, nvidia_workgroups
from depthfuse.devices import DEVICES
from depthfuse.native.building import Missing, run_compiler
from depthfuse.native.gpu import SOURCE, compiler_of

TARGETS = ("gfx908", "gfx90a", "sm_80", "sm_90")
BLOCK_THREADS = 256  # see inverted_residual.cu
_NAME = re.compile(r"inverted_residualINS_\d+(\w+?)ELi(\d+)ELi(\d+)ELi(\d+)")


def rows(arch: str) -> Iterator[dict]:
    """A row for each kernel. Raises Missing: there is no compiler for `arch`, or it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [flag for flag in compiler_of(arch) if "fPIC" not in flag]
        if arch.startswith("gfx"):
            run_compiler(
                [*command, "--cuda-device-only", "-S", str(SOURCE), "-o", str(out)], HIP_PLATFORM="amd"
            )
            yield from _amd(arch, out.read_text())
        else:
            yield from _nvidia(
                arch, run_compiler([*command, "-Xptxas=-v", "-c", str(SOURCE), "-o", str(out)])
            )


def _row(arch: str, name: str, **numbers: int) -> dict:
    dtype, channels, outputs, stride = _NAME.search(name).groups()
    shared = shared_bytes(int(channels), int(stride))
    device = DEVICES[arch]
    if arch.startswith("gfx"):
        # gfx908: 256 of either kind a SIMD's lane, in blocks of 8. gfx90a: 512 of both together.
        used = max(numbers["registers"], numbers["accumulators"])
        total = 256 if arch == "gfx908" else 512
        waves_per_simd = min(8, total // (-(-max(used, 1) // 8) * 8))
        blocks = amd_workgroups(waves_per_simd, BLOCK_THREADS // 64, shared, device)
    else:
        blocks = nvidia_workgroups(numbers["registers"], BLOCK_THREADS // 32, shared, 0, device)
    return {
        "target": arch,
        "dtype": {"Half": "fp16", "Bfloat": "bf16"}[dtype],
        "channels": channels,
        "out_channels": outputs,
        "stride": stride,
        **numbers,
        "shared_bytes": shared,
        "blocks": blocks,
    }


def shared_bytes(channels: int, stride: int) -> int:
    """Of a block, as `Block` of inverted_residual.cu counts it."""
    height, width = (8, 8) if stride == 1 else (4, 8)
    pixels = ((height - 1) * stride + 3) * ((width - 1) * stride + 3)
    pixels = -(-pixels // 16) * 16
    hidden = 16 if stride == 2 and channels > 32 else 32
    return 2 * (pixels * (channels + 8 + hidden + 8) + height * width * (hidden + 8))


def _amd(arch: str, assembly: str) -> Iterator[dict]:
    for block in assembly.split("\n  - .agpr_count:")[1:]:

        def field(name: str, block: str = block) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", block).group(1))

        yield _row(
            arch,
            re.search(r"\.name:\s+(\S+)", block).group(1),
            registers=field("vgpr_count"),
            accumulators=int(block.split()[0]),
            spills=field("vgpr_spill_count"),
            private_bytes=field("private_segment_fixed_size"),
        )


def _nvidia(arch: str, said: str) -> Iterator[dict]:
    for block in said.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack.*?(\d+) bytes spill.*?(\d+) bytes", block).groups()
        )
        yield _row(
            arch,
            block.split("'")[0],
            registers=int(re.search(r"Used (\d+) registers", block).group(1)),
            accumulators=0,
            spills=(stores + loads) // 4,
            private_bytes=stack,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--out", type=Path, help="CSV to write")
    options = parser.parse_args()
    found = []
    for arch in options.targets:
        try:
            found += rows(arch)
        except Missing as reason:
            print(f"{arch} left out: {reason}")
    faulty = [row for row in found if row["spills"] or row["private_bytes"] or not row["blocks"]]
    for row in found:
        print(" ".join(f"{name}={value}" for name, value in row.items()), "FAULT" if row in faulty else "")
    if options.out and found:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    print(f"{len(found)} kernels, {len(faulty)} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
