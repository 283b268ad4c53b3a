"""Values at which something begins or ends: one more or one less would be wrong."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import hogwild_ext as hx
from hogwild_ext import _C


def test_rotate_goes_up_to_the_last_position() -> None:
    keys = torch.randn(3, 1, 8)
    last = 2**31 - 1 - 3
    assert hx.rotate(keys, [1.0], start=last).shape == keys.shape
    for start in (last + 1, -(2**31)):
        with pytest.raises(ValueError, match="start: expected"):
            hx.rotate(keys, [1.0], start=start)


def test_as_many_short_segments_share_a_tile_as_fit() -> None:
    """Two of 32 keys fill one to the last place; two of 31 take as many, three of 21 too much."""

    def tiles(length: int) -> int:
        plan = _C.Plan(
            np.full((1, 16), 1000, np.int32), np.full(16, length, np.int32), np.ones(1, np.int32),
            np.zeros(0, np.float32), 1, 1, shared_keys=_C.SHARED_KEYS,
        )  # fmt: skip
        ((*visits,),) = plan.visits
        return len(visits)

    assert [tiles(n) for n in (32, 31, 21, 20, 2)] == [8, 8, 8, 6, 1]


def test_a_question_comes_after_1024_tokens() -> None:
    assert inspect.signature(hx.Hogwild).parameters["question_every"].default == 1024


def sampler(**settings: object):
    from transformers import GenerationConfig

    from hogwild_ext.sampling import Sampler

    return Sampler(GenerationConfig(do_sample=True, **settings))


def drawn(sampler, logits: torch.Tensor, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return [sampler(logits, [], generator) for _ in range(count)]


def test_without_a_top_k_the_best_fifty_are_drawn_from() -> None:
    logits = torch.zeros(70)
    logits[50], logits[51:] = -0.01, -0.5
    assert set(drawn(sampler(top_k=None), logits, 2000)) == set(range(50))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([4.0, *[0.0] * 9])
    share = drawn(sampler(top_k=0), logits, 400).count(0) / 400
    assert abs(share - 0.858) < 0.06


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_contrastive_search_that_is_off_is_no_setting(off: float | None) -> None:
    from transformers import GenerationConfig

    from hogwild_ext.sampling import Sampler

    config = GenerationConfig(do_sample=False)
    config.penalty_alpha = off
    Sampler(config)
    config.penalty_alpha = 1
    with pytest.raises(ValueError, match="penalty_alpha"):
        Sampler(config)
