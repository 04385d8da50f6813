"""What NVIDIA's machine code (SASS) says of a kernel: its instructions, and the loads in its loops."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from benchmarks.kernels.control_flow import NVIDIA, Flow
from benchmarks.kernels.opcodes import counted

_OPCODE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
# LDGSTS copies to shared memory without registers, UTMALDG whole tiles (their width is in a descriptor); LDGDEPBAR
# only counts copies.
_GLOBAL_LOADS = ("LDG.", "LDGSTS", "UTMALDG")


class NvidiaCode:
    """The disassembly of one kernel."""

    def __init__(self, text: str):
        self.lines = text.splitlines()
        self.by_line = [m.group(1) if m else "" for m in map(_OPCODE.match, self.lines)]
        self.opcodes = [opcode for opcode in self.by_line if opcode]

    def global_loads(self) -> str:
        """Loads from global memory in loops, by width: "LDGSTS.E.BYPASS.128 x4"."""
        inside = Flow(self.lines, NVIDIA).lines_in_loops()
        found = [opcode for opcode, looped in zip(self.by_line, inside, strict=True) if looped]
        return counted(found, *_GLOBAL_LOADS)


def disassemble(cubin: bytes) -> tuple[NvidiaCode, str]:
    """The code, and what cuobjdump says of the registers and memory it uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(path))
        return NvidiaCode(_run("nvdisasm", "--print-code", str(path))), usage


def _run(tool: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton brings along."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / tool), *arguments], check=True, capture_output=True, text=True).stdout
