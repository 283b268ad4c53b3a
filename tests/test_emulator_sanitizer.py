"""The sanitizer and the counters of the emulated GPU: kernels with one fault each, and correct
twins of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from emulator import ptx
from emulator.engine import Finding

WORDS = 1024  # of each of the two arrays

# Every body begins with the thread's places in shared memory, in %array0 (which holds its own
# indices) and in %array1 (which holds nothing yet); %p8 is true in the first warp.
PLACES = """
setp.lt.u32 %p8, %thread, 32;
shl.b32 %r0, %thread, 2;
shl.b32 %r5, %thread, 4;
mad.wide.u32 %d0, %thread, 4, %array0;
mad.wide.u32 %d1, %thread, 4, %array1;
"""


@dataclass(frozen=True)
class Case:
    """A body with a gap, what makes it faulty there, and what makes it correct."""

    kind: str  # of the finding
    at: str  # the statement that it names
    body: str
    faulty: str
    correct: str
    block: int = 64
    grid: int = 1
    shared: int = 1024


def run(body: str, case: Case) -> list[Finding]:
    return ptx.run(
        PLACES + body,
        [ptx.aligned(np.arange(WORDS, dtype=np.uint32))],
        uninitialised=[ptx.aligned(np.full(WORDS, 77, np.uint32))],
        grid=case.grid,
        block=case.block,
        shared=case.shared,
        declarations=ptx.dynamic_shared(),
    )


WRITE_SHARED = "st.shared.b32 [%r0], %thread;\n"
OTHER_WARP = "xor.b32 %r1, %r0, 128;\n"
OTHER_LANE = "xor.b32 %r1, %r0, 4;\n"
FIRST_OF_WARP = "and.b32 %r1, %thread, 31;\nsetp.eq.b32 %p1, %r1, 0;\n"
FIRST_BLOCK = "setp.eq.u32 %p1, %block, 0;\n"
COPY = """
mad.wide.u32 %d5, %thread, 16, %array0;
cp.async.cg.shared.global [%r5], [%d5], 16;
cp.async.commit_group;
"""

CASES = {
    # bounds, alignment, initialisation
    "global_read_out_of_bounds": Case(
        "global read out of bounds", "ld.global", "{}", "ld.global.b32 %r1, [%d0+3844];",
        "ld.global.b32 %r1, [%d0+3840];",
    ),
    "global_read_before_the_beginning": Case(
        "global read out of bounds", "ld.global", "{}", "ld.global.b32 %r1, [%d0+-4];",
        "ld.global.b32 %r1, [%d0];",
    ),
    "vector_out_of_bounds": Case(
        "global read out of bounds", "ld.global",
        "mad.wide.u32 %d0, %thread, 16, %array0;\nld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, {};",
        "[%d0+3088]", "[%d0+3072]",
    ),
    "global_write_out_of_bounds": Case(
        "global write out of bounds", "st.global", "{}", "st.global.b32 [%d1+3844], %thread;",
        "st.global.b32 [%d1+3840], %thread;",
    ),
    "generic_address_out_of_bounds": Case(
        "global write out of bounds", "st.b16", "{}", "st.b16 [%d1+4094], %h1;",
        "st.b16 [%d1+3842], %h1;",
    ),
    "shared_read_out_of_bounds": Case(
        "shared read out of bounds", "ld.shared",
        WRITE_SHARED + "bar.sync 0;\nld.shared.b32 %r1, {};", "[%r0+4]", "[%r0]", shared=256,
    ),
    "shared_write_out_of_bounds": Case(
        "shared write out of bounds", "st.shared", "st.shared.b32 {}, %r1;", "[%r0+772]",
        "[%r0+768]",
    ),
    "shared_address_below_zero": Case(
        "shared write out of bounds", "st.shared", "st.shared.b32 {}, %r1;", "[%r0+-4]", "[%r0]",
    ),
    "shared_read_out_of_bounds_by_ldmatrix": Case(
        "shared read out of bounds", "ldmatrix",
        "st.shared.v4.b32 [%r5], {{%r1, %r1, %r1, %r1}};\nbar.warp.sync -1;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, {};",
        "[%r5+16]", "[%r5]", block=32, shared=512,
    ),
    "source_of_a_copy_out_of_bounds": Case(
        "global read out of bounds", "cp.async.cg",
        "mov.u32 %r1, {};\nadd.s64 %d5, %array0, 4096;\n"
        "cp.async.cg.shared.global [%r0], [%d5], 16, %r1;\ncp.async.wait_all;", "1", "0", block=1,
    ),
    "misaligned_global": Case(
        "misaligned global access", "ld.global", "ld.global.v2.b32 {{%r1, %r2}}, {};",
        "[%array0+4]", "[%array0+8]",
    ),
    "misaligned_shared": Case(
        "misaligned shared access", "ld.shared",
        "st.shared.v4.b32 [%r5], {{%r1, %r1, %r1, %r1}};\n"
        "ld.shared.v2.b32 {{%r1, %r2}}, {};", "[%r5+4]", "[%r5+8]", block=1,
    ),
    "misaligned_source_of_a_copy": Case(
        "misaligned global access", "cp.async.cg",
        "add.s64 %d5, %array0, {};\ncp.async.cg.shared.global [%r0], [%d5], 16;\n"
        "cp.async.wait_all;", "8", "16", block=1,
    ),
    "misaligned_target_of_a_copy": Case(
        "misaligned shared access", "cp.async.cg",
        "add.u32 %r1, %r0, {};\ncp.async.cg.shared.global [%r1], [%array0], 16;\n"
        "cp.async.wait_all;", "8", "16", block=1,
    ),
    "copy_of_more_than_there_is_room_for": Case(
        "copies more than there is room for", "cp.async.cg",
        "mov.u32 %r1, {};\ncp.async.cg.shared.global [%r0], [%array0], 16, %r1;\n"
        "cp.async.wait_all;", "17", "15", block=1,
    ),
    "uninitialised_global": Case(
        "reads uninitialised global memory", "ld.global",
        "{}\nld.global.v2.b16 {{%h1, %h2}}, [%d1];", "st.global.b16 [%d1], %h1;",
        "st.global.b32 [%d1], %r1;",
    ),
    "uninitialised_shared": Case(
        "reads uninitialised shared memory", "ld.shared",
        "{}\nld.shared.v2.b16 {{%h1, %h2}}, [%r0];", "st.shared.b16 [%r0], %h1;", WRITE_SHARED,
    ),
    "uninitialised_source_of_a_copy": Case(
        "reads uninitialised global memory", "cp.async.cg",
        "st.global.v2.b32 [%array1], {{%r1, %r1}};\nmov.u32 %r1, {};\n"
        "cp.async.cg.shared.global [%r0], [%array1], 16, %r1;\ncp.async.wait_all;", "12", "8",
        block=1,
    ),
    "parameter_out_of_bounds": Case(
        "parameter out of bounds", "ld.param.u32",
        "mov.b64 %d2, array0;\nadd.s64 %d2, %d2, {};\nld.param.u32 %r1, [%d2];", "24", "20",
    ),
    # copies
    "copy_read_before_the_wait": Case(
        "reads data of an unfinished copy", "ld.shared",
        COPY + "{}\nld.shared.b32 %r1, [%r5];\ncp.async.wait_all;", "", "cp.async.wait_group 0;",
    ),
    "copy_read_after_a_weak_wait": Case(
        "reads data of an unfinished copy", "ld.shared",
        COPY + "cp.async.wait_group {};\nld.shared.b32 %r1, [%r5];\ncp.async.wait_all;", "1", "0",
    ),
    "copy_read_after_a_wait_without_its_group": Case(
        "reads data of an unfinished copy", "ld.shared",
        "cp.async.cg.shared.global [%r0], [%array0], 16;\n{}\ncp.async.wait_group 0;\n"
        "ld.shared.b32 %r1, [%r0];\ncp.async.wait_all;", "", "cp.async.commit_group;", block=1,
    ),
    "copy_read_by_ldmatrix_before_the_wait": Case(
        "reads data of an unfinished copy", "ldmatrix",
        COPY + "cp.async.wait_group {};\nbar.warp.sync -1;\n"
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r5];\n"
        "cp.async.wait_all;", "1", "0", block=32,
    ),
    "copy_overwritten": Case(
        "overwrites data of an unfinished copy", "st.shared",
        COPY + "{}\nst.shared.b32 [%r5], %r1;\ncp.async.wait_all;", "", "cp.async.wait_all;",
    ),
    "copy_overwritten_by_another": Case(
        "overwrites data of an unfinished copy", "[%array0], 16",
        COPY + "{}\ncp.async.cg.shared.global [%r5], [%array0], 16;\ncp.async.wait_all;", "",
        "cp.async.wait_all;",
    ),
    "copy_waited_for_by_its_thread_only": Case(
        "race of a shared read with a write of another warp", "ld.shared",
        COPY + "cp.async.wait_all;\n{}\nxor.b32 %r1, %r5, 512;\n@!%p8 ld.shared.b32 %r1, [%r1];",
        "",
        "bar.sync 0;",
    ),
    "copy_waited_for_by_its_lane_only": Case(
        "race of a shared read with a write within a warp", "ld.shared",
        COPY + "cp.async.wait_all;\n{}\nxor.b32 %r1, %r5, 16;\nld.shared.b32 %r1, [%r1];", "",
        "bar.warp.sync -1;",
    ),
    "copy_waited_for_after_the_barrier": Case(
        "race of a shared read with a write of another warp", "ld.shared",
        COPY + "{}\nxor.b32 %r1, %r5, 512;\n@!%p8 ld.shared.b32 %r1, [%r1];",
        "bar.sync 0;\ncp.async.wait_all;", "cp.async.wait_all;\nbar.sync 0;",
    ),
    "copy_that_nobody_waits_for": Case(
        "ends with unfinished copies", "ret;", COPY + "{}\nret;", "", "cp.async.wait_all;",
    ),
    # shared memory
    "read_after_write_between_warps": Case(
        "race of a shared read with a write of another warp", "ld.shared",
        WRITE_SHARED + "{}\n" + OTHER_WARP + "@!%p8 ld.shared.b32 %r1, [%r1];", "bar.warp.sync -1;",
        "bar.sync 0;",
    ),
    "write_after_read_between_warps": Case(
        "race of a shared write with a read of another warp", "%r2;",
        WRITE_SHARED + "bar.sync 0;\n" + OTHER_WARP + "@%p8 ld.shared.b32 %r2, [%r1];\n{}\n"
        "@!%p8 st.shared.b32 [%r0], %r2;", "bar.warp.sync -1;", "bar.sync 0;",
    ),
    "write_after_reads_of_several_warps": Case(
        "race of a shared write with a read of another warp", "%r2;",
        "mov.u32 %r4, 0;\nsetp.eq.u32 %p1, %thread, 64;\n@%p1 st.shared.b32 [%r4], %thread;\n"
        "bar.sync 0;\nld.shared.b32 %r2, [%r4];\n{}\n@%p1 st.shared.b32 [%r4], %r2;",
        "bar.warp.sync -1;", "bar.sync 0;", block=96,
    ),
    "write_after_write_between_warps": Case(
        "race of shared writes between warps", "[%r1]",
        WRITE_SHARED + "{}\n" + OTHER_WARP + "@!%p8 st.shared.b32 [%r1], %thread;", "",
        "bar.sync 0;",
    ),
    "the_same_value_from_two_warps": Case(
        "race of shared writes between warps, of the same value", "st.shared",
        FIRST_OF_WARP + "setp.{}.u32 %p2, %thread, 32;\nand.pred %p1, %p1, %p2;\n"
        "mov.u32 %r1, 0;\n@%p1 st.shared.b32 [%r1], 5;", "le", "lt",
    ),
    "read_after_write_within_a_warp": Case(
        "race of a shared read with a write within a warp", "ld.shared",
        WRITE_SHARED + "{}\n" + OTHER_LANE + "ld.shared.b32 %r1, [%r1];", "",
        "bar.warp.sync -1;",
    ),
    "write_after_read_within_a_warp": Case(
        "race of a shared write with a read within a warp", "%r2;",
        WRITE_SHARED + "bar.warp.sync -1;\n" + OTHER_LANE + "ld.shared.b32 %r2, [%r1];\n{}\n"
        "st.shared.b32 [%r0], %r2;", "", "bar.warp.sync -1;",
    ),
    "write_after_write_within_a_warp": Case(
        "race of shared writes within a warp", "[%r1]",
        WRITE_SHARED + "{}\n" + OTHER_LANE + "st.shared.b32 [%r1], %thread;", "",
        "bar.warp.sync -1;",
    ),
    "two_lanes_at_one_place_in_one_instruction": Case(
        "race of shared writes within a warp", "st.shared",
        "and.b32 %r1, %r0, {};\nst.shared.b32 [%r1], %thread;", "-8", "-4",
    ),
    "the_same_value_from_two_lanes": Case(
        "race of shared writes within a warp, of the same value", "st.shared",
        "and.b32 %r1, %r0, {};\nst.shared.b32 [%r1], 5;", "-8", "-4",
    ),
    "a_warp_that_meets_without_some_lanes": Case(
        "race of a shared read with a write within a warp", "ld.shared",
        WRITE_SHARED + "setp.lt.u32 %p1, %thread, {};\n@!%p1 bra APART;\n"
        "bar.warp.sync %r9;\n" + OTHER_LANE + "ld.shared.b32 %r1, [%r1];\nAPART:",
        "8;\nmov.u32 %r9, 255", "32;\nmov.u32 %r9, -1", block=32,
    ),
    "halves_of_a_word_by_two_lanes": Case(
        "race of shared writes within a warp", "st.shared",
        "shl.b32 %r1, %thread, 1;\nand.b32 %r1, %r1, {};\ncvt.u16.u32 %h1, %thread;\n"
        "st.shared.b16 [%r1], %h1;", "-4", "-2",
    ),
    # global memory
    "write_after_write_between_blocks": Case(
        "race of global writes between blocks", "st.global",
        "{}\nst.global.b32 [%d1], %thread;",
        "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d1, %r1, 4, %array1;", "", grid=2,
    ),
    "the_same_value_from_two_blocks": Case(
        "race of global writes between blocks, of the same value", "st.global",
        "{}\nst.global.b32 [%d1], 5;",
        "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d1, %r1, 4, %array1;", "", grid=2,
    ),
    "read_of_what_another_block_wrote": Case(
        "race of a global read with a write of another block", "ld.global",
        "st.global.b32 [%d1], %thread;\n{}\nld.global.b32 %r1, [%d1];",
        "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d1, %r1, 4, %array1;", "", grid=2,
    ),
    "write_of_what_another_block_read": Case(
        "race of a global write with a read of another block", "st.global",
        "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d2, %r1, 4, %array0;\nld.global.b32 %r1, [%d2];\n"
        + FIRST_BLOCK + "@%p1 bra DONE;\nst.global.b32 {}, %r1;\nDONE:", "[%d2]", "[%d0]", grid=2,
    ),
    "write_of_what_several_blocks_read": Case(
        "race of a global write with a read of another block", "st.global",
        "ld.global.b32 %r1, [%array0];\nsetp.eq.u32 %p1, %thread, {};\n"
        "@%p1 st.global.b32 [%array0], %r1;", "128", "9999", grid=3,
    ),
    "halves_of_a_word_by_two_blocks": Case(
        "race of global writes between blocks", "st.global",
        "cvt.u16.u32 %h1, %thread;\nmad.wide.u32 %d2, %block, {}, %array1;\n"
        "st.global.b16 [%d2], %h1;", "0", "2", block=1, grid=2,
    ),
    "constant_read_of_what_was_written": Case(
        "reads as constant what the launch writes", "ld.global",
        "st.global.b32 [%d1], %thread;\n{}.b32 %r1, [%d1];", "ld.global.nc", "ld.global",
    ),
    "write_of_what_was_read_as_constant": Case(
        "writes what the launch reads as constant", "st.global",
        "{}.b32 %r1, [%d0];\nld.global.b32 %r2, [%d0];\nst.global.b32 [%d0], %thread;",
        "ld.global.nc", "ld.global",
    ),
    # what a block or a warp does together
    "barrier_in_a_branch": Case(
        "a barrier that not all lanes reach", "bar.sync",
        "setp.lt.u32 %p1, %thread, {};\n@!%p1 bra APART;\nbar.sync 0;\nAPART:", "16", "32",
        block=32,
    ),
    "barrier_under_a_predicate": Case(
        "a barrier that not all lanes reach", "bar.sync",
        "setp.lt.u32 %p1, %thread, {};\n@%p1 bar.sync 0;", "48", "64",
    ),
    "barrier_that_an_ended_warp_misses": Case(
        "a barrier that ended warps do not reach", "bar.sync",
        "setp.ge.u32 %p1, %thread, {};\n@%p1 ret;\nbar.sync 0;", "32", "64",
    ),
    "different_barriers": Case(
        "warps wait at different barriers", "bar.sync 0; // second",
        "setp.lt.u32 %p1, %thread, {};\n@!%p1 bra SECOND;\nbar.sync 0;\nbra.uni DONE;\n"
        "SECOND:\nbar.sync 0; // second\nDONE:", "32", "64",
    ),
    "shuffle_without_a_named_lane": Case(
        "a lane that is named does not take part", "shfl",
        "setp.lt.u32 %p1, %thread, {};\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "16", "32",
        block=32,
    ),
    "shuffle_by_a_lane_that_is_not_named": Case(
        "a lane that is not named takes part", "shfl",
        "shfl.sync.bfly.b32 %r1, %r0, 1, 31, {};", "65535", "-1",
    ),
    "shuffle_from_a_lane_that_is_elsewhere": Case(
        "reads a lane that does not take part", "shfl",
        "setp.lt.u32 %p1, %thread, 16;\n"
        "@%p1 shfl.sync.idx.b32 %r1, %r0, {}, 31, 65535;", "16", "15", block=32,
    ),
    "vote_without_a_named_lane": Case(
        "a lane that is named does not take part", "vote",
        "setp.lt.u32 %p1, %thread, 16;\n@%p1 vote.sync.any.pred %p2, %p1, {};", "-1", "65535",
        block=32,
    ),
    "sum_without_a_named_lane": Case(
        "a lane that is named does not take part", "redux",
        "setp.lt.u32 %p1, %thread, 16;\n@%p1 redux.sync.add.s32 %r1, %r0, {};", "-1", "65535",
        block=32,
    ),
    "warp_barrier_without_a_named_lane": Case(
        "a lane that is named does not take part", "bar.warp.sync",
        "setp.lt.u32 %p1, %thread, 16;\n@%p1 bar.warp.sync {};", "-1", "65535", block=32,
    ),
    "mma_without_some_lanes": Case(
        "not all lanes take part", "mma",
        "setp.lt.u32 %p1, %thread, {};\n@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r1, %r2}}, {{%f1, %f2, %f3, %f4}};",
        "31", "32", block=32,
    ),
    "ldmatrix_without_some_lanes": Case(
        "not all lanes take part", "ldmatrix",
        "mov.u32 %r5, 0;\nsetp.eq.u32 %p2, %thread, 0;\n"
        "@%p2 st.shared.v4.b32 [%r5], {{%r1, %r1, %r1, %r1}};\nbar.warp.sync -1;\n"
        "setp.ge.u32 %p1, %thread, {};\n"
        "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r5];", "1", "0", block=32,
    ),
    "mma_in_a_warp_that_is_not_full": Case(
        "not all lanes take part", "mma",
        "setp.lt.u32 %p1, %thread, {};\n@!%p1 bra DONE;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r1, %r2}}, {{%f1, %f2, %f3, %f4}};\n"
        "DONE:", "48", "32", block=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_found_where_it_is(name: str) -> None:
    case = CASES[name]
    body = case.body.format(case.faulty)
    found = run(body, case)
    assert [(f.kind, f.place) for f in found] == [(case.kind, ptx.line_of(PLACES + body, case.at))]
    assert run(case.body.format(case.correct), case) == []


# ---- buffers ------------------------------------------------------------------------------------

WAYS = {
    "an addition": "mov.u64 %d2, %array0;\nadd.s64 %d2, %d2, {};",
    "a product": "mov.u32 %r1, {};\nmad.wide.u32 %d2, %r1, 1, %array0;",
    "a difference": "mov.u64 %d3, {};\nneg.s64 %d3, %d3;\nsub.s64 %d2, %array0, %d3;",
    "a selection": "setp.eq.u32 %p1, %r1, %r1;\nselp.b64 %d3, %array0, %array1, %p1;\n"
    "add.s64 %d2, %d3, {};",
    "an offset": "mov.u64 %d2, %array0;\n// {}",
    "a table": "st.global.u64 [%array2], %array0;\nld.global.u64 %d3, [%array2];\n"
    "cvta.to.global.u64 %d3, %d3;\nadd.s64 %d2, %d3, {};",
}


@pytest.mark.parametrize("access", ["read", "write", "copy"])
@pytest.mark.parametrize("way", WAYS)
def test_an_overrun_into_the_next_buffer(way: str, access: str) -> None:
    """Buffers that touch each other: an address keeps to the one that it was made from."""
    for overrun in (False, True):
        both = ptx.aligned(np.zeros(512, np.uint32))
        place = 1024 if overrun else 1008
        offset = f"+{place}" if way == "an offset" else ""
        if access == "copy" and offset:
            continue
        statement = {
            "read": f"ld.global.b32 %r1, [%d2{offset}];",
            "write": f"st.global.b32 [%d2{offset}], %r1;",
            "copy": "cp.async.cg.shared.global [%r2], [%d2], 16;",
        }[access]
        body = f"{WAYS[way].format(place)}\n{statement}\ncp.async.wait_all;"
        found = ptx.run(
            body, [both[:256], both[256:], np.zeros(1, np.uint64)], block=1, shared=16,
            declarations=ptx.dynamic_shared(),
        )  # fmt: skip
        kind = f"global {'write' if access == 'write' else 'read'} out of bounds"
        wanted = [(kind, ptx.line_of(body, statement))] if overrun else []
        assert [(f.kind, f.place) for f in found] == wanted


def test_a_barrier_that_no_lane_reaches_is_none() -> None:
    body = "setp.eq.u32 %p1, %thread, 99;\n@%p1 bar.sync 0;"
    assert ptx.run(body, block=64) == []
    assert ptx.engine().counters().barriers == 0


def test_memory_that_is_forgotten_is_out_of_bounds() -> None:
    array = np.zeros(32, np.uint32)
    body = "ld.global.b32 %r1, [%array0];"
    assert ptx.run(body, [array]) == []
    ptx.load(ptx.kernel(body, 1))
    ptx.engine().launch("kernel", (1,), (32,), [array.ctypes.data.to_bytes(8, "little")])
    found = ptx.engine().findings()
    ptx.engine().clear_findings()
    assert [f.kind for f in found] == ["global read out of bounds"]


def test_what_a_launch_wrote_the_next_one_may_read() -> None:
    """And write: launches of a stream follow each other."""
    array = np.zeros(64, np.uint32)
    write = "mad.wide.u32 %d0, %thread, 4, %array0;\nst.global.b32 [%d0], %thread;"
    read = "xor.b32 %r1, %thread, 32;\nmad.wide.u32 %d0, %r1, 4, %array0;\n"
    read += "ld.global.nc.b32 %r2, [%d0];"
    engine, address = ptx.engine(), array.ctypes.data
    with engine.calling([], [(address, array.nbytes)]):
        for body in (write, read, write):
            ptx.load(ptx.kernel(body, 1))
            engine.launch("kernel", (2,), (32,), [address.to_bytes(8, "little")])


# ---- findings -----------------------------------------------------------------------------------


def test_a_finding_says_who_where_and_how_often() -> None:
    array = ptx.aligned(np.zeros(256, np.uint32))
    body = "mad.wide.u32 %d0, %thread, 4, %array0;\nst.global.b32 [%d0], %thread;"
    (found,) = ptx.run(body, [array], grid=3, block=96)
    assert (found.kind, found.kernel, found.place) == (
        "global write out of bounds", "kernel", ptx.line_of(body, "st.global"),
    )  # fmt: skip
    assert (found.block, found.thread, found.count) == (2, 64, 32)
    assert found.address == array.ctypes.data + 1024
    text = ptx.kernel(body, 1).split("\n")
    assert text[found.ptx_line - 1] == "st.global.b32 [%d0], %thread;"


def test_a_race_names_the_other_thread() -> None:
    case = CASES["read_after_write_between_warps"]
    found = run(case.body.format(case.faulty), case)
    assert (found[0].thread, found[0].other_thread) == (32, 0)


@pytest.mark.parametrize("threads", [1, 32, 64, 96])
def test_a_loop_without_an_end_is_an_error(threads: int) -> None:
    """Also when other warps wait for the one that is caught in it, or are caught as well."""
    with pytest.raises(RuntimeError, match="block 0 does not come to an end"):
        ptx.run("AGAIN:\nadd.u32 %r1, %r1, 1;\nbra AGAIN;", block=threads)


def test_checks_can_be_left_out() -> None:
    engine, case = ptx.engine(), CASES["read_after_write_between_warps"]
    engine.set_checks(0)
    try:
        assert run(case.body.format(case.faulty), case) == []
        bounds = CASES["global_write_out_of_bounds"]  # what would harm the process stays
        assert len(run(bounds.body.format(bounds.faulty), bounds)) == 1
    finally:
        engine.set_checks(1)


# ---- counters -----------------------------------------------------------------------------------


def counted(body: str, **options: int) -> dict[str, int]:
    arrays: Sequence[np.ndarray] = [ptx.aligned(np.zeros(4096, np.uint32))]
    assert ptx.run(body, arrays, declarations=ptx.dynamic_shared(), **options) == []
    return ptx.engine().counters().as_dict()


@pytest.mark.parametrize(
    ("stride", "vector", "sectors"),
    [(4, 1, 4), (8, 1, 8), (32, 1, 32), (64, 1, 32), (0, 1, 1), (2, 1, 2), (16, 4, 16), (32, 4, 32),
     (8, 2, 8), (128, 4, 32)],
)  # fmt: skip
def test_sectors_of_32_bytes(stride: int, vector: int, sectors: int) -> None:
    registers = "{" + ", ".join(f"%r{n + 1}" for n in range(vector)) + "}"
    type_ = "b16" if stride == 2 else "b32"
    operand = "%h1" if stride == 2 else (registers if vector > 1 else "%r1")
    name = (f"v{vector}." if vector > 1 else "") + type_
    body = f"mad.wide.u32 %d0, %thread, {stride}, %array0;\n"
    assert counted(f"{body}ld.global.{name} {operand}, [%d0];")["load_sectors"] == sectors
    assert counted(f"{body}st.global.{name} [%d0], {operand};")["store_sectors"] == sectors


@pytest.mark.parametrize(
    ("stride", "vector", "passes", "least"),
    [
        (4, 1, 1, 1),  # each lane a bank
        (0, 1, 1, 1),  # one word for all
        (8, 1, 2, 1), (16, 1, 4, 1), (128, 1, 32, 1), (132, 1, 1, 1),
        (8, 2, 2, 2), (16, 2, 4, 2), (128, 2, 32, 2),
        (16, 4, 4, 4), (128, 4, 32, 4), (144, 4, 4, 4),
    ],
)  # fmt: skip
def test_bank_conflicts(stride: int, vector: int, passes: int, least: int) -> None:
    registers = "{" + ", ".join(f"%r{n + 2}" for n in range(vector)) + "}"
    operand, name = (registers, f"v{vector}.b32") if vector > 1 else ("%r2", "b32")
    body = f"mul.lo.u32 %r1, %thread, {stride};\n"
    if stride:
        counters = counted(f"{body}st.shared.{name} [%r1], {operand};", shared=8192)
        assert (counters["wavefronts"], counters["least_wavefronts"]) == (passes, least)
    fill = "shl.b32 %r20, %thread, 3;\n" + "".join(
        f"st.shared.v2.b32 [%r20+{256 * n}], {{%r0, %r0}};\n" for n in range(32)
    )
    counters = counted(
        f"{fill}bar.warp.sync -1;\n{body}ld.shared.{name} {operand}, [%r1];", shared=8192
    )
    assert (counters["wavefronts"] - 64, counters["least_wavefronts"] - 64) == (passes, least)


@pytest.mark.parametrize(("row_bytes", "passes"), [(16, 4), (128, 32), (144, 4)])
def test_bank_conflicts_of_ldmatrix(row_bytes: int, passes: int) -> None:
    body = f"mul.lo.u32 %r1, %thread, {row_bytes};\n"
    body += "st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};\nbar.warp.sync -1;\n"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];"
    counters = counted(body, shared=8192)
    assert (counters["wavefronts"], counters["least_wavefronts"]) == (2 * passes, 8)


def test_instructions_are_counted_by_line() -> None:
    body = """
        mov.u32 %r1, 5;
    LOOP:
        sub.u32 %r1, %r1, 1;
        setp.ne.u32 %p1, %r1, 0;
        @%p1 bra LOOP;
    """
    counters = counted(body, grid=3, block=64)
    lines = ptx.kernel(body, 1).split("\n")
    counts = ptx.engine().line_counts("kernel")
    by_text = {line.strip(): n for line, n in zip(lines, [*counts[1:]], strict=False) if n}
    warps = 3 * 2
    assert by_text["mov.u32 %r1, 5;"] == by_text["ret;"] == warps
    for text in ("sub.u32 %r1, %r1, 1;", "setp.ne.u32 %p1, %r1, 0;", "@%p1 bra LOOP;"):
        assert by_text[text] == 5 * warps
    assert counters["blocks"] == 3
    assert counters["warp_instructions"] == sum(counts) == warps * (5 + 1 + 15 + 1)
