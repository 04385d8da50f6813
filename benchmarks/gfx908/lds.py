"""LDS of the workgroups that run, and who touched which part of it since their last barrier.

The parts that are watched are units of the narrowest access of the kernel: 2 to 16 bytes. Each has two tags, of who
wrote it last and who read it last: 64 * epoch + wave + 1, where a workgroup's epoch counts its barriers. Two waves that
touch a unit in one epoch, one of them changing it, are a race, in whatever order this interpreter happens to run them.
An access that its wave has not waited for when it passes a barrier counts in the next epoch too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.gfx908.faults import Fault
from benchmarks.gfx908.waves import Flight, Waves

_EPOCH = 64


class Lds:
    """LDS of `workgroups` workgroups, `size` bytes each, watched in units of `unit` bytes."""

    def __init__(self, workgroups: int, size: int, unit: int):
        self.size = size
        self.stride = -(-size // 16) * 16
        self.unit = unit
        self.spare = workgroups * self.stride  # 16 bytes for lanes that are not active
        units = self.spare // unit + 16 // unit
        self.words = np.zeros(self.spare // 4 + 4, np.uint32)
        self.halves = self.words.view(np.uint16)
        self.writer = np.zeros(units, np.int32)
        self.reader = np.zeros(units, np.int32)
        self.shared = np.full(units, -1, np.int32)  # the last epoch in which more than one wave read
        self.epoch = np.zeros(workgroups, np.int32)

    def addresses(self, waves: Waves, address: np.ndarray, width: int) -> np.ndarray:
        """Byte offsets int64 [waves, 64] into all LDS of an access `width` bytes wide; `spare` where inactive.

        Raises:
            Fault: a lane outside of its workgroup's LDS, or not aligned.
        """
        outside = (address + width > self.size) & waves.lanes
        if outside.any():
            found = int(address[outside][0])
            raise waves.fault("bounds", f"LDS byte {found} of {self.size}, {width} bytes wide", outside)
        askew = (address % min(width, 16) != 0) & waves.lanes
        if askew.any():
            raise waves.fault(
                "alignment", f"LDS byte {int(address[askew][0])} for {width} bytes at once", askew
            )
        return np.where(waves.lanes, address + waves.workgroup[:, None] * self.stride, self.spare)

    def _own(self, waves: Waves) -> np.ndarray:
        return (self.epoch[waves.workgroup] * _EPOCH + waves.wave + 1).astype(np.int32)[:, None]

    def units(self, where: np.ndarray, width: int) -> list[np.ndarray]:
        """The units of an access, each [waves, 64]."""
        return [where // self.unit + n for n in range(max(1, width // self.unit))]

    def _meets(self, tags: np.ndarray, own: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        return (tags != own) & (tags > 0) & ((tags - 1) // _EPOCH == (own - 1) // _EPOCH) & lanes

    def read(self, waves: Waves, where: np.ndarray, width: int) -> list[np.ndarray]:
        """Note a read, and return its units.

        Raises:
            Fault: another wave wrote there since the last barrier, or nobody ever did.
        """
        own, units = self._own(waves), self.units(where, width)
        for unit in units:
            writers = self.writer[unit]
            unwritten = (writers == 0) & waves.lanes
            if unwritten.any():
                raise waves.fault("undefined LDS", self._at(where[unwritten][0]), unwritten)
            clash = self._meets(writers, own, waves.lanes)
            if clash.any():
                raise self._race(waves, "read what wave", writers, clash, where)
            self._note_readers(unit, own, waves.lanes)
        return units

    def _note_readers(self, unit: np.ndarray, own: np.ndarray, lanes: np.ndarray) -> None:
        others = self._meets(self.reader[unit], own, lanes)
        self.reader[unit] = own
        others |= (self.reader[unit] != own) & lanes
        if others.any():
            epochs = np.broadcast_to((own - 1) // _EPOCH, unit.shape)
            self.shared[unit[others]] = epochs[others]

    def write(
        self, waves: Waves, where: np.ndarray, width: int, cells: np.ndarray, values: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Write `values`, each [waves, 64], to consecutive `cells` (`words` or `halves`), and return the units.

        Waves, and lanes, may write the same value to one place: Triton lets them, where several hold it.

        Raises:
            Fault: another wave wrote another value, or read there, since the last barrier.
        """
        own, units = self._own(waves), self.units(where, width)
        over = np.zeros(where.shape, bool)  # where another wave has written in this epoch
        for unit in units:
            over |= self._meets(self.writer[unit], own, waves.lanes)
        first = where // cells.itemsize
        for n, value in enumerate(values):
            changed = over & (cells[first + n] != value)
            if changed.any():
                writers = self.writer[where // self.unit]
                raise self._race(waves, "wrote over what wave", writers, changed, where)
            cells[first + n] = value
            lost = (cells[first + n] != value) & waves.lanes
            if lost.any():
                raise waves.fault("two stores", f"different values to {self._at(where[lost][0])}", lost)
        for unit in units:
            readers = self.reader[unit]
            clash = self._meets(readers, own, waves.lanes)
            clash |= (self.shared[unit] == (own - 1) // _EPOCH) & waves.lanes
            if clash.any():
                raise self._race(waves, "wrote over what was read by wave", readers, clash, where)
            self.writer[unit] = own
        return units

    def carry_over(self, waves: Waves) -> None:
        """These waves have passed a barrier: what they have not waited for goes on into the new epoch."""
        own = self._own(waves)
        for flight in waves.flights:
            if flight.units is None or flight.counter != "lgkmcnt":
                continue
            for n in range(0, flight.units.shape[1], 64):
                unit = flight.units[:, n : n + 64]
                if flight.writes:
                    self.writer[unit] = own
                else:
                    self._note_readers(unit, own, unit < self.spare // self.unit)

    def flight(self, text: str, numbers: frozenset[int], units: list[np.ndarray], writes: bool) -> Flight:
        bare = Flight("lgkmcnt", True, numbers, text)
        return replace(bare, units=np.concatenate(units, axis=1), writes=writes) if units else bare

    def _at(self, byte: int) -> str:
        return f"LDS byte {int(byte) % self.stride}"

    def _race(self, waves: Waves, what: str, tags: np.ndarray, clash: np.ndarray, where: np.ndarray) -> Fault:
        other = (int(tags[clash][0]) - 1) % _EPOCH
        return waves.fault(
            "race", f"{what} {other} touched since the last barrier: {self._at(where[clash][0])}", clash
        )
