"""The table, the choice and its sentences, for every known device, on any machine."""

from __future__ import annotations

import itertools

import pytest

from w4a16 import DEVICES, Problem, Unsupported, choose, env
from w4a16.dispatch import explanation, layout_for
from w4a16.dispatch_table import TABLE
from w4a16.errors import BadInput
from w4a16.tuning.tiles import TILES

CPU = DEVICES["cpu"]


def problem(**fields: object) -> Problem:
    return Problem(**({"m": 1, "n": 4096, "k": 4096, "group": 128} | fields))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _fresh_choices() -> None:
    choose.cache_clear()


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w4a16.dispatch_table.installed", lambda module: False)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_linear_problem_has_a_kernel_with_a_tile(device: object) -> None:
    shapes = itertools.product((1, 5, 17, 2048), (8, 4096), ("bf16", "fp16", "fp32"), (16, 128, 4096), (False, True))
    for m, n, act, group, zeros in shapes:
        choice = choose(problem(m=m, n=n, act=act, group=group, has_zeros=zeros), device)  # type: ignore[arg-type]
        assert (choice.tile is not None) == (choice.row.stem in TILES)
        assert choice.layout in choice.row.layouts


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("experts", [0, 8])
def test_every_row_answers(device: object, experts: int) -> None:
    found = explanation(problem(m=7, experts=experts, top_k=2 if experts else 0), device)  # type: ignore[arg-type]
    assert [line.stem for line in found.lines] == [row.stem for row in TABLE]
    assert sum(line.wins for line in found.lines) == (found.choice is not None)
    assert all(line.answer for line in found.lines)


def test_the_row_count_chooses_between_kernels() -> None:
    stems = {choose(problem(m=m), CPU).row.stem for m in (1, 2048)}
    assert stems == {"cpu_decode", "cpu_prefill"}


def test_without_the_extra_torch_serves(without_numba: None) -> None:
    assert choose(problem(m=1), CPU).row.stem == "cpu_int4pack"
    assert choose(problem(m=2048), CPU).row.stem == "dense"
    assert choose(problem(m=1, act="fp16"), CPU).row.stem == "dense"
    assert choose(problem(m=1, group=16), CPU).row.stem == "dense"


def test_the_layout_does_not_depend_on_the_row_count(without_numba: None) -> None:
    assert layout_for(problem(m=1), CPU) == layout_for(problem(m=4096), CPU)
    assert layout_for(problem(experts=8, top_k=2), CPU) == layout_for(problem(), CPU)


def test_a_packed_layout_rules_out_its_strangers() -> None:
    assert choose(problem(), CPU, "INT4PACK").row.stem == "cpu_int4pack"


def test_a_forced_kernel_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "FORCED_KERNEL", "dense")
    assert choose(problem(), CPU).row.stem == "dense"
    assert choose(problem(experts=8, top_k=2), CPU).row.stem == "cpu_moe"


@pytest.mark.parametrize("forced", ["cpu_int4pack", "no_such_kernel"])
def test_a_forced_kernel_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch, forced: str) -> None:
    monkeypatch.setattr(env, "FORCED_KERNEL", forced)
    with pytest.raises(Unsupported, match=f"forces {forced}"):
        choose(problem(act="fp16"), CPU, "EXLLAMA")


def test_refusal_lists_every_kernel() -> None:
    with pytest.raises(Unsupported) as caught:
        choose(problem(experts=8, top_k=2, act="fp32"), DEVICES["sm90"])
    assert all(row.stem in str(caught.value) for row in TABLE)


@pytest.mark.parametrize(
    "fields",
    [{"m": -1}, {"n": 0}, {"group": 100}, {"act": "int8"}, {"experts": 4}, {"experts": 4, "top_k": 5}],
)
def test_impossible_problems_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        problem(**fields)
