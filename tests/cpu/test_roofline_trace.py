"""Traces to calls: kernels to their ranges and operators, on CUDA, ROCm and the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from traces import Recording

from w4a16.roofline.attention import Attention, attention_of
from w4a16.roofline.calls import Call
from w4a16.roofline.labels import Scope
from w4a16.roofline.names import ATTENTION, COPY, GEMM, OTHER, W4A16, kind_of, short
from w4a16.roofline.shapes import Gemm, product_of
from w4a16.roofline.step import Step, step_of
from w4a16.roofline.trace import read

DATA = Path(__file__).parent.parent / "data" / "traces"
QKV, DOWN = "sm90_decode 1x6144x4096 g=128 asym", "sm90_decode 1x4096x12288 g=128 asym"
BLAS = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(at::TensorIteratorBase&)>(int)"


def step_from(recording: Recording, folder: Path) -> Step:
    return step_of(read(recording.save(folder / "t.json")))


def described(call: Call) -> tuple[str, str, str | None, int, float]:
    shape = call.what.shape if call.what is not None else None
    return call.kind, call.op, shape, len(call.kernels), round(call.us, 3)


def test_kernels_go_to_the_range_that_launched_them(tmp_path):
    """They run long after it has closed."""
    r = Recording(lag=500.0)
    r.scope(QKV, ("_sm90_decode", 9.0), ("_sm90_decode_reduce", 2.0))
    r.kernel(ELEMENTWISE, 3.0)
    r.scope(DOWN, ("_sm90_decode", 20.0))
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (W4A16, "sm90_decode", "1x6144x4096 g=128 asym", 2, 11.0),
        (OTHER, "other", None, 1, 3.0),
        (W4A16, "sm90_decode", "1x4096x12288 g=128 asym", 1, 20.0),
    ]


def test_a_memset_inside_a_range_is_part_of_the_call(tmp_path):
    r = Recording()
    r.scope(QKV, ("_sm90_decode", 9.0))
    memset = dict(r.events[1], cat="gpu_memset", name="Memset (Device)", ts=2000.0, dur=1.0)
    r.events.append(memset)
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (W4A16, "sm90_decode", "1x6144x4096 g=128 asym", 2, 10.0)
    ]


def test_another_thread_at_the_same_time_is_not_inside(tmp_path):
    r = Recording()
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.correlation += 1
    r.host("cuda_runtime", "cudaLaunchKernel", 1005.0, 1.0, thread=2, correlation=r.correlation)
    r.correlation -= 1
    r.kernel(ELEMENTWISE, 4.0, launch=False)
    assert [c.kind for c in step_from(r, tmp_path).calls] == [W4A16, OTHER]


def test_products_of_the_blas_take_their_sizes_from_the_operator(tmp_path):
    r = Recording()
    r.operator("aten::mm", [[16, 4096], [4096, 6144]], (BLAS, 30.0), ("cublasLt::splitKreduce_kernel<32>", 2.0))
    r.operator("aten::addmm", [[64], [16, 32], [32, 64], [], []], (BLAS, 3.0))
    r.operator("aten::bmm", [[8, 1, 128], [8, 128, 77]], ("gemv2T_kernel_val", 5.0))
    r.within("cpu_op", "aten::mm", (BLAS, 7.0))  # record_shapes was off
    r.kernel(BLAS, 8.0)
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (GEMM, "gemm", "16x6144x4096", 2, 32.0),
        (GEMM, "gemm", "16x64x32", 1, 3.0),
        (GEMM, "gemm", "8*1x77x128", 1, 5.0),
        (GEMM, "gemm", None, 1, 7.0),
        (GEMM, "gemm", None, 1, 8.0),
    ]


def test_a_range_around_the_blas_is_one_call(tmp_path):
    """`dense` dequantises, then calls aten::mm inside its own range."""
    r = Recording()
    start = r.now
    r.kernel("_dequantize", 10.0)
    r.operator("aten::mm", [[512, 4096], [4096, 4096]], (BLAS, 50.0))
    r.host("user_annotation", "dense 512x4096x4096 g=128 sym", start - 1, r.now - start + 1)
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (W4A16, "dense", "512x4096x4096 g=128 sym", 2, 60.0)
    ]


def test_ranges_inside_a_range_keep_the_flops(tmp_path):
    r = Recording()
    start = r.now
    r.kernel("_align", 4.0)
    r.scope("moe_gemm_w4a16 8x1024x2048 E=16 top_k=2 g=128 sym experts=9", ("moe_gemm_w4a16_kernel", 20.0))
    r.scope("moe_gemm_w4a16 16x2048x512 E=16 top_k=1 g=128 sym experts=9", ("moe_gemm_w4a16_kernel", 10.0))
    r.host("user_annotation", "triton_moe 8x1024x2048 E=16 top_k=2 g=128 sym", start - 1, r.now - start + 2)
    calls = step_from(r, tmp_path).calls
    assert Counter((c.op, c.part, c.us) for c in calls) == Counter(
        [("triton_moe", True, 4.0), ("moe_gemm_w4a16", False, 20.0), ("moe_gemm_w4a16", False, 10.0)]
    )


def test_attention_by_operator_and_by_name(tmp_path):
    r = Recording()
    r.within("cpu_op", "aten::_scaled_dot_product_flash_attention", (ELEMENTWISE, 1.0), ("pytorch_flash::fwd", 9.0))
    r.kernel("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>(flash::Flash_fwd_params)", 8.0)
    r.kernel("reshape_and_cache_flash_kernel", 2.0)
    assert [(c.kind, len(c.kernels)) for c in step_from(r, tmp_path).calls] == [
        (ATTENTION, 2),
        (ATTENTION, 1),
        (OTHER, 1),
    ]


def test_correlation_ids_that_repeat(tmp_path):
    """Two processes in one file count alike; an id that wrapped around belongs to its last launch."""
    r = Recording(lag=50.0)
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.now += 1000
    r.correlation = 0
    r.scope(DOWN, ("_sm90_decode", 19.0))
    assert [(c.what.problem.n, c.us) for c in step_from(r, tmp_path).calls] == [(6144, 9.0), (4096, 19.0)]

    r = Recording(lag=2000.0)  # both launched before either ran: the operator's id tells them apart
    for label, us in ((QKV, 9.0), (DOWN, 19.0)):
        r.correlation = 0
        r.scope(label, ("_sm90_decode", us))
        for event in r.events[-3:-1]:
            event["args"]["External id"] = us
    assert [(c.what.problem.n, c.us) for c in step_from(r, tmp_path).calls] == [(6144, 9.0), (4096, 19.0)]


def test_kernels_that_the_file_holds_twice_count_once(tmp_path):
    r = Recording()
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.events.append(dict(r.events[1]))
    trace = read(r.save(tmp_path / "t.json"))
    assert trace.repeated == 1
    assert step_of(trace).usage.busy == 9.0


def test_a_trace_of_the_device_alone_uses_the_ranges_copied_to_the_stream(tmp_path):
    r = Recording()
    r.scope(QKV, ("_sm90_decode", 9.0), ("_sm90_decode_reduce", 2.0))
    r.kernel(ELEMENTWISE, 1.0)
    kernels = [e for e in r.events if e["cat"] == "kernel"]
    annotation = dict(kernels[0], cat="gpu_user_annotation", name=QKV, dur=kernels[1]["ts"] + 2.0 - kernels[0]["ts"])
    r.events = [*kernels, annotation]
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (W4A16, "sm90_decode", "1x6144x4096 g=128 asym", 2, 11.0),
        (OTHER, "other", None, 1, 1.0),
    ]


def replay(r: Recording, *kernels: tuple[str, float, list[int]]) -> None:
    """One graph launch: every kernel carries its correlation id."""
    r.correlation += 1
    r.host("cuda_runtime", "cudaGraphLaunch", r.now, 2.0, correlation=r.correlation)
    for name, us, grid in kernels:
        r.correlation -= 1
        r.kernel(name, us, launch=False, args={"grid": grid, "graph id": 3})


def test_graph_replays_take_the_problem_of_the_same_kernel_and_grid(tmp_path):
    r = Recording()
    r.scope(QKV.replace("sm90_decode", "triton_prefill"), ("_triton_prefill", 9.0), ("_reduce", 1.0))
    r.operator("aten::mm", [[1, 4096], [4096, 100]], (BLAS, 5.0))
    same, other = [132, 1, 1], [64, 1, 1]
    for _ in range(2):
        replay(r, ("_triton_prefill", 8.0, same), ("_reduce", 1.0, same), ("_triton_prefill", 4.0, other))
    step = step_from(r, tmp_path)
    replayed = [described(c) for c in step.calls if c.inferred]
    assert replayed == [(W4A16, "triton_prefill", "1x6144x4096 g=128 asym", 2, 9.0)] * 2
    unknown = [described(c) for c in step.calls if c.kind == W4A16 and c.what is None]
    assert unknown == [(W4A16, "triton_prefill", None, 1, 4.0)] * 2


def test_a_replay_is_not_guessed_from_two_problems(tmp_path):
    r = Recording()
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.scope(DOWN, ("_sm90_decode", 19.0))
    replay(r, ("_sm90_decode", 8.0, [132, 1, 1]))
    assert not any(c.inferred for c in step_from(r, tmp_path).calls)


def test_a_replay_takes_the_calls_of_the_stretch_that_ran_eagerly(tmp_path):
    """Persistent kernels have one grid whatever the problem: what came before and after tells them apart."""
    r = Recording()
    r.host("user_annotation", "warm-up", r.now - 1, 500.0)
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.kernel(ELEMENTWISE, 1.0)
    r.scope(DOWN, ("_sm90_decode", 19.0), ("_add_parts", 2.0))
    r.now += 500.0
    grid = [132, 1, 1]
    for _ in range(2):
        names = ("_sm90_decode", 8.0), (ELEMENTWISE, 1.0), ("_sm90_decode", 18.0), ("_add_parts", 1.0)
        replay(r, *((name, us, grid) for name, us in names))
        r.now += 10.0
    calls = step_from(r, tmp_path).calls
    assert [described(c) for c in calls] == 2 * [
        (W4A16, "sm90_decode", "1x6144x4096 g=128 asym", 1, 8.0),
        (OTHER, "other", None, 1, 1.0),
        (W4A16, "sm90_decode", "1x4096x12288 g=128 asym", 2, 19.0),
    ]
    assert all(c.inferred for c in calls)
    assert {c.phase for c in calls} == {"decode"}


def test_a_replay_of_two_stretches_that_look_alike_is_not_guessed(tmp_path):
    r = Recording()
    for label in (QKV, DOWN):
        r.scope(label, ("_sm90_decode", 9.0))
        r.kernel(ELEMENTWISE, 1.0)
    replay(r, ("_sm90_decode", 8.0, [132, 1, 1]), (ELEMENTWISE, 1.0, [132, 1, 1]))
    assert [c.what for c in step_from(r, tmp_path).calls[-2:]] == [None, None]


def test_attention_tells_its_sizes(tmp_path):
    r = Recording()
    sizes = [[2, 32, 1, 128], [2, 8, 77, 128], [2, 8, 77, 128], [], [], [], [], []]
    said = ["", "", "", "", "0.", "False", "", "True"]
    r.operator("aten::scaled_dot_product_attention", sizes, ("flash_fwd_splitkv_kernel", 9.0), concrete=said)
    sizes = [[1, 4, 10, 64]] * 3 + [[]] * 5
    said = [*said[:5], "True", "", "False"]
    types = ["float"] * 8
    r.operator("aten::scaled_dot_product_attention", sizes, ("fmha", 9.0), types=types, concrete=said)
    one, prompt = (c.what for c in step_from(r, tmp_path).calls)
    assert one == Attention(batch=2, heads=32, kv_heads=8, m=1, keys=77, head=128, causal=False, act="bf16")
    assert one.cost().flops == 2 * 2 * 2 * 32 * 77 * 128
    assert one.cost().bytes == 2 * 2 * 128 * (2 * 32 + 2 * 8 * 77)
    assert (prompt.shape, prompt.act) == ("1x4x10x64 over 4x10 causal", "fp32")
    assert prompt.cost().flops == 4 * 4 * 64 * 55
    assert attention_of("aten::scaled_dot_product_attention", {"Input Dims": [[1], [], []], "Input type": []}) is None


def test_other_peoples_operators_tell_their_problem(tmp_path):
    marlin = "void marlin::Marlin<__nv_bfloat16, 256, 4, 16, 4, false>(int4 const*, int4 const*)"
    r = Recording()
    r.operator(
        "_C::gptq_marlin_gemm",
        [[16, 4096], [], [256, 12288], [], [32, 6144], [32, 768], [], [], [98304]],
        (marlin, 20.0),
        types=["c10::BFloat16", "", "int", "", "c10::BFloat16", "int", "", "", "int"],
    )
    r.operator(
        "_rocm_C::wvSplitK_int4_g",
        [[6144, 2048], [1, 4096], [6144, 32], [], []],
        ("void wvSplitK_int4_hf_sml_<__hip_bfloat16, 32, 4>(int)", 11.0),
        types=["signed char", "c10::Half", "c10::Half", "Scalar", "Scalar"],
    )
    r.kernel("gemv_INT_revsplitK_kernel", 6.0)
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (W4A16, "marlin", "16x6144x4096 g=128 asym", 1, 20.0),
        (W4A16, "wvSplitK_int4", "1x6144x4096 g=128 sym fp16", 1, 11.0),
        (W4A16, "gemlite", None, 1, 6.0),
    ]


def test_our_operator_without_its_range_tells_its_problem(tmp_path):
    """A trace recorded without W4A16_PROFILE: the sizes come from the operator, the stem from the kernel."""
    r = Recording()
    r.operator(
        "w4a16::linear",
        [[1, 1, 4096], [6144, 512], [6144, 32], [768, 32], [], [], [], [], [], []],
        ("_triton_decode", 9.0),
        types=["c10::BFloat16", "int", "c10::BFloat16", "int", "", "", "", "Scalar", "Scalar", "Scalar"],
        concrete=["", "", "", "", "", "", "skinny", "6144", "4096", "128"],
    )
    assert [described(c) for c in step_from(r, tmp_path).calls] == [
        (W4A16, "triton_decode", "1x6144x4096 g=128 asym", 1, 9.0)
    ]


@pytest.mark.parametrize(
    ("name", "kind", "op"),
    [
        ("_triton_prefill", W4A16, "triton_prefill"),
        ("_triton_w4a16_skinny_fmt_kernel", W4A16, "triton_w4a16_skinny_fmt"),
        ("void marlin_moe_wna16::Marlin<__half, 256>(int4 const*)", W4A16, "marlin_moe"),
        ("void marlin::gptq_marlin_repack_kernel<256, 4, true>(unsigned int const*)", OTHER, "repack"),
        ("void cutlass::device_kernel<machete::MacheteKernel<cutlass::bfloat16_t>>(Params)", W4A16, "machete"),
        ("gemm_splitK_INT_kernel", W4A16, "gemlite"),
        ("void fused_moe_wvSplitK_int4_kernel<__half, 32>(int)", W4A16, "fused_moe_wvsplitk_int4"),
        ("void vllm::moe_wna16_gemm_kernel<__half, 4>(int)", W4A16, "moe_wna16"),
        ("fused_moe_kernel_gptq_awq", W4A16, "moe_wna16"),
        ("fused_moe_kernel", GEMM, "gemm"),
        ("moe_gemm_w4a16_kernel", W4A16, "moe_gemm_w4a16"),
        ("void at::native::tinygemm_m16n8k16_chunk_kernel<1>(void const*)", W4A16, "tinygemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", GEMM, "gemm"),
        ("Cijk_Alik_Bljk_BBS_BH_Bias_MT64x32x64", GEMM, "gemm"),
        ("void wvSplitK_hf_sml_<__half, 32, 4>(int)", GEMM, "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", ATTENTION, "attention"),
        ("kernel_unified_attention_2d", ATTENTION, "attention"),
        ("Memcpy HtoD (Pageable -> Device)", COPY, "copy"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8>(float*)", OTHER, "other"),
        ("triton_red_fused_rms_norm_0", OTHER, "other"),
        ("triton_poi_fused__scaled_dot_product_attention_cat_mm_w4a16_linear_3", OTHER, "other"),
    ],
)
def test_kernels_by_name(name, kind, op):
    assert (kind_of(name).kind, kind_of(name).op) == (kind, op)


def test_short_names():
    assert short(ELEMENTWISE) == "at::native::vectorized_elementwise_kernel"
    assert short("void at::native::(anonymous namespace)::f<8, float>(int)") == "at::native::(anonymous namespace)::f"
    assert short("_sm90_decode") == "_sm90_decode"


def test_sizes_that_do_not_add_up_are_unknown():
    bf16 = ["c10::BFloat16"] * 2
    assert product_of("aten::mm", {"Input Dims": [[2, 3], [4, 5]], "Input type": bf16}) is None
    assert product_of("aten::mm", {}) is None
    assert product_of("aten::mm", {"Input Dims": [[2, 3]], "Input type": bf16}) is None
    assert product_of("aten::add", {"Input Dims": [[2, 3], [3, 5]], "Input type": bf16}) is None
    types = ["c10::BFloat16", "int", "c10::BFloat16"]
    assert product_of("awq_gemm", {"Input Dims": [[2, 96], [7, 11], [3, 5]], "Input type": types}) is None
    assert product_of("aten::mv", {"Input Dims": [[8, 4], [4]], "Input type": ["float", "float"]}) == Gemm(
        m=8, n=1, k=4, batch=1, element_bytes=4, act="fp32"
    )


def test_idle_and_overlap(tmp_path):
    r = Recording()
    r.scope(QKV, ("_sm90_decode", 10.0))
    r.kernel(ELEMENTWISE, 5.0, gap=20.0)
    r.events.append(dict(r.events[-1], tid=8, ts=r.events[-1]["ts"] + 1.0, name="other_stream"))
    usage = step_from(r, tmp_path).usage
    assert (usage.busy, usage.overlap) == (16.0, 4.0)
    assert usage.window == pytest.approx(usage.busy + usage.idle)
    assert usage.idle == pytest.approx(20.0)


def test_phases_follow_the_rows_of_the_w4a16_calls(tmp_path):
    """The last product of a prompt has one row, and is part of the prefill."""
    r = Recording()
    r.kernel(ELEMENTWISE, 1.0)
    r.scope("sm90_prefill 2048x6144x4096 g=128 sym", ("_sm90_prefill", 100.0))
    r.operator("aten::mm", [[1, 4096], [4096, 1000]], (BLAS, 5.0))
    r.kernel("embedding", 2.0, gap=7.0)
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.operator("aten::mm", [[1, 4096], [4096, 1000]], (BLAS, 5.0))
    step = step_from(r, tmp_path)
    prefill, decode = step.of_phase("prefill"), step.of_phase("decode")
    assert [len(s.calls) for s in (step, prefill, decode)] == [6, 4, 2]
    assert prefill.usage.window + decode.usage.window == pytest.approx(step.usage.window)
    assert (prefill.usage.busy, decode.usage.busy) == (108.0, 14.0)


def test_a_range_named_after_a_phase_decides(tmp_path):
    r = Recording()
    start = r.now
    r.scope("sm90_decode 4x6144x4096 g=128 sym", ("_sm90_decode", 9.0))  # a prompt of four tokens
    r.host("user_annotation", "prefill", start - 1, r.now - start + 1)
    r.scope(QKV, ("_sm90_decode", 9.0))
    assert [c.phase for c in step_from(r, tmp_path).calls] == ["prefill", "decode"]


def test_layers_by_our_ranges_and_by_the_profilers_modules(tmp_path):
    r = Recording()
    start = r.now
    r.scope(QKV, ("_sm90_decode", 9.0))
    r.host("user_annotation", "layer model.layers.0.qkv", start - 1, r.now - start + 1)
    start = r.now = r.now + 5
    r.scope(DOWN, ("_sm90_decode", 9.0))
    r.host("python_function", "nn.Module: MLP_3", start - 2, r.now - start + 4)
    r.host("python_function", "nn.Module: W4A16Linear_7", start - 1, r.now - start + 2)
    r.host("python_function", "torch/nn/modules.py(12): forward", start - 1, r.now - start + 2)
    r.events.sort(key=lambda event: event["ts"])
    layers = [c.layer for c in step_from(r, tmp_path).calls]
    assert layers == ["model.layers.0.qkv", "MLP_3 > W4A16Linear_7"]


def test_rocm():
    """Events of the HIP runtime under both names, and a kernel whose correlation is only in its arrow."""
    trace = read(DATA / "rocm.json")
    assert {k.name for k in trace.kernels if "gfx11" in k.name} == {"_gfx11_decode"}
    step = step_of(trace)
    assert [described(c) for c in step.calls] == [
        (W4A16, "gfx11_decode", "1x24576x4096 g=128 asym", 1, 240.0),
        (W4A16, "gfx11_decode", "1x4096x12288 g=128 sym", 1, 120.0),
        (GEMM, "gemm", "1x151936x4096", 1, 5400.0),
        (COPY, "copy", None, 1, 10.0),
    ]
    assert (step.usage.window, step.usage.idle) == (5790.0, 20.0)


def test_the_recorded_cpu_trace():
    """Two layers of attention and 8 experts over 40 rows, then 1 row twice, recorded with `profiling` and `layers`."""
    step = step_of(read(DATA / "cpu.json.gz"))
    counts = Counter((c.op, c.what.shape) for c in step.calls if isinstance(c.what, Scope) and not c.part)
    assert counts == {
        ("cpu_prefill", "40x768x256 g=32 asym"): 2,
        ("cpu_prefill", "40x256x256 g=32 sym"): 2,
        ("cpu_decode", "1x768x256 g=32 asym"): 4,
        ("cpu_decode", "1x256x256 g=32 sym"): 4,
        ("cpu_moe", "40x256x256 E=8 top_k=2 g=32 sym"): 2,
        ("cpu_moe", "1x256x256 E=8 top_k=2 g=32 sym"): 4,
    }
    products = Counter(c.what.shape for c in step.calls if c.kind == GEMM)
    assert products == {"40x8x256": 2, "1x8x256": 4, "1x1000x256": 3}
    assert sum(c.kind == ATTENTION for c in step.calls) == 6
    parts = sum(c.us for c in step.calls)
    assert parts == pytest.approx(step.usage.busy, rel=1e-6)
    assert step.usage.overlap == pytest.approx(0, abs=1)
    assert {c.layer for c in step.calls if c.op == "cpu_moe"} == {"layers.0.experts", "layers.1.experts"}
    touched = {c.what.problem.m: c.what.routing().touched for c in step.calls if c.op == "cpu_moe"}
    assert touched == {40: 8, 1: 2}
    assert Counter(c.phase for c in step.calls if c.op == "cpu_moe") == {"prefill": 2, "decode": 4}


def test_operators_of_a_cpu_nest(tmp_path):
    """An operator is one call with those inside it, but for ranges, products and attention, which are their own."""
    r = Recording()
    r.host("cpu_op", "aten::softmax", 0.0, 10.0)
    r.host("cpu_op", "aten::copy_", 2.0, 5.0)
    r.host("cpu_op", "aten::linear", 20.0, 50.0)
    r.host("cpu_op", "aten::addmm", 25.0, 40.0, **{"Input Dims": [[8], [4, 2], [2, 8]], "Input type": ["float"] * 3})
    r.host("cpu_op", "aten::copy_", 30.0, 5.0)
    r.host("cpu_op", "w4a16::linear", 80.0, 20.0)
    r.host("user_annotation", "cpu_decode 1x64x32 g=32 sym fp32", 85.0, 10.0)
    r.host("cpu_op", "aten::mm", 86.0, 8.0)
    r.host("cpu_op", "aten::_weight_int4pack_mm_for_cpu", 100.0, 3.0)
    r.host("cpu_op", "aten::mul", 100.0, 4.0, thread=2)
    step = step_from(r, tmp_path)
    assert Counter((*described(c)[:3], c.us) for c in step.calls) == Counter(
        [
            (OTHER, "other", None, 10.0),
            (OTHER, "other", None, 10.0),
            (GEMM, "gemm", "4x8x2", 40.0),
            (OTHER, "other", None, 10.0),
            (W4A16, "cpu_decode", "1x64x32 g=32 sym fp32", 10.0),
            (W4A16, "tinygemm", None, 3.0),
            (OTHER, "other", None, 4.0),
        ]
    )
    assert [k.name for c in step.calls if c.kind == GEMM for k in c.kernels] == ["aten::addmm"]
    assert (step.usage.window, step.usage.busy, step.usage.overlap) == (104.0, 84.0, 3.0)


def test_a_real_h100_trace():
    """Four layer calls of w4a16 and a dense product behind each, torch 2.11, Triton 3.6."""
    trace = read(DATA / "h100.json.gz")
    step = step_of(trace)
    counts = Counter(c.what.shape for c in step.calls if isinstance(c.what, Scope) and not c.part)
    assert counts == {"512x4096x4096 g=128 asym": 1, "1x4096x4096 g=128 asym": 3}
    products = Counter(c.what.shape for c in step.calls if c.kind == GEMM)
    assert products == {"512x4096x4096": 1, "1x4096x4096": 3}


def test_a_real_h100_trace_of_a_graph():
    """`benchmarks/roofline_8b.py --layers 1 --prompt 256 --steps 2`: warm-up, prefill, two replays of a decode step."""
    trace = read(DATA / "h100-graph.json.gz")
    step = step_of(trace)
    layer = {"6144x4096", "4096x4096", "24576x4096", "4096x12288"}
    wanted = {f"sm90_prefill 256x{nk} g=128 sym": (1, False) for nk in layer}
    wanted |= {f"sm90_decode 1x{nk} g=128 sym": (2, True) for nk in layer}
    for inferred in (False, True):
        ran = Counter(f"{c.op} {c.what.shape}" for c in step.calls if c.kind == W4A16 and c.inferred == inferred)
        assert ran == {name: count for name, (count, replayed) in wanted.items() if replayed == inferred}
    decode = step.of_phase("decode")
    assert all(c.inferred for c in decode.calls if c.kind != COPY)
    assert Counter(c.what.shape for c in decode.calls if c.kind == GEMM) == {"1x151936x4096": 2}
    assert Counter(c.what.shape for c in decode.calls if c.kind == ATTENTION) == {"1x32x1x128 over 8x257": 2}
    by_name = Counter(k.name for c in step.calls for k in c.kernels if k.name == "_sm90_decode")
    assert by_name["_sm90_decode"] == 8  # the four of the warm-up are not of the step
    assert sum(k.name == "_sm90_decode" for k in trace.kernels) == 12
    for phase in ("prefill", "decode"):
        part = step.of_phase(phase)
        assert sum(c.us for c in part.calls) == pytest.approx(part.usage.busy, rel=0.02)
