"""Readings of NVIDIA's machine code, on small texts as nvdisasm writes them."""

import pytest

from benchmarks.kernels.nvidia_code import NvidiaCode

TEXT = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P1 LDG.E R120, desc[UR18][R4.64] ;
.L_x_0:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R37], desc[UR18][R18.64], P4 ;
        /*0030*/              @!P0 LDG.E.U16 R1, desc[UR18][R18.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R38], desc[UR18][R18.64] ;
        /*0050*/                   LDGDEPBAR ;
        /*0060*/                   LDS.128 R4, [R2] ;
        /*0070*/                   {jump} ;
        /*0080*/                   LDG.E.64 R8, desc[UR18][R92.64] ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   BRA `(.L_x_1);
"""
LOADS = "LDGSTS.E.BYPASS.128 x2 LDG.E.U16 x1"


@pytest.mark.parametrize("jump", ["@P0 BRA `(.L_x_0)", "BRA.U !UP0, `(.L_x_0)", "@!P1 BRA P2, `(.L_x_0)"])
def test_global_loads_in_loops_by_width(jump):
    found = NvidiaCode(TEXT.replace("{jump}", jump))
    assert found.global_loads() == LOADS
    assert found.opcodes.count("LDG.E.64") == found.opcodes.count("LDG.E") == 1  # predicated or not


def test_code_without_a_jump_back_has_no_loop():
    assert NvidiaCode(TEXT.replace("{jump}", "@P0 BRA `(.L_x_1)")).global_loads() == ""


def test_what_leaves_by_a_jump_is_no_loop():
    """Blocks behind an unconditional jump are reached by their labels alone."""
    text = """
        /*0000*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   LDG.E R1, desc[UR18][R4.64] ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_2) ;
"""
    assert NvidiaCode(text).global_loads() == ""


@pytest.mark.parametrize(
    ("jump", "loads"),
    [("@P0 BRA `(.L_x_1)", 1), ("BRA.U UP0, `(.L_x_1)", 1), ("BRA `(.L_x_1)", 0)],
)
def test_a_jump_under_a_condition_falls_through(jump, loads):
    """Here to the way back."""
    text = f"""
.L_x_0:
        /*0010*/                   LDG.E R1, desc[UR18][R4.64] ;
        /*0020*/               {jump} ;
        /*0030*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   EXIT ;
"""
    assert NvidiaCode(text).global_loads() == "LDG.E x1" * loads
