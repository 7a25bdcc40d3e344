"""Perplexity, KL and agreement, against figures worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from w4a16 import BadInput
from w4a16.evaluate import compare


class Constant:
    """A language model that gives every token the same probabilities."""

    device = torch.device("cpu")

    def __init__(self, *probabilities: float) -> None:
        self.logits = torch.tensor(probabilities).log()

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_figures_by_hand() -> None:
    dense, quantized = Constant(0.5, 0.25, 0.25), Constant(0.25, 0.5, 0.25)
    ids = torch.tensor([2, 0, 0, 1, 2])  # one window predicts 0, 0, 1, 2
    found = compare(dense, quantized, ids)
    assert found.tokens == 4
    assert found.perplexity_dense == pytest.approx((2 * 2 * 4 * 4) ** 0.25)
    assert found.perplexity_quantized == pytest.approx((4 * 4 * 2 * 4) ** 0.25)
    assert found.kl_per_token == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert found.top1_agreement == 0


def test_a_model_agrees_with_itself() -> None:
    model = Constant(0.5, 0.25, 0.25)
    found = compare(model, model, torch.tensor([0, 1, 2, 0, 1]), window=2)
    assert found.tokens == 2  # a window of two predicts one; the last window has one token and predicts none
    assert found.kl_per_token == 0
    assert found.top1_agreement == 1


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(BadInput, match="at least 2"):
        compare(Constant(1.0), Constant(1.0), torch.tensor([0]))
