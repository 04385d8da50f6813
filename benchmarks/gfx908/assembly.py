"""The text of a gfx908 kernel, as LLVM prints it and Triton hands it out: instructions, labels, settings.

Nothing is executed here and no meaning is given to an instruction: `operations.py` and its tables do that.
"""

import re
from dataclasses import dataclass, field

from benchmarks.gfx908.faults import Unsupported

_INSTRUCTION = re.compile(r"\s+([a-z]\w*)(?:\s+(.*))?$")
_LABEL = re.compile(r"([\w.$]+):$")
_DIRECTIVE = re.compile(r"\s*\.amdhsa_(\w+)\s+(\S+)")
_MODIFIER = re.compile(r"(?:^|\s)([a-z]\w*):(\[[^\]]*\]|[a-z]+\([^)]*\)|-?\w+)")
_ARGUMENT = re.compile(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)")
_ENCODING = re.compile(r"_(e32|e64|sdwa|dpp)$")
_REGISTERS = re.compile(r"([vsa])(?:(\d+)|\[(\d+):(\d+)\])$")

# Registers have one number each, so that sets of them are sets of integers: 256 vector registers, 256 accumulators,
# then scalars, of which VCC and EXEC are two of their own, as in the encoding (MI100 ISA guide, "Kernel State").
VECTOR, ACCUMULATOR, SCALAR = 0, 256, 512
VCC, M0, EXEC, SCALARS = 106, 124, 126, 128
_FIRST = {"v": VECTOR, "a": ACCUMULATOR, "s": SCALAR}
_NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "m0": (M0, 1)}
_NAMED |= {"exec": (EXEC, 2), "exec_lo": (EXEC, 1), "exec_hi": (EXEC + 1, 1)}


@dataclass(frozen=True)
class Registers:
    """Consecutive registers of one kind: `first` counts from VECTOR, ACCUMULATOR or SCALAR."""

    kind: str  # "v", "a" or "s"
    first: int
    count: int

    @property
    def numbers(self) -> frozenset[int]:
        start = _FIRST[self.kind] + self.first
        return frozenset(range(start, start + self.count))


def registers(text: str) -> Registers | None:
    """ "v[2:5]" or "vcc" as registers; None of anything else."""
    if text in _NAMED:
        return Registers("s", *_NAMED[text])
    match = _REGISTERS.match(text)
    if not match:
        return None
    kind, single, first, last = match.groups()
    if single:
        return Registers(kind, int(single), 1)
    return Registers(kind, int(first), int(last) - int(first) + 1)


def name_of(number: int) -> str:
    """ "v3", "a17", "s4", "vcc_lo" of a register's number."""
    if number < ACCUMULATOR:
        return f"v{number}"
    if number < SCALAR:
        return f"a{number - ACCUMULATOR}"
    names = {first: name for name, (first, count) in _NAMED.items() if count == 1}
    return names.get(number - SCALAR, f"s{number - SCALAR}")


@dataclass(frozen=True)
class Instruction:
    """One instruction as written.

    Attributes:
        line: its line in the text, from 1.
        text: without comment.
        opcode: the mnemonic without the suffix that names its encoding.
        encoding: that suffix: "e32", "e64", "sdwa", "dpp" or "".
        operands: as written, in order.
        modifiers: "offset:16" as {"offset": "16"}, "glc" as {"glc": ""}.
    """

    line: int
    text: str
    opcode: str
    encoding: str
    operands: tuple[str, ...]
    modifiers: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel in its argument segment."""

    offset: int
    size: int
    kind: str  # "global_buffer" or "by_value"


@dataclass(frozen=True)
class Kernel:
    """A kernel's text, read.

    Attributes:
        instructions: in order.
        labels: name -> index of the instruction that follows it.
        settings: the directives .amdhsa_*, by name.
        arguments: in order.
        lds_bytes: of one workgroup.
        waves: of one workgroup.
    """

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    settings: dict[str, int]
    arguments: tuple[Argument, ...]
    lds_bytes: int
    waves: int


def parse(text: str, lds_bytes: int, waves: int) -> Kernel:
    """Read one kernel's assembly.

    Args:
        lds_bytes: shared memory that the launch gives a workgroup, beyond what the text itself declares.

    Raises:
        Unsupported: a setting of the kernel that is not modelled here.
    """
    instructions, labels, settings = [], {}, {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split(";")[0].rstrip()
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif directive := _DIRECTIVE.match(line):
            name, value = directive.groups()
            if value.lstrip("-").isdigit():
                settings[name] = int(value)
        elif match := _INSTRUCTION.match(line):
            instructions.append(instruction(match.group(1), match.group(2) or "", number))
    _check(settings)
    metadata = text[text.index(".args:") :] if ".args:" in text else ""
    arguments = tuple(Argument(int(o), int(size), kind) for o, size, kind in _ARGUMENT.findall(metadata))
    lds = settings.get("group_segment_fixed_size", 0) + lds_bytes
    return Kernel(tuple(instructions), labels, settings, arguments, lds, waves)


def instruction(mnemonic: str, rest: str, line: int = 0) -> Instruction:
    """Take one instruction apart."""
    encoding = _ENCODING.search(mnemonic)
    opcode = _ENCODING.sub("", mnemonic)
    text = f"{mnemonic} {rest}".strip()
    if opcode == "s_waitcnt":
        return Instruction(line, text, opcode, "", (rest,), {})
    modifiers = dict(_MODIFIER.findall(rest))
    operands = []
    for part in re.split(r",(?![^\[]*\])", _MODIFIER.sub("", rest)):
        operand, *flags = part.split() or [""]
        modifiers |= dict.fromkeys(flags, "")
        if operand:
            operands.append(operand)
    suffix = encoding.group(1) if encoding else ""
    return Instruction(line, text, opcode, suffix, tuple(operands), modifiers)


# What a kernel may ask for that would change what its instructions mean. All of ours have these values.
_MODELLED = {
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "dx10_clamp": 1,
    "ieee_mode": 1,
    "fp16_overflow": 0,
    "private_segment_fixed_size": 0,
    "user_sgpr_dispatch_ptr": 0,
    "user_sgpr_queue_ptr": 0,
    "user_sgpr_dispatch_id": 0,
    "user_sgpr_flat_scratch_init": 0,
    "user_sgpr_private_segment_size": 0,
    "system_sgpr_private_segment_wavefront_offset": 0,
    "system_sgpr_workgroup_info": 0,
    "system_vgpr_workitem_id": 0,
}


def _check(settings: dict[str, int]) -> None:
    for name, value in settings.items():
        if name in _MODELLED and value != _MODELLED[name]:
            raise Unsupported(f".amdhsa_{name} {value}: only {_MODELLED[name]} is modelled")
