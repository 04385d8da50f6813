"""LLVM's machine code analyser on a loop: what goes in, what comes out."""

import shutil
import stat

import pytest

from benchmarks.kernels.machine_code import analyse, instructions, turns

MCA = shutil.which("llvm-mca")
needs_mca = pytest.mark.skipif(MCA is None, reason="llvm-mca is not installed")
STEP = "v_mfma_f32_32x32x8f16 a[0:15], v[0:1], v[2:3], a[0:15]"
ASSEMBLY = f"""
    v_mov_b32_e32 v9, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
    .loc    1 10 0
    s_branch .LBB0_2 ; the way round
.LBB0_2:
    ; %bb.3
    {STEP} ; sum
    v_add_u32_e32 v9, v9, v8
    s_cbranch_scc1 .LBB0_1
    s_endpgm
"""


def test_comments_labels_and_directives_are_no_instructions():
    text = instructions(iter(ASSEMBLY.splitlines()))
    branch = "s_branch .LBB0_2"
    assert text == [
        "v_mov_b32_e32 v9, 0",
        branch,
        STEP,
        "v_add_u32_e32 v9, v9, v8",
        "s_cbranch_scc1 .LBB0_1",
        "s_endpgm",
    ]


@pytest.fixture
def analyser(tmp_path):
    """A stand-in for llvm-mca: 5 cycles an instruction; it cannot read v_new, and knows no gfx1200."""
    path = tmp_path / "mca"
    path.write_text(
        "#!/bin/sh\n"
        'case "$*" in *gfx1200*) echo "\'gfx1200\' is not a recognized processor" >&2; exit 0;; esac\n'
        'awk \'/v_new/ {print "<stdin>:" NR ":1: error: invalid" > "/dev/stderr"; bad = 1} {n += 1}'
        ' END {if (!bad && n > 1) print "Total Cycles:      " 500 * n}\'\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_a_turn_of_the_loop(analyser):
    (turn,) = turns(ASSEMBLY, "gfx908", analyser)
    assert (turn.header, turn.instructions, turn.matrix, turn.dropped) == (".LBB0_1", 4, 1, ())
    assert (turn.cycles, turn.matrix_cycles, turn.vector_cycles) == (20, 16, 1)


def test_what_the_analyser_cannot_read_is_left_out_and_named(analyser):
    lines = ["v_add", "v_new 1", "v_mul", "v_new 2"]
    assert analyse(lines, "gfx908", analyser) == (10, ("v_new 1", "v_new 2"))


def test_an_architecture_that_the_analyser_does_not_know(analyser):
    with pytest.raises(RuntimeError, match="does not know gfx1200"):
        analyse(["v_add", "v_mul"], "gfx1200", analyser)


def test_a_loop_that_cannot_be_read_at_all(analyser):
    with pytest.raises(RuntimeError, match="read none of the loop"):
        analyse(["v_new 1"], "gfx908", analyser)


@needs_mca
def test_the_analyser_itself():
    """A product every 16 cycles where nothing waits for it, the next one of the same sum 20 later."""
    (turn,) = turns(ASSEMBLY, "gfx908", MCA)
    assert turn.dropped == () and turn.matrix_cycles <= turn.cycles < 2 * turn.matrix_cycles
    slower = ASSEMBLY.replace("    v_add_u32", f"    {STEP}\n    v_add_u32")
    (twice,) = turns(slower, "gfx908", MCA)
    assert twice.cycles > 1.5 * turn.cycles
