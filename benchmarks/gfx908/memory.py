"""Global memory of a launch: its tensors, and which of their bytes were written, and by which lane."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np

from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.waves import LANES, Waves

_START = 0x7F00_0000_0000  # any address that is not small
_GAP = 4096  # between tensors, so that no near miss hits another one


@dataclass
class Block:
    """A tensor's bytes.

    Attributes:
        name: of the argument.
        start, size: where it lies in memory, in bytes from its start.
        filled: whether all of it held values before the launch.
    """

    name: str
    start: int
    size: int
    filled: bool


class Memory:
    """Memory that holds `contents`, name -> bytes. Those named in `empty` count as never written, whatever they are."""

    def __init__(self, contents: dict[str, np.ndarray], empty: frozenset[str] = frozenset()):
        self.blocks: list[Block] = []
        end = _GAP
        for name, content in contents.items():
            self.blocks.append(Block(name, end, content.size, name not in empty))
            end += -(-content.size // _GAP) * _GAP + _GAP
        self.octets = np.zeros(end, np.uint8)
        self.halves, self.words = self.octets.view(np.uint16), self.octets.view(np.uint32)
        self.known = np.zeros(end // 2, bool)  # of each two bytes, whether they hold a value
        self.writer = np.zeros(end // 2, np.int32)  # 1 + the lane, counted over the launch, that wrote them
        self.written_at = np.zeros(end // 2, np.int32)  # by the clock, which counts stores
        self.landed = np.zeros(end // 2, bool)  # whether its wave has waited for that store
        self.released = np.zeros(end // 2, bool)  # whether its workgroup has counted itself in since
        self.clock = 0
        self.invalidated: dict[int, int] = {}  # workgroup -> when it last threw its first cache away
        for block, content in zip(self.blocks, contents.values(), strict=True):
            self.octets[block.start : block.start + block.size] = content
            if block.filled:
                self.known[block.start // 2 : (block.start + block.size + 1) // 2] = True
        self._starts = [block.start for block in self.blocks]

    def address(self, name: str) -> int:
        (block,) = [block for block in self.blocks if block.name == name]
        return _START + block.start

    def contents(self, name: str) -> np.ndarray:
        """The bytes of a block."""
        (block,) = [block for block in self.blocks if block.name == name]
        return self.octets[block.start : block.start + block.size]

    def is_written(self, name: str) -> bool:
        """Whether the launch has written to a block."""
        (block,) = [block for block in self.blocks if block.name == name]
        return bool(self.writer[block.start // 2 : (block.start + block.size + 1) // 2].any())

    def block_at(self, place: int) -> Block | None:
        index = bisect.bisect_right(self._starts, place) - 1
        block = self.blocks[index] if index >= 0 else None
        return block if block and place < block.start + max(block.size, 1) else None

    def inside(
        self, waves: Waves, address: np.ndarray, lanes: np.ndarray, width: int, base: np.ndarray | None
    ) -> tuple[np.ndarray, list[Block]]:
        """Addresses int64 [waves, 64] as bytes from the start of memory, 0 where not in `lanes`, and their blocks.

        Args:
            base: of each wave, an address in the tensor that it means to access; None where none is known.

        Raises:
            Fault: outside of the tensor.
        """
        place = np.where(lanes, address - _START, 0)
        if not lanes.any():
            return place, []
        if waves.machine.watcher is not None and lanes.shape[1] > 1:  # scalar loads have a cache of their own
            waves.machine.watcher.memory(place, lanes, width)
        found = []
        active = place[lanes]
        anchors = active.min(keepdims=True) if base is None else np.unique(base[lanes.any(1)] - _START)
        for anchor in anchors:
            chosen = lanes if len(anchors) == 1 else lanes & (base - _START == anchor)[:, None]
            low, high = (
                (int(place[chosen].min()), int(place[chosen].max()))
                if chosen is not lanes
                else (
                    int(active.min()),
                    int(active.max()),
                )
            )
            block = self.block_at(int(anchor))
            if block is None or low < block.start or high + width > block.start + block.size:
                raise self._outside(waves, place, chosen, width, block)
            found.append(block)
        return place, found

    def _outside(
        self, waves: Waves, place: np.ndarray, lanes: np.ndarray, width: int, block: Block | None
    ) -> Fault:
        if block is None:
            return waves.fault("bounds", f"address {_START + int(place[lanes][0]):#x} is in no tensor", lanes)
        bad = lanes & ((place < block.start) | (place + width > block.start + block.size))
        byte = int(place[bad][0]) - block.start
        return waves.fault("bounds", f"byte {byte} of {block.name}, which has {block.size}", bad)

    def load(
        self,
        waves: Waves,
        place: np.ndarray,
        lanes: np.ndarray,
        width: int,
        blocks: list[Block],
        cached: bool = True,
    ) -> list[np.ndarray]:
        """What lies there, as uint32 [waves, 64] for each 4 bytes.

        Args:
            cached: whether the first cache may answer.

        Raises:
            Fault: nothing was ever written there, or what another workgroup has written may not have arrived.
        """
        if not all(block.filled for block in blocks):
            for n in range(-(-width // 2)):
                cell = (place >> 1) + n
                empty = ~self.known[cell] & lanes
                if empty.any():
                    raise waves.fault("undefined memory", self._at(place[empty][0] + 2 * n), empty)
                self._check_arrival(waves, cell, lanes, cached)
        if width == 2:
            return [self.halves[place >> 1].astype(np.uint32)]
        if (place & 3).any():
            low = place >> 1
            return [
                self.halves[low + 2 * n].astype(np.uint32)
                | (self.halves[low + 2 * n + 1].astype(np.uint32) << np.uint32(16))
                for n in range(width // 4)
            ]
        word = place >> 2
        return [self.words[word + n] for n in range(width // 4)]

    def store(
        self, waves: Waves, place: np.ndarray, lanes: np.ndarray, values: list[np.ndarray], width: int
    ) -> None:
        """Write uint32 [waves, 64] for each 4 bytes.

        Raises:
            Fault: another lane has written there, in this launch.
        """
        self.clock += 1
        where = place[lanes] >> 1
        own = np.broadcast_to((waves.ids * 64)[:, None] + np.arange(1, 65, dtype=np.int32), lanes.shape)[
            lanes
        ]
        for n in range(width // 2):
            cell = where + n
            before = self.writer[cell]
            clash = (before != 0) & (before != own)
            self.writer[cell] = own
            clash |= self.writer[cell] != own
            if clash.any():
                bad = np.zeros(lanes.shape, bool)
                bad[lanes] = clash
                block = self.block_at(int(place[bad][0]))
                detail = f"byte {int(place[bad][0]) - block.start + 2 * n} of {block.name} was written by another lane"
                raise waves.fault("two stores", detail, bad)
            value = np.broadcast_to(values[n // 2], lanes.shape)[lanes]
            self.halves[cell] = (value >> np.uint32(16 * (n % 2))).astype(np.uint16)
            self.known[cell] = True
            self.written_at[cell], self.landed[cell], self.released[cell] = self.clock, False, False

    def _at(self, place: int) -> str:
        block = self.block_at(int(place))
        return f"byte {int(place) - block.start} of {block.name}"

    def _check_arrival(self, waves: Waves, cell: np.ndarray, lanes: np.ndarray, cached: bool) -> None:
        """What another workgroup has stored is there for sure only once its waves have waited for their stores and it
        has counted itself in, by an atomic; and the reader's first cache may hold an older copy.
        """
        launch = waves.machine.program.kernel.waves
        mine = (waves.ids // launch)[:, None]
        others = lanes & ((self.writer[cell] - 1) // (LANES * launch) != mine) & (self.writer[cell] > 0)
        early = others & ~self.released[cell]
        if early.any():
            raise waves.fault(
                "race", f"{self._at(2 * cell[early][0])} is on its way from another workgroup", early
            )
        since = np.array([self.invalidated.get(int(group), 0) for group in mine[:, 0]])[:, None]
        stale = others & (self.written_at[cell] > since)
        if cached and stale.any():
            detail = f"the first cache may hold an older copy of {self._at(2 * cell[stale][0])}"
            raise waves.fault("stale", detail, stale)

    def land(self, cells: np.ndarray) -> None:
        """A wave has waited for its stores to these cells."""
        self.landed[cells] = True

    def release(self, waves: Waves) -> None:
        """Workgroups have counted themselves in: what has landed of theirs may be read by whom counts in after them."""
        launch = waves.machine.program.kernel.waves
        theirs = np.isin((self.writer - 1) // (LANES * launch), waves.ids // launch)
        self.released |= theirs & self.landed & (self.writer > 0)

    def invalidate(self, waves: Waves) -> None:
        """Workgroups throw their first cache away."""
        for group in np.unique(waves.ids // waves.machine.program.kernel.waves):
            self.invalidated[int(group)] = self.clock

    def add(self, place: int, value: int) -> int:
        """An atomic addition of 32 bits, which returns what was there."""
        before = int(self.words[place >> 2])
        self.words[place >> 2] = (before + value) & 0xFFFFFFFF
        return before
