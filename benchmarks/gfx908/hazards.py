"""Wait states: pairs of instructions that need some distance, because the hardware does not hold the second one back.

Checked on the text, along every way that control can take to an instruction, executed or not. A wait state is another
instruction, or one count of s_nop. The numbers are the MI100 ISA guide's, "Manually Inserted Wait States", as LLVM has
them for gfx908 (GCNHazardRecognizer.cpp: checkMAIHazards908, checkMAILdStHazards, checkVMEMHazards, checkDPPHazards,
checkDivFMasHazards, checkRWLaneHazards, checkVALUHazards). Not checked: loads in a row of which one overwrites another
one's address, which matters only where a system replays them after page faults (XNACK), as no MI100 does by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gfx908.assembly import ACCUMULATOR, SCALAR, Instruction, name_of, registers
from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.machine import Program
from benchmarks.gfx908.matrix import SHAPES
from benchmarks.gfx908.operations import EXEC_BITS, VCC_BITS, Operation

_READ, _WRITE = "v_accvgpr_read_b32", "v_accvgpr_write_b32"
_LANE = ("v_readlane_b32", "v_writelane_b32")

# Passes of a matrix instruction -> wait states until its result is read or written by other means.
_RESULT_READ = {8: 10, 16: 18}
_RESULT_WRITTEN = {8: 7, 16: 15}
_ADDEND_WRITTEN = {8: 5, 16: 13}


@dataclass(frozen=True)
class Node:
    """An instruction of a program, its registers (none of branches and barriers), and its wait states."""

    instruction: Instruction
    reads: frozenset[int]
    writes: frozenset[int]
    states: int

    @property
    def opcode(self) -> str:
        return self.instruction.opcode

    @property
    def is_vector(self) -> bool:
        return self.opcode.startswith("v_")

    @property
    def is_matrix(self) -> bool:
        return self.opcode in SHAPES

    @property
    def is_memory(self) -> bool:
        return self.opcode.startswith(("buffer_", "global_", "ds_"))

    def operand(self, index: int) -> frozenset[int]:
        found = registers(self.instruction.operands[index])
        return found.numbers if found else frozenset()


def _node(operation: Operation) -> Node:
    i = operation.instruction
    states = 1 + int(i.operands[0], 0) if i.opcode == "s_nop" else 1
    return Node(i, operation.reads, operation.writes, states)


def needed(first: Node, second: Node) -> tuple[int, frozenset[int]]:
    """Wait states that have to lie between two instructions, and the registers because of which."""
    worst: tuple[int, frozenset[int]] = (0, frozenset())
    for states, numbers in _reasons(first, second):
        if numbers and states > worst[0]:
            worst = (states, numbers)
    return worst


def _reasons(first: Node, second: Node) -> Iterator[tuple[int, frozenset[int]]]:
    common = first.writes & second.reads
    vectors = frozenset(n for n in common if n < ACCUMULATOR)
    scalars = frozenset(n for n in common if n >= SCALAR)
    if first.is_vector and second.is_vector:
        if second.is_matrix or second.opcode == _WRITE:
            yield 2, vectors
            yield 4, first.writes & EXEC_BITS
        if second.instruction.encoding == "dpp":
            yield 2, vectors
            yield 5, first.writes & EXEC_BITS
        if second.opcode == "v_div_fmas_f32":
            yield 4, first.writes & VCC_BITS
        if second.opcode in _LANE:
            yield 4, first.writes & second.operand(2)
    if first.is_vector and second.opcode.startswith(("buffer_", "global_")):
        yield 5, scalars
    if first.opcode == _READ and second.is_memory:
        yield 2, vectors
    if second.is_vector and _holds_its_data(first.instruction):
        data = 0 if first.opcode.startswith("buffer_") else 1
        yield 1, first.operand(data) & second.writes
    yield from _accumulators(first, second)


def _holds_its_data(i: Instruction) -> bool:
    """Whether a store reads its data so late that the next instruction may not overwrite them."""
    wide = i.opcode.endswith(("_dwordx3", "_dwordx4"))
    if i.opcode.startswith("buffer_store") and wide:
        return registers(i.operands[3]) is None  # with a scalar offset it takes a cycle more
    return i.opcode.startswith("global_store") and wide


def _accumulators(first: Node, second: Node) -> Iterator[tuple[int, frozenset[int]]]:
    """Matrix results may be the addend of the next instruction at once, if it is exactly the same registers."""
    if first.is_matrix:
        passes, result = SHAPES[first.opcode].passes, first.operand(0)
        if second.opcode == _READ:
            yield _RESULT_READ[passes], result & second.reads
        elif second.opcode == _WRITE:
            yield _RESULT_WRITTEN[passes], result & second.writes
            yield _ADDEND_WRITTEN[passes], first.operand(3) & second.writes
        elif second.is_matrix:
            for index in (1, 2, 3):
                if second.operand(index) != result:
                    yield (2 if index == 3 else 4), result & second.operand(index)
    elif first.opcode == _WRITE:
        if second.opcode == _READ:
            yield 3, first.writes & second.reads
        elif second.is_matrix:
            yield 1, first.writes & second.operand(3)
            yield 3, first.writes & (second.operand(1) | second.operand(2))


def _reach(node: Node) -> int:
    """The most wait states that anything may have to keep from this instruction."""
    if node.is_matrix or node.opcode in (_READ, _WRITE):
        return max(_RESULT_READ.values())
    if node.is_memory or node.is_vector:
        special = (
            node.is_memory or node.instruction.encoding == "dpp" or node.opcode in ("v_div_fmas_f32", *_LANE)
        )
        return 5 if special else 1
    return 0


def check(program: Program) -> None:
    """Raise the first Fault of kind "hazard" that the text has."""
    nodes, before = _graph(program)
    for index, node in enumerate(nodes):
        for earlier, states in _earlier(index, nodes, before):
            wanted, numbers = needed(nodes[earlier], node)
            if states < wanted:
                first, second = nodes[earlier].instruction, node.instruction
                names = ", ".join(sorted(map(name_of, numbers)))
                raise Fault(
                    "hazard",
                    f"{states} wait states for {names}, {wanted} needed, between line {first.line}: {first.text} "
                    f"and line {second.line}: {second.text}",
                )


def _graph(program: Program) -> tuple[list[Node], list[list[int]]]:
    """All instructions in order, and for each those that can run directly before it."""
    nodes: list[Node] = []
    first: list[int] = []  # of each stretch; the next instruction's where it is empty
    for stretch in program.stretches:
        first.append(len(nodes))
        nodes += [_node(operation) for operation in stretch.operations]
        if stretch.end:
            nodes.append(Node(stretch.end, frozenset(), frozenset(), 1))
    before: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        after = [] if node.opcode in ("s_endpgm", "s_branch") else [index + 1]
        if node.opcode.startswith(("s_branch", "s_cbranch")):
            after.append(first[program.target(node.instruction)])
        for other in after:
            if other < len(nodes):
                before[other].append(index)
    return nodes, before


def _earlier(index: int, nodes: list[Node], before: list[list[int]]) -> Iterator[tuple[int, int]]:
    """(instruction, wait states between) for what can run before an instruction, so far as it can matter."""
    farthest = _reach(nodes[index])
    nearest: dict[int, int] = {}
    waiting = [(other, 0) for other in before[index]]
    while waiting:
        at, states = waiting.pop()
        if nearest.get(at, farthest) <= states:
            continue
        nearest[at] = states
        states += nodes[at].states
        waiting += [(other, states) for other in before[at]]
    yield from nearest.items()
