"""Runs in which the model is left out: what remains is the engine's own work, page and trace.

A pass stores its tokens, without keys and values, and everybody says "z", and now and then the end
of a paragraph: all at the same rate, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hogwild_ext as hx
from hogwild_ext import run as runs
from models import tiny_model
from scripted import STOP, VOCABULARY, Z, team

PARAGRAPH = 20  # tokens


class NoModel:
    """Stands in for `forward`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        monkeypatch.setattr(runs, "forward", self.forward)

    def forward(self, model: Any, cache: Any, views: Any, tokens: Any) -> torch.Tensor:
        with cache.step(views, [len(new) for new in tokens], tokens) as step:
            step._attended[:] = b"\1" * cache.num_layers
        self.passes += 1
        speaks = {view[-1].name.partition(":")[0]: row for row, view in enumerate(views)}
        said = torch.full((len(views),), Z)
        for worker, row in enumerate(speaks.values()):
            if (self.passes + worker) % PARAGRAPH == 0:
                said[row] = STOP
        logits = torch.full((len(views), VOCABULARY), -50.0)
        logits[torch.arange(len(views)), said] = 50.0
        return logits


def large_team(workers: int, steps: int, **changes: Any) -> hx.Hogwild:
    """Whose page has room for all those steps."""
    room = 2 * workers * (steps + 100)  # headings too
    model = tiny_model(
        "llama", vocab_size=VOCABULARY, head_dim=16, num_heads=1, num_kv_heads=1, num_layers=1,
        max_position_embeddings=room,
    )  # fmt: skip
    return team(model, [f"W{i}" for i in range(workers)], max_tokens=room, **changes)


def work_of_steps(run: hx.engine.Run) -> Iterator[int]:
    """A run's steps. What follows each, until the next is asked for, is that step's work."""
    step = 0
    for event in run:
        if event.kind == "stop":
            return
        if event.step > step:
            step = event.step
            yield step
