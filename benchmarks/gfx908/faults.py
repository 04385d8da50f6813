"""What can be wrong with a kernel, as seen while it runs."""


class Unsupported(Exception):
    """The kernel uses something that this interpreter does not model; the text is in the message."""


class Fault(Exception):
    """The kernel does what hardware does not promise to get right.

    Attributes:
        kind: one of KINDS.
    """

    def __init__(self, kind: str, detail: str):
        assert kind in KINDS, kind
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail

    def at(self, place: str) -> "Fault":
        """The same fault, with where it was found."""
        return Fault(self.kind, f"{self.detail}; {place}")


KINDS = {
    "wait": "a register is used before the s_waitcnt that covers its load",
    "hazard": "too few wait states between two instructions",
    "race": "waves touch the same words of LDS, or workgroups the same memory, in no order, one of them writing",
    "stale": "a load that the first cache may answer, of what another workgroup has written",
    "undefined register": "a register is read that was never written",
    "undefined LDS": "LDS is read that was never written",
    "undefined memory": "memory is read that was never written",
    "bounds": "an access outside of the tensor, or of the workgroup's LDS",
    "alignment": "an address that the access is not allowed to have",
    "two stores": "two lanes store to one address",
    "barrier": "waves of a workgroup do not meet at the same barrier",
    "endless": "the kernel does not come to its end",
}
