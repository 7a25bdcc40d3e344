"""The gfx11 emulator's memories, control flow and faults."""

from __future__ import annotations

import numpy as np
import pytest
from gfx11_harness import run, step, words

from w4a16.codegen.gfx11.faults import Fault

OUT = "s_load_b64 s[4:5], s[0:1], 0x0\nv_lshlrev_b32_e32 v1, 2, v0\n"  # v0 work item, s2 workgroup


def test_work_items_and_workgroups_are_numbered() -> None:
    code = OUT + "v_lshl_add_u32 v2, s2, 8, v1\nv_lshl_or_b32 v3, s2, 16, v0\nglobal_store_b32 v2, v3, s[4:5]"
    out, done = run(code, waves=2, groups=3, out_words=192)
    np.testing.assert_array_equal(out, [group << 16 | item for group in range(3) for item in range(64)])
    assert done.executed == 6 * 6


@pytest.mark.parametrize("suffix", ["b32", "b64", "b96", "b128"])
def test_global_loads_give_what_was_stored(suffix: str) -> None:
    last = int(suffix[1:]) // 32 + 1
    code = f"v_lshlrev_b32_e32 v8, 4, v0\nglobal_store_{suffix} v8, v[2:{last}], s[4:5]\n"
    code += f"global_load_{suffix} v[12:{10 + last}], v8, s[4:5]\n" + f"global_store_b32 v8, v{10 + last}, s[4:5]"
    moves = "".join(f"v_add_nc_u32_e32 v{n}, {n}, v0\n" for n in range(2, 6))
    out, _ = run(OUT + moves + code, out_words=128)
    np.testing.assert_array_equal(out[::4], np.arange(32) + last)


def test_narrow_accesses_extend_and_keep_halves() -> None:
    code = """v_lshlrev_b32_e32 v1, 2, v0
        v_mov_b32_e32 v2, 0x8081
        v_mov_b32_e32 v3, 0x12345678
        v_mov_b32_e32 v4, 0x12345678
        ds_store_b32 v1, v2
        ds_load_i8 v5, v1
        ds_load_u8 v6, v1 offset:1
        ds_load_i16 v7, v1
        ds_load_u16_d16 v3, v1
        ds_load_u16_d16_hi v4, v1"""
    gang = step(code, v={0: np.arange(64).reshape(2, 32)})
    got = [int(gang.v[n, 1, 9]) for n in (5, 6, 7, 3, 4)]
    assert got == [0xFFFFFF81, 0x80, 0xFFFF8081, 0x12348081, 0x80815678]


def test_paired_lds_accesses_and_permutation() -> None:
    data = words()
    code = """ds_store_2addr_b32 v2, v3, v4 offset0:0 offset1:1
        ds_load_2addr_b32 v[5:6], v2 offset0:1 offset1:0
        ds_bpermute_b32 v7, v8, v3"""
    lane = np.arange(32)
    gang = step(code, v={2: lane * 8, 3: data[0], 4: data[1], 8: (31 - lane) * 4}, waves=1)
    np.testing.assert_array_equal(gang.v[5], data[1:])
    np.testing.assert_array_equal(gang.v[6], data[:1])
    np.testing.assert_array_equal(gang.v[7][0], data[0][::-1])


def test_buffers_bound_their_lanes() -> None:
    code = (
        OUT
        + """s_mov_b32 s6, 64
        s_mov_b32 s7, 0x31027000
        v_mov_b32_e32 v2, 9
        buffer_store_b32 v2, v1, s[4:7], 0 offen
        buffer_load_b32 v3, v1, s[4:7], 0 offen
        v_add_nc_u32_e32 v3, 1, v3
        global_store_b32 v1, v3, s[4:5]"""
    )
    out, _ = run(code, out_words=32)
    np.testing.assert_array_equal(out, [10] * 16 + [1] * 16)


def test_scratch_belongs_to_a_lane() -> None:
    gang = step(
        "scratch_store_b64 off, v[1:2], off offset:8\nscratch_load_b32 v3, off, off offset:12",
        v={1: words(), 2: (b := words())},
    )
    np.testing.assert_array_equal(gang.v[3], b)


def test_waves_that_part_meet_again() -> None:
    code = (
        OUT
        + """v_readfirstlane_b32 s6, v0
        v_mov_b32_e32 v2, 0
        s_lshr_b32 s6, s6, 5
    .Lloop:
        v_add_nc_u32_e32 v2, 10, v2
        s_sub_i32 s6, s6, 1
        s_cmp_ge_i32 s6, 0
        s_cbranch_scc1 .Lloop
        s_barrier
        global_store_b32 v1, v2, s[4:5]"""
    )
    out, _ = run(code.replace("    .Lloop", ".Lloop"), waves=4, groups=2, out_words=128)
    np.testing.assert_array_equal(out, np.repeat([10, 20, 30, 40], 32))


def test_atomics_add_up() -> None:
    code = OUT + "v_mov_b32_e32 v1, 0\nv_mov_b32_e32 v2, 3\nglobal_atomic_add_u32 v1, v2, s[4:5]"
    out, _ = run(code, waves=2, groups=2)
    assert out[0] == 3 * 128


STAGE = "v_lshlrev_b32_e32 v1, 2, v0\nds_store_b32 v1, v0\n{between}ds_load_b32 v2, v3\n"
OTHER = "v_xor_b32_e32 v3, 0x80, v1\n"
FAULTS = {
    "outside every argument": OUT + "global_load_b32 v2, v1, s[4:5] offset:4",
    "outside the 256 bytes of a workgroup": "v_mov_b32_e32 v1, 0xfe\nds_store_b32 v1, v0",
    "LDS is read before it was written": "v_mov_b32_e32 v1, 0\nds_load_b32 v2, v1",
    "scratch is read before": "scratch_load_b32 v1, off, off",
    "scratch address": "scratch_store_b64 off, v[1:2], off offset:60",
    "another wave wrote": STAGE.format(between=OTHER),
    "another wave uses": STAGE.format(between="v_mov_b32_e32 v3, v1\n")
    + "v_xor_b32_e32 v3, 0x80, v1\nds_store_b32 v3, v0",
    "two waves write different values": "v_mov_b32_e32 v1, 0\nds_store_b32 v1, v0",
    "not replicated": "v_mov_b32_e32 v8, v0\nv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[8:15], 0",
    "WMMA with inactive lanes": "s_mov_b32 exec_lo, 1\nv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[8:15], 0",
    "reads an inactive lane": "s_mov_b32 exec_lo, 1\nv_permlane16_b32 v1, v0, s4, s5",
    "others wait at a barrier": "v_readfirstlane_b32 s6, v0\ns_cmp_eq_u32 s6, 0\n"
    "s_cbranch_scc1 .Lend\ns_barrier\n.Lend:",
    "no end after": ".Lloop:\ns_branch .Lloop",
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(message: str) -> None:
    registers = "s_mov_b32 s4, 0x11111111\ns_mov_b32 s5, 0x11111111\n" if "inactive lane" in message else ""
    with pytest.raises(Fault, match=message):
        run(registers + FAULTS[message], waves=2, out_words=64)


def test_a_barrier_orders_lds() -> None:
    code = OUT + STAGE.format(between=OTHER + "s_barrier\n") + "global_store_b32 v1, v2, s[4:5]"
    out, _ = run(code, waves=2)
    np.testing.assert_array_equal(out, np.arange(64) ^ 32)


def test_equal_bytes_from_several_waves_are_no_race() -> None:
    run("v_mov_b32_e32 v1, 0\nv_mov_b32_e32 v2, 5\nds_store_b32 v1, v2", waves=2)
