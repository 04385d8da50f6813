"""How an instruction becomes something to call: operands read and written, and the table of all that are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.gfx908.assembly import EXEC, SCALAR, VCC, Instruction, Registers, registers
from benchmarks.gfx908.faults import Unsupported
from benchmarks.gfx908.waves import LANES, Waves, bits_of, lanes_of

Source = Callable[[Waves], np.ndarray]  # -> what broadcasts to [waves, 64]
_HALF_PI = "0.15915494"  # as LLVM prints the inline constant 1 / (2 pi)
_INLINE_FLOATS = {"0.5", "1.0", "2.0", "4.0", _HALF_PI}


@dataclass(frozen=True, eq=False)
class Operation:
    """A decoded instruction.

    Attributes:
        run: executes it.
        reads, writes: register numbers.
        needs: register number -> the lanes [waves, 64] of it that are read, where those are not the active ones.
        lanes: the lanes that are written, where those are not the active ones.
        depends: result's register number -> the registers that its value depends on; where given, what is undefined
            there is undefined in the result, and no fault yet: compilers compute with what they never use.
    """

    instruction: Instruction
    run: Callable[[Waves], None]
    reads: frozenset[int]
    writes: frozenset[int]
    needs: dict[int, Callable[[Waves], np.ndarray]] = field(default_factory=dict)
    lanes: Callable[[Waves], np.ndarray] | None = None
    depends: dict[int, frozenset[int]] | None = None
    touched: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "touched", self.reads | self.writes)


Builder = Callable[[Instruction], Operation]
BUILDERS: dict[str, Builder] = {}
_built: dict[str, Operation] = {}  # by text: what an instruction does depends on nothing else


def operation(*opcodes: str) -> Callable[[Builder], Builder]:
    """Registers what builds these opcodes."""

    def register(builder: Builder) -> Builder:
        for opcode in opcodes:
            assert opcode not in BUILDERS, opcode
            BUILDERS[opcode] = builder
        return builder

    return register


def build(instruction: Instruction) -> Operation:
    """Decode.

    Raises:
        Unsupported: an instruction, an operand or a modifier that is not modelled, with its text.
    """
    if known := _built.get(instruction.text):
        return replace(known, instruction=instruction)
    builder = BUILDERS.get(instruction.opcode)
    if builder is None:
        raise Unsupported(f"line {instruction.line}: {instruction.text}: an instruction that is not modelled")
    try:
        _built[instruction.text] = built = builder(instruction)
    except Unsupported as error:
        raise Unsupported(f"line {instruction.line}: {instruction.text}: {error}") from None
    return built


def made(
    instruction: Instruction,
    run: Callable[[Waves], None],
    results: int = 1,
    reads: frozenset[int] = frozenset(),
    writes: frozenset[int] = frozenset(),
    **more: object,
) -> Operation:
    """An operation whose first `results` operands are written and whose others are read, beside `reads`, `writes`."""
    found = [registers(bare(text)) for text in instruction.operands]
    written = [r.numbers for r in found[:results] if r]
    read = [r.numbers for r in found[results:] if r]
    return Operation(instruction, run, reads.union(*read), writes.union(*written), **more)


def computed(instruction: Instruction, run: Callable[[Waves], None], **more: object) -> Operation:
    """As `made`, of an operation that computes each lane from the same lane: undefined in, undefined out."""
    plain = made(instruction, run, **more)
    return replace(plain, depends=dict.fromkeys(plain.writes, plain.reads))


def only(instruction: Instruction, *known: str) -> None:
    """Raise Unsupported for a modifier that the caller does not model."""
    unknown = set(instruction.modifiers) - set(known)
    if unknown:
        raise Unsupported(f"the modifier {', '.join(sorted(unknown))} is not modelled")


def bare(text: str) -> str:
    """An operand without sign, magnitude and sign extension."""
    text = text.removeprefix("-").strip("|")
    return text[text.index("(") + 1 : -1] if text.startswith(("sext(", "neg(", "abs(")) else text


def result(text: str, kind: str = "v") -> int:
    """The first register of a result."""
    return span(text, kind).first


def span(text: str, kind: str) -> Registers:
    found = registers(text)
    if found is None or found.kind != kind:
        raise Unsupported(f"{text} is not a register of kind {kind}")
    return found


def constant(text: str, dtype: str) -> int | None:
    """The bits of a literal or an inline constant, 32 of them (16 of "f16", 64 of "u64"); None of anything else."""
    if text in _INLINE_FLOATS or text.removeprefix("-") in _INLINE_FLOATS:
        if text == _HALF_PI:
            return 0x3118 if dtype == "f16" else 0x3E22F983
        if dtype == "u64":
            raise Unsupported(f"{text} as an operand of 64 bits is not modelled")
        value = np.float16(text) if dtype == "f16" else np.float32(text)
        return int(value.view(np.uint16 if dtype == "f16" else np.uint32))
    try:
        value = int(text, 0)
    except ValueError:
        return None
    return value & (0xFFFFFFFFFFFFFFFF if dtype == "u64" else 0xFFFFFFFF)


_AS = {"u32": np.uint32, "i32": np.int32, "f32": np.float32}


def source(text: str, dtype: str, select: str = "DWORD") -> Source:
    """Reads a vector instruction's operand as [waves, 64], [waves, 1] or a scalar of `dtype`.

    Args:
        dtype: "u32", "i32" or "f32".
        select: SDWA's part of the register: "BYTE_0" to "BYTE_3", "WORD_0", "WORD_1".
    """
    kind = _AS[dtype]
    plain = bare(text)
    bits, found = constant(text, dtype), registers(plain)
    if bits is None and constant(plain, dtype) is not None:
        bits = constant(plain, dtype)
        bits = bits & 0x7FFFFFFF if text.startswith("|") else bits ^ 0x80000000
    if bits is not None:
        value = np.array(bits, np.uint32).view(kind)[()]
        return lambda waves: value
    if found is None or found.count != 1:
        raise Unsupported(f"the operand {text} is not modelled")
    number = found.first
    if plain == text and select == "DWORD":
        if found.kind == "v":
            if dtype == "f32":
                return lambda waves: waves.vf[number]
            return (lambda waves: waves.v[number]) if dtype == "u32" else (lambda w: w.v[number].view(kind))
        if found.kind == "s":
            return lambda waves: waves.s[:, number, None].view(kind)
        raise Unsupported(f"the operand {text} is not modelled")
    read = _bits(found)
    if select != "DWORD" and not text.startswith(("v", "s")):
        raise Unsupported(f"the sign of a part of a register, {text}, is not modelled")
    if select != "DWORD":
        read = _selected(read, select, text.startswith("sext("))
    elif text.startswith("sext("):
        raise Unsupported(f"{text} is not modelled")
    if "|" in text or text.startswith("abs("):
        magnitude = read
        read = lambda waves: magnitude(waves) & np.uint32(0x7FFFFFFF)  # noqa: E731
    if text.startswith(("-", "neg(")):
        positive = read
        read = lambda waves: positive(waves) ^ np.uint32(0x80000000)  # noqa: E731
    return lambda waves: read(waves).view(kind)


def moved(read: Source, instruction: Instruction) -> tuple[Source, Callable[[Waves], np.ndarray]]:
    """DPP: `read` from another lane of the same row of 16 (MI100 ISA guide, "DPP"), and the lanes that are read.

    A lane beyond the row, or one that is not active, reads as 0 (bound_ctrl:1).
    """
    rest = {name: value for name, value in instruction.modifiers.items() if name not in _PATTERNS}
    names = [name for name in instruction.modifiers if name in _PATTERNS]
    if rest != {"row_mask": "0xf", "bank_mask": "0xf", "bound_ctrl": "1"} or len(names) != 1:
        raise Unsupported("DPP other than within whole rows is not modelled")
    lane = np.arange(LANES)
    numbers = [int(n) for n in re.findall(r"\d+", instruction.modifiers[names[0]])]
    within = np.asarray(_PATTERNS[names[0]](lane % 16, numbers))
    inside = (within >= 0) & (within < 16)
    lanes = lane - lane % 16 + np.where(inside, within, 0)

    def run(waves: Waves) -> np.ndarray:
        value = np.broadcast_to(read(waves), waves.lanes.shape)[:, lanes]
        return (
            value
            if waves.full and inside.all()
            else np.where(waves.lanes[:, lanes] & inside, value, value.dtype.type(0))
        )

    def needed(waves: Waves) -> np.ndarray:
        used = np.zeros_like(waves.lanes)
        for own, other in zip(lane[inside], lanes[inside], strict=True):
            used[:, other] |= waves.lanes[:, own] & waves.lanes[:, other]
        return used

    return run, needed


_PATTERNS: dict[str, Callable[[np.ndarray, list[int]], np.ndarray]] = {
    "quad_perm": lambda lane, n: lane // 4 * 4 + np.array(n)[lane % 4],
    "row_shl": lambda lane, n: lane + n[0],
    "row_shr": lambda lane, n: lane - n[0],
    "row_ror": lambda lane, n: (lane - n[0]) % 16,
    "row_mirror": lambda lane, n: 15 - lane,
    "row_half_mirror": lambda lane, n: lane // 8 * 8 + 7 - lane % 8,
}


DPP = (*_PATTERNS, "row_mask", "bank_mask", "bound_ctrl")


def _bits(found: Registers) -> Source:
    number = found.first
    if found.kind == "v":
        return lambda waves: waves.v[number]
    if found.kind == "s":
        return lambda waves: waves.s[:, number, None]
    raise Unsupported("an accumulator is no operand of the vector unit")


def _selected(read: Source, select: str, signed: bool) -> Source:
    part, _, index = select.partition("_")
    width = {"BYTE": 8, "WORD": 16}[part]
    shift, mask = np.uint32(width * int(index)), np.uint32((1 << width) - 1)
    if not signed:
        return lambda waves: (read(waves) >> shift) & mask
    up, down = np.uint32(32 - width), np.int32(32 - width)
    return lambda waves: (((read(waves) >> shift) << up).view(np.int32) >> down).view(np.uint32)


def wide_source(text: str) -> Source:
    """Reads an operand of 64 bits as uint64 [waves, 64], [waves, 1] or a scalar."""
    bits = constant(text, "u64")
    if bits is not None:
        value = np.uint64(bits)
        return lambda waves: value
    found = registers(text)
    if found is None or found.count != 2:
        raise Unsupported(f"the operand {text} is not modelled")
    number = found.first
    if found.kind == "s":
        return lambda waves: waves.s64[:, number // 2, None]
    low, high = number, number + 1
    return lambda waves: waves.v[low].astype(np.uint64) | (waves.v[high].astype(np.uint64) << np.uint64(32))


def mask_source(text: str) -> Source:
    """Reads a pair of scalar registers as lanes, bool [waves, 64]."""
    number = span(text, "s").first // 2
    return lambda waves: lanes_of(waves.s64[:, number])


def put_mask(text: str) -> Callable[[Waves, np.ndarray], None]:
    """Writes what was found for each lane into a pair of scalar registers; lanes that are not active give 0."""
    number = span(text, "s").first
    if number == EXEC:
        raise Unsupported("a comparison that writes EXEC is not modelled")

    def put(waves: Waves, lanes: np.ndarray) -> None:
        if lanes.shape != waves.lanes.shape:
            lanes = np.broadcast_to(lanes, waves.lanes.shape)
        waves.s64[:, number // 2] = bits_of(lanes if waves.full else lanes & waves.lanes)

    return put


def put_wide(register: int) -> Callable[[Waves, np.ndarray], None]:
    """Writes uint64 [waves, 64] into two vector registers."""

    def put(waves: Waves, value: np.ndarray) -> None:
        waves.put(register, value.astype(np.uint32))
        waves.put(register + 1, (value >> np.uint64(32)).astype(np.uint32))

    return put


EXEC_BITS = frozenset({SCALAR + EXEC, SCALAR + EXEC + 1})
VCC_BITS = frozenset({SCALAR + VCC, SCALAR + VCC + 1})
