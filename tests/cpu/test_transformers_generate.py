"""What a loaded model must do under generation: padding, caches, compilation, continuous batching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import w4a16
from models import RECIPES, VOCAB, Made, make_checkpoint

NEW = 6


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(1)
    return make_checkpoint(request.param, RECIPES["ct-asym"], tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def dense(made: Made) -> Any:
    return made.dense()


@pytest.fixture
def model(made: Made) -> Any:
    return w4a16.load(str(made.folder))


def greedy(model: Any, ids: Tensor, **settings: Any) -> list[list[int]]:
    out: list[list[int]] = model.generate(ids, max_new_tokens=NEW, do_sample=False, **settings).tolist()
    return out


def prompt(length: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (2, length))


def test_a_batch_with_padding(model: Any, dense: Any) -> None:
    ids = prompt()
    ids[1, :3] = 0
    settings = {"attention_mask": (ids != 0).long()}
    assert greedy(model, ids, **settings) == greedy(dense, ids, **settings)


def test_a_static_cache(model: Any, dense: Any) -> None:
    ids = prompt()
    assert greedy(model, ids, cache_implementation="static") == greedy(dense, ids)


def test_one_graph_serves_every_row_count(model: Any, dense: Any) -> None:
    """The row count is read inside the operator: one trace, two row counts, and the choice made anew for each."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad(), w4a16.record() as served:
        for ids in (prompt(7), prompt(3)):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, dense(ids).logits, rtol=0, atol=1e-4)
    assert len(graphs) == 1
    assert {problem.m for _, problem in served} == {14, 6}


def test_the_compiled_forward_is_the_eager_one(model: Any, dense: Any) -> None:
    ids = prompt()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, dense(ids).logits, rtol=0, atol=1e-4)


def test_generate_compiles_its_decode_step(model: Any, dense: Any) -> None:
    ids = prompt()
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # or transformers compiles on accelerators only
    with w4a16.record() as served:
        got = greedy(model, ids, cache_implementation="static", compile_config=config)
    assert got == greedy(dense, ids)
    assert hasattr(model, "_compiled_call")
    assert {problem.m for _, problem in served} == {14, 2}


def test_continuous_batching(model: Any, dense: Any) -> None:
    prompts = [prompt()[0].tolist(), prompt()[0, :4].tolist(), prompt()[1, :2].tolist()]
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    out = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=batching)
    got = [out[name].generated_tokens for name in sorted(out)]
    assert [len(tokens) > 0 for tokens in got] == [True] * 3
    wanted = [greedy(dense, torch.tensor([ids]))[0][len(ids) :] for ids in prompts]
    assert got == wanted
