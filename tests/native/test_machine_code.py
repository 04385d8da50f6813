"""What the compiler made of the innermost loops: accumulators stay in registers."""

import platform
import re
import shutil
import subprocess

import pytest
from native_ops import needs_engine

from depthfuse.native.library import _built

pytestmark = [
    needs_engine,
    pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils' objdump is not installed"),
]
_INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")


def loops(text):
    """The innermost loops of a disassembly: lists of (instruction, operands)."""
    code = []
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            code.append((int(found[1], 16), found[2], found[3]))
    places = {address: i for i, (address, *_) in enumerate(code)}
    found = []
    for i, (address, name, operands) in enumerate(code):
        target = operands.split(" ")[0]
        if name.startswith("j") and re.fullmatch(r"[0-9a-f]+", target) and int(target, 16) < address:
            found.append((places.get(int(target, 16), i), i))
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [[instruction[1:] for instruction in code[start : end + 1]] for start, end in inner]


def spills(loop):
    """Vectors that are kept in memory on the stack."""
    return [
        operands
        for name, operands in loop
        if name.startswith("vmov") and re.search(r"\(%r[sb]p", operands) and re.search(r"%[yz]mm", operands)
    ]


def disassembly():
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _built()], check=True, capture_output=True, text=True
    ).stdout


def compiler_version():
    version = subprocess.run(["g++", "-dumpversion"], check=True, capture_output=True, text=True).stdout
    return int(version.split(".")[0])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.skipif(shutil.which("g++") is None, reason="which compiler built the engine is not known")
def test_each_instruction_set_has_its_own_products():
    """Whatever this processor has: a file that was compiled without them would compute by others, and as right."""
    text = disassembly()
    assert "vfmadd" in text
    if compiler_version() >= 10:
        assert len(re.findall("vdpbf16ps", text)) >= 8
    if compiler_version() >= 12:
        assert len(re.findall("tdpbf16ps", text)) >= 24 + 4  # of a step of three parts, and of one


def test_no_product_keeps_its_sums_in_memory():
    text = disassembly()
    found = loops(text)
    # They alone fetch weights ahead.
    products = [loop for loop in found if any(name == "prefetcht1" for name, _ in loop)]
    for register, least in (("%zmm", 50), ("%ymm", 10)):  # of AVX-512 and AVX2; or nothing was looked at
        assert (
            sum(any(name.startswith("vfmadd") and register in o for name, o in loop) for loop in products)
            > least
        )
    of_bfloat16 = [loop for loop in found if any(name == "vdpbf16ps" for name, _ in loop)]
    if "vdpbf16ps" in text:  # the compiler knew it: a loop for each number of rows
        assert len(of_bfloat16) >= 8
    assert [spills(loop) for loop in products + of_bfloat16 if spills(loop)] == []


def test_a_spill_would_be_seen():
    text = """
      10: vfmadd231ps (%rax),%zmm1,%zmm2
      14: vmovaps %zmm2,0x40(%rsp)
      18: jne    10 <product+0x10>
      1c: ret
    """
    (loop,) = loops(text)
    assert len(loop) == 3 and len(spills(loop)) == 1
