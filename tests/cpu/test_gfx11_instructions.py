"""The gfx11 emulator's instruction table, class by class, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from gfx11_harness import floats, halves, step, words

from w4a16.codegen.gfx11.faults import UnknownInstruction

U32, F32, F16 = np.uint32, np.float32, np.float16
A, B, C = words(), words(), words()
X, Y, Z = floats(), floats(), floats()
P, Q, R = halves(), halves(), halves()


def as_float(word: np.ndarray) -> np.ndarray:
    return word.view(F32)


def low(word: np.ndarray) -> np.ndarray:
    return word.astype(np.uint16)


def high(word: np.ndarray) -> np.ndarray:
    return (word >> U32(16)).astype(np.uint16)


INTEGERS = {
    "v_add_nc_u32_e32 v0, v1, v2": A + B,
    "v_subrev_nc_u32_e32 v0, v1, v2": B - A,
    "v_and_or_b32 v0, v1, v2, v3": A & B | C,
    "v_lshl_add_u32 v0, v1, 3, v2": A * 8 + B,
    "v_add_lshl_u32 v0, v1, v2, 5": (A + B) * 32,
    "v_bfe_u32 v0, v1, 4, 7": A // 16 % 128,
    "v_bfe_i32 v0, v1, 0, 8": A.astype(np.int8).astype(np.int32).view(U32),
    "v_ashrrev_i32_e32 v0, 31, v1": np.where(A >> 31, U32(0xFFFFFFFF), U32(0)),
    "v_mul_lo_u32 v0, v1, v2": A * B,
    "v_mul_hi_u32 v0, v1, v2": (A.astype(object) * B.astype(object) >> 32).astype(U32),
    "v_mul_hi_i32 v0, v1, v2": ((A.view(np.int32).astype(object) * B.view(np.int32)) >> 32)
    .astype(np.int64)
    .astype(U32),
    "v_mad_u32_u24 v0, v1, v2, v3": (A % (1 << 24)) * (B % (1 << 24)) + C,
    "v_max_i32_e32 v0, v1, v2": np.maximum(A.view(np.int32), B.view(np.int32)).view(U32),
    "v_perm_b32 v0, v1, v2, 0x07060100": A & 0xFFFF0000 | B & 0xFFFF,
    "v_perm_b32 v0, v1, v2, 0x0c0d0504": A & 0xFFFF | 0x00FF0000,
    "v_alignbit_b32 v0, v1, v2, 8": A << U32(24) | B >> U32(8),
    "v_bfi_b32 v0, 0xf0f0f0f0, v1, v2": A & 0xF0F0F0F0 | B & 0x0F0F0F0F,
    "v_mbcnt_lo_u32_b32 v0, -1, 0": np.arange(32, dtype=U32) + 0 * A,
    "v_xor_b32_e32 v0, -1, v1": ~A,
    "v_or_b32_e32 v0, s4, v1": A | U32(0x1234),
}
FLOATS = {
    "v_add_f32_e32 v0, v1, v2": as_float(X) + as_float(Y),
    "v_sub_f32_e64 v0, |v1|, -v2": np.abs(as_float(X)) + as_float(Y),
    "v_mul_f32_e32 v0, 0.5, v1": as_float(X) / 2,
    "v_fma_f32 v0, v1, v2, v3": (as_float(X).astype(float) * as_float(Y) + as_float(Z)).astype(F32),
    "v_fmaak_f32 v0, v1, v2, 0x41000000": (as_float(X).astype(float) * as_float(Y) + 8).astype(F32),
    "v_med3_f32 v0, v1, v2, v3": np.median([as_float(X), as_float(Y), as_float(Z)], 0).astype(F32),
    "v_add_f32_e64 v0, v1, v2 clamp": np.clip(as_float(X) + as_float(Y), 0, 1),
    "v_cvt_f32_i32_e32 v0, s4": np.full((2, 32), 0x1234, F32),
    "v_cvt_f32_ubyte2_e32 v0, v1": X.view(np.uint8).reshape(2, 32, 4)[..., 2].astype(F32),
    "v_rcp_f32_e32 v0, v1": 1 / as_float(X),
    "v_rndne_f32_e32 v0, v1": np.rint(as_float(X)),
}
F32_INTEGERS = {"v_cvt_i32_f32_e32 v0, v1": np.trunc(as_float(X)).astype(np.int32).view(U32)}


@pytest.mark.parametrize("code", INTEGERS)
def test_integers(code: str) -> None:
    gang = step(code, v={1: A, 2: B, 3: C}, s={4: 0x1234})
    np.testing.assert_array_equal(gang.v[0], INTEGERS[code])


@pytest.mark.parametrize("code", [*FLOATS, *F32_INTEGERS])
def test_floats(code: str) -> None:
    gang = step(code, v={1: X, 2: Y, 3: Z}, s={4: 0x1234})
    wanted = FLOATS[code].astype(F32).view(U32) if code in FLOATS else F32_INTEGERS[code]
    np.testing.assert_array_equal(gang.v[0], wanted)


def test_maximum_and_minimum_order_the_zeros_and_drop_nan() -> None:
    plus, minus, nan = 0x00000000, 0x80000000, 0x7FC00000
    for a, b in ((plus, minus), (minus, plus)):
        assert (step("v_max_f32_e32 v0, v1, v2", v={1: a, 2: b}).v[0] == plus).all()
        assert (step("v_min_f32_e32 v0, v1, v2", v={1: a, 2: b}).v[0] == minus).all()
        assert (step("v_pk_max_f16 v0, v1, v2", v={1: a >> 16, 2: b >> 16}).v[0] == 0).all()
    assert (step("v_max_f32_e32 v0, v1, v2", v={1: nan, 2: 0x3F800000}).v[0] == 0x3F800000).all()


HALVES = {
    "v_add_f16_e32 v0.l, v1.l, v2.h": low(P).view(F16) + high(Q).view(F16),
    "v_mul_f16_e64 v0, v1, v2 op_sel:[1,0,0]": high(P).view(F16) * low(Q).view(F16),
    "v_fma_f16 v0.l, v1.l, v2.l, v3.l": (low(P).view(F16).astype(float) * low(Q).view(F16) + low(R).view(F16)).astype(
        F16
    ),
    "v_lshrrev_b16 v0.l, 4, v1.l": low(P) >> np.uint16(4),
    "v_sub_nc_u16 v0.l, v1.l, v2.l": low(P) - low(Q),
    "v_cvt_f16_i16_e32 v0.l, v1.l": low(P).view(np.int16).astype(F16),
    "v_cvt_f16_f32_e32 v0.l, v4": as_float(X).astype(F16),
}


@pytest.mark.parametrize("code", HALVES)
def test_halves_keep_the_other_half(code: str) -> None:
    gang = step(code, v={0: 0xABCD0000, 1: P, 2: Q, 3: R, 4: X})
    np.testing.assert_array_equal(low(gang.v[0]), HALVES[code].view(np.uint16))
    assert (high(gang.v[0]) == 0xABCD).all()


def test_a_result_goes_to_the_high_half() -> None:
    for code in ("v_mov_b16_e32 v0.h, v1.l", "v_mov_b16_e64 v0, v1 op_sel:[0,1]"):
        gang = step(code, v={0: 0xABCD, 1: P})
        np.testing.assert_array_equal(gang.v[0], P << U32(16) | U32(0xABCD))


def pair(low_half: np.ndarray, high_half: np.ndarray) -> np.ndarray:
    return low_half.view(np.uint16).astype(U32) | high_half.view(np.uint16).astype(U32) << U32(16)


PACKED = {
    "v_pk_add_f16 v0, v1, v2": (P.view(F16) + Q.view(F16)).view(U32),
    "v_pk_mul_f16 v0, v1, v2 op_sel_hi:[1,0]": pair(
        low(P).view(F16) * low(Q).view(F16), high(P).view(F16) * low(Q).view(F16)
    ),
    "v_pk_add_f16 v0, v1, v2 neg_lo:[0,1] neg_hi:[0,1]": (P.view(F16) - Q.view(F16)).view(U32),
    "v_pk_add_f16 v0, v1, 1.0 op_sel_hi:[1,0]": (P.view(F16) + F16(1)).view(U32),
    "v_pk_sub_i16 v0, v1, v2": (P.view(np.uint16) - Q.view(np.uint16)).view(U32),
    "v_pk_lshlrev_b16 v0, 4, v1 op_sel_hi:[0,1]": (P.view(np.uint16) << np.uint16(4)).view(U32),
    "v_pk_ashrrev_i16 v0, 4, v1 op_sel_hi:[0,1]": (P.view(np.int16) >> np.int16(4)).view(U32),
    # a float constant is fp32 bits in an integer operation: 0x3f80 lies in the high half
    "v_pk_add_u16 v0, v1, 1.0": pair(low(P), high(P) + np.uint16(0x3F80)),
    "v_pack_b32_f16 v0, v1.l, v2.h": pair(low(P), high(Q)),
}


@pytest.mark.parametrize("code", PACKED)
def test_packed(code: str) -> None:
    np.testing.assert_array_equal(step(code, v={1: P, 2: Q}).v[0], PACKED[code])


def test_mixed_fma_reads_both_widths() -> None:
    gang = step("v_fma_mix_f32 v0, v1, v2, v3 op_sel:[1,0,0] op_sel_hi:[1,1,0]", v={1: P, 2: Q, 3: Z})
    wanted = high(P).view(F16).astype(float) * low(Q).view(F16) + as_float(Z)
    np.testing.assert_array_equal(gang.v[0], wanted.astype(F32).view(U32))


def bf16(word: np.ndarray) -> np.ndarray:
    return (word.astype(U32) << U32(16)).view(F32).astype(float)


def test_bf16_dot_rounds_to_nearest_even() -> None:
    a, b, c = ((floats() & 0xFFFF0000) | (floats() >> 16) for _ in range(3))
    gang = step("v_dot2_bf16_bf16 v0.l, v1, v2, v3.h", v={0: 0, 1: a, 2: b, 3: c})
    exact = bf16(low(a)) * bf16(low(b)) + bf16(high(a)) * bf16(high(b)) + bf16(high(c))
    rounded = (exact.astype(F32).view(U32) + 0x7FFF + (exact.astype(F32).view(U32) >> 16 & 1)) >> 16
    np.testing.assert_array_equal(low(gang.v[0]), rounded)
    tie = step("v_dot2_bf16_bf16 v0.l, v1, 1.0, 0", v={0: 0, 1: 0x3F810000}).v[0]
    assert (tie == 0x3F81).all()


def test_dual_issue_reads_before_it_writes() -> None:
    gang = step("v_dual_mov_b32 v0, v1 :: v_dual_mov_b32 v1, v0", v={0: A, 1: B})
    np.testing.assert_array_equal(gang.v[0], B)
    np.testing.assert_array_equal(gang.v[1], A)
    gang = step("v_dual_add_f32 v0, v1, v2 :: v_dual_fmac_f32 v3, v0, v2", v={0: Z, 1: X, 2: Y, 3: Z})
    np.testing.assert_array_equal(gang.v[0].view(F32), as_float(X) + as_float(Y))
    np.testing.assert_array_equal(
        gang.v[3].view(F32), (as_float(Z).astype(float) * as_float(Y) + as_float(Z)).astype(F32)
    )


def test_inactive_lanes_keep_their_registers() -> None:
    gang = step("v_mov_b32_e32 v0, 7", v={0: A}, active=0xFFFF)
    assert (gang.v[0, :, :16] == 7).all()
    np.testing.assert_array_equal(gang.v[0, :, 16:], A[:, 16:])


def test_comparisons_select_and_mask() -> None:
    gang = step(
        "v_cmp_lt_i32_e32 vcc_lo, v1, v2\nv_cndmask_b32_e32 v0, v1, v2, vcc_lo\nv_cmp_u_f32_e64 s5, v3, v3",
        v={1: A, 2: B, 3: 0x7FC00000},
        active=0xFF,
    )
    np.testing.assert_array_equal(gang.v[0, :, :8], np.maximum(A.view(np.int32), B.view(np.int32)).view(U32)[:, :8])
    assert (gang.s[5] == 0xFF).all(), "inactive lanes compare to 0"
    only = step("v_cmpx_gt_u32_e32 v1, v2\nv_mov_b32_e32 v0, 1", v={0: 0, 1: A, 2: B})
    np.testing.assert_array_equal(only.v[0], (A > B).astype(U32))


def test_64_bit_arithmetic_carries() -> None:
    gang = step(
        "v_add_co_u32 v4, vcc_lo, v0, v2\nv_add_co_ci_u32_e32 v5, vcc_lo, v1, v3, vcc_lo\n"
        "v_mad_u64_u32 v[6:7], null, v0, v2, v[2:3]\nv_lshlrev_b64 v[8:9], 7, v[0:1]",
        v={0: A, 1: B, 2: C, 3: A},
    )
    wide = A.astype(np.uint64) | B.astype(np.uint64) << np.uint64(32)
    other = C.astype(np.uint64) | A.astype(np.uint64) << np.uint64(32)
    for index, wanted in ((4, wide + other), (6, A.astype(np.uint64) * C + other), (8, wide << np.uint64(7))):
        np.testing.assert_array_equal(gang.v[index], wanted.astype(U32))
        np.testing.assert_array_equal(gang.v[index + 1], (wanted >> np.uint64(32)).astype(U32))


SCALARS = {
    "s_add_u32 s2, s4, s5\ns_addc_u32 s3, 0, 0": {2: 0, 3: 1},
    "s_sub_i32 s2, 3, 5\ns_cselect_b32 s3, 1, 2": {2: 0xFFFFFFFE, 3: 2},
    "s_mul_i32 s2, s4, 3\ns_mul_hi_u32 s3, s4, 3": {2: 0xFFFFFFFD, 3: 2},
    "s_ashr_i32 s2, s6, 4\ns_bfe_u32 s3, s6, 0x80004": {2: 0xF9234567, 3: 0x67},
    "s_and_not1_b32 s2, s4, s6\ns_bfe_i32 s3, s6, 0x80008": {2: 0x6DCBA987, 3: 0x56},
    "s_movk_i32 s2, 0xff80\ns_cmpk_lg_u32 s2, 5\ns_cselect_b32 s3, 8, 9": {3: 8},
    "s_lshl_b64 s[2:3], s[4:5], 4": {2: 0xFFFFFFF0, 3: 0x1F},
    "s_cmp_gt_i32 s4, 0\ns_cselect_b32 s2, 1, 2\ns_cmp_gt_u32 s4, 0\ns_cselect_b32 s3, 1, 2": {2: 2, 3: 1},
    "s_lshl2_add_u32 s2, 5, 1\ns_bitcmp1_b32 s6, 31\ns_cselect_b32 s3, 1, 0": {2: 21, 3: 1},
    "s_cvt_f32_u32 s2, 6\ns_mul_f32 s2, s2, 0.5\ns_cvt_u32_f32 s3, s2": {2: 0x40400000, 3: 3},
}


@pytest.mark.parametrize("code", SCALARS)
def test_scalars(code: str) -> None:
    gang = step(code, s={4: 0xFFFFFFFF, 5: 1, 6: 0x92345678})
    assert {index: int(gang.s[index, 0, 0]) for index in SCALARS[code]} == SCALARS[code]


def test_exec_is_saved_and_restored() -> None:
    gang = step("s_and_saveexec_b32 s2, s4\nv_mov_b32_e32 v0, 1\ns_or_b32 exec_lo, exec_lo, s2", v={0: 0}, s={4: 3})
    np.testing.assert_array_equal(gang.v[0, 0], [1, 1] + [0] * 30)
    assert gang.full


def test_exec_is_written_and_given() -> None:
    gang = step("s_and_not1_wrexec_b32 s2, s4", s={4: 0x0F}, active=0xFC)
    assert int(gang.s[2, 0, 0]) == 0x03
    np.testing.assert_array_equal(gang.active[0], [True, True] + [False] * 30)


def test_lanes_are_read_written_and_permuted() -> None:
    lane = np.arange(32)
    gang = step(
        "v_readlane_b32 s2, v1, 5\nv_writelane_b32 v2, s2, 7\nv_readfirstlane_b32 s3, v1\n"
        "v_permlanex16_b32 v3, v1, s4, s5\nv_mov_b32_dpp v4, v1 row_shr:3 row_mask:0xf bank_mask:0xf bound_ctrl:1\n"
        "v_mov_b32_dpp v5, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf",
        v={1: A, 2: 0},
        s={4: 0x76543210, 5: 0xFEDCBA98},
    )
    np.testing.assert_array_equal(gang.v[2, :, 7], A[:, 5])
    np.testing.assert_array_equal(gang.s[3, :, 0], A[:, 0])
    np.testing.assert_array_equal(gang.v[3], A[:, lane ^ 16])
    np.testing.assert_array_equal(gang.v[4], np.where(lane % 16 >= 3, A[:, lane - 3], 0))
    np.testing.assert_array_equal(gang.v[5], A[:, lane ^ 1])


def test_division_is_exact() -> None:
    code = """v_div_scale_f32 v3, null, v2, v2, v1
        v_div_scale_f32 v4, vcc_lo, v1, v2, v1
        v_rcp_f32_e32 v5, v3
        v_fma_f32 v6, -v3, v5, 1.0
        v_fmac_f32_e32 v5, v6, v5
        v_mul_f32_e32 v6, v4, v5
        v_fma_f32 v7, -v3, v6, v4
        v_fmac_f32_e32 v6, v7, v5
        v_fma_f32 v3, -v3, v6, v4
        v_div_fmas_f32 v3, v3, v5, v6
        v_div_fixup_f32 v0, v3, v2, v1"""
    np.testing.assert_array_equal(step(code, v={1: X, 2: Y}).v[0].view(F32), as_float(X) / as_float(Y))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_wmma_is_a_matrix_product(kind: str) -> None:
    a, b = (np.random.default_rng(n).standard_normal((2, 16, 16)).astype(F32) for n in range(2))
    encode = (lambda x: x.astype(F16).view(np.uint16)) if kind == "f16" else (lambda x: high(x.view(U32)))
    decode = (lambda h: h.view(F16).astype(float)) if kind == "f16" else bf16
    registers = {}
    for base, matrix in ((8, a), (16, b)):
        held = encode(matrix).view(U32)  # [wave, lane, 8]
        registers |= {base + n: np.concatenate((held[..., n], held[..., n]), 1) for n in range(8)}
    addend = {24 + n: X for n in range(8)}
    gang = step(f"v_wmma_f32_16x16x16_{kind} v[0:7], v[8:15], v[16:23], v[24:31]", v=registers | addend)
    product = decode(encode(a)) @ decode(encode(b)).transpose(0, 2, 1)
    for register in range(8):
        rows = np.concatenate((product[:, 2 * register], product[:, 2 * register + 1]), 1)
        np.testing.assert_array_equal(gang.v[register].view(F32), (rows + as_float(X)).astype(F32))


@pytest.mark.parametrize(
    "code",
    [
        "v_frobnicate_b32 v0, v1",
        "v_add_nc_u32_e64 v0, v1, v2 clamp",
        "v_mov_b32_e32 v0, ttmp1",
        "v_add_f32 v0, v1, v2 mul:2",
    ],
)
def test_what_is_unknown_is_refused(code: str) -> None:
    with pytest.raises(UnknownInstruction, match="unknown"):
        step(code)
