"""Blocks and loops of a kernel's assembly text: what control can come back to, and along which paths.

A line that stands between a label and a jump to it is not for that in a loop: compilers put code that leaves a loop
between the loop's blocks. So loops are found in the graph of blocks, never by position.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Syntax:
    """How an assembly language writes its jumps; each expression matches at the start of a line.

    Attributes:
        label: group 1 is the name.
        branch: group "target" is a label's name, group "condition" is empty where the jump is always taken.
        end: the program ends here and does not fall through.
    """

    label: re.Pattern
    branch: re.Pattern
    end: re.Pattern


AMD = Syntax(
    label=re.compile(r"(\.LBB\w+):"),
    branch=re.compile(r"\s+s_(?P<condition>c?)branch\w*\s+(?P<target>\.LBB\w+)"),
    end=re.compile(r"\s+s_endpgm\b"),
)
# "@P0 BRA `(.L_x_1)", "BRA.U !UP0, `(.L_x_1)", "BRA `(.L_x_1)": a predicate stands before or behind.
NVIDIA = Syntax(
    label=re.compile(r"(\.L_\w+):"),
    branch=re.compile(
        r"\s+/\*\w+\*/\s+(?P<condition>(?:@\S+)?)\s*BRA[.\w]*\s+(?P<operand>[^`]*)`\((?P<target>\.L_\w+)\)"
    ),
    end=re.compile(r"\s+/\*\w+\*/\s+(?:EXIT|RET\S*)\b"),
)


class Flow:
    """The graph of blocks of `lines`. `blocks` holds line numbers, `successors` numbers of blocks."""

    def __init__(self, lines: list[str], syntax: Syntax):
        blocks: list[list[int]] = [[]]
        block_of: dict[str, int] = {}
        for number, line in enumerate(lines):
            if label := syntax.label.match(line):
                if blocks[-1]:  # an empty one would seem to fall through into this one
                    blocks.append([])
                block_of[label.group(1)] = len(blocks) - 1
            blocks[-1].append(number)
            if syntax.branch.match(line) or syntax.end.match(line):
                blocks.append([])
        self.blocks = blocks
        self.successors: list[list[int]] = []
        for index, block in enumerate(blocks):
            last = lines[block[-1]] if block else ""
            branch = syntax.branch.match(last)
            conditional = branch and (branch["condition"] or branch.groupdict().get("operand"))
            falls_through = not syntax.end.match(last) and (not branch or conditional)
            after = [index + 1] if falls_through and index + 1 < len(blocks) else []
            if branch and branch["target"] in block_of:
                after.append(block_of[branch["target"]])
            self.successors.append(after)

    def lines_in_loops(self) -> list[bool]:
        """For each line, whether control can come back to it."""
        inside = [False] * sum(len(block) for block in self.blocks)
        every = set(range(len(self.blocks)))
        for index, block in enumerate(self.blocks):
            back = index in self._reached(index, every)
            for number in block:
                inside[number] = back
        return inside

    def innermost_loops(self, wanted: Iterable[int]) -> list[list[int]]:
        """The blocks of each loop that holds one of the lines `wanted`, and no inner loop that holds one."""
        wanted, found = set(wanted), []

        def search(nodes: set[int]) -> None:
            for loop in self._loops(nodes):
                if any(number in wanted for block in loop for number in self.blocks[block]):
                    before = len(found)
                    search(loop - {self.header(loop)})
                    if len(found) == before:
                        found.append(sorted(loop))

        search(set(range(len(self.blocks))))
        return found

    def header(self, loop: Iterable[int]) -> int:
        """The block by which control enters the loop; the first of several."""
        loop = set(loop)
        entered = {
            after
            for block, successors in enumerate(self.successors)
            if block not in loop
            for after in successors
            if after in loop
        }
        return min(entered or loop)

    def paths(self, loop: Iterable[int], most: int = 8) -> list[list[int]]:
        """Ways once around the loop, blocks in order from its header, none twice; no more than `most`."""
        loop, start, found = set(loop), self.header(loop), []
        waiting = [[start]]
        while waiting and len(found) < most:
            path = waiting.pop()
            for after in self.successors[path[-1]]:
                if after == start:
                    found.append(path)
                elif after in loop and after not in path:
                    waiting.append([*path, after])
        return found[:most]

    def lines(self, blocks: Iterable[int]) -> list[int]:
        """Line numbers of these blocks, in their order."""
        return [number for block in blocks for number in self.blocks[block]]

    def _loops(self, nodes: set[int]) -> list[set[int]]:
        """The strongly connected parts among `nodes` that have a cycle: their outermost loops."""
        reached = {node: self._reached(node, nodes) for node in nodes}
        loops, done = [], set()
        for node in sorted(nodes):
            if node in reached[node] and node not in done:
                loop = {other for other in reached[node] if node in reached[other]}
                loops.append(loop)
                done |= loop
        return loops

    def _reached(self, start: int, nodes: set[int]) -> set[int]:
        """Blocks among `nodes` that control can come to from `start`, by one jump or more."""
        seen, waiting = set(), list(self.successors[start])
        while waiting:
            block = waiting.pop()
            if block in nodes and block not in seen:
                seen.add(block)
                waiting += self.successors[block]
        return seen
