"""Opcodes in words."""

from collections import Counter
from collections.abc import Iterable


def counted(opcodes: Iterable[str], *prefixes: str) -> str:
    """ "v_mfma_f32_32x32x8f16 x16 ds_read_b128 x8", most frequent first, of the opcodes that start so, or of all."""
    found = Counter(opcode for opcode in opcodes if not prefixes or opcode.startswith(prefixes))
    return " ".join(f"{opcode} x{count}" for opcode, count in found.most_common())
