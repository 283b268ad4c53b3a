"""Runs whose tokens are written beforehand, on a tiny model with one token a byte."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

import hogwild_ext as hx
from hogwild_ext import run as runs
from hogwild_ext.prompts import Prompts

EOS = 2
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = Prompts(
    system="{names}: {count}.",
    alone="alone.",
    user="{problem}",
    history_heading="H:\n",
    heading="#{name}{number}:",
    others_heading="[others]\n",
    unfinished="~\n",
    own_heading="[own]\n",
    question="?",
    not_first=(),
)


def byte_tokenizer(
    chat_template: str | None = CHAT, merges: Sequence[tuple[str, str]] = ()
) -> PreTrainedTokenizerFast:
    """Every byte is a token; so is the empty line, and a full stop before one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), (".", "ĊĊ"), *merges]
    words = ["<pad>", "<bos>", "<eos>", *alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


TOKENIZER = byte_tokenizer()
VOCABULARY = len(TOKENIZER)
STOP = TOKENIZER.encode(".\n\n")[0]  # ends a paragraph
A, B, C, Z = TOKENIZER.encode("abcz")


def team(model: transformers.PreTrainedModel, workers: Any = 3, **changes: Any) -> hx.Hogwild:
    return hx.Hogwild(
        model, TOKENIZER, workers, **{"prompts": PROMPTS, "seed": 1, "max_tokens": 4096, **changes}
    )


def sampled(**changes: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, eos_token_id=EOS, **changes)


def say(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER.encode(text)
    return tokens


def decode(tokens: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(tokens))
    return text


class Script:
    """Stands in for `forward`: the real one runs, but what each worker says is written down.

    `lines[name]` are the tokens that a worker will say; then it says "z" for ever. `passes` are,
    for each forward pass, the rows: the text that a row sees, as tokens, and how many it brought.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: dict[str, list[int]]) -> None:
        self.lines = {name: list(tokens) for name, tokens in lines.items()}
        self.passes: list[list[tuple[list[int], int]]] = []
        self.brought: list[int] = []
        self.raises: dict[int, BaseException] = {}  # at which pass
        self._forward = runs.forward
        monkeypatch.setattr(runs, "forward", self.forward)

    def forward(self, model: Any, cache: Any, views: Any, tokens: Any) -> torch.Tensor:
        if error := self.raises.get(len(self.passes)):
            raise error
        logits = self._forward(model, cache, views, tokens)
        assert isinstance(logits, torch.Tensor)
        rows = []
        for view, new in zip(views, tokens, strict=True):
            rows.append(([token for part in view for token in part.tokens], len(new)))
            self.brought += new
        self.passes.append(rows)
        forced = torch.full_like(logits, -50.0)
        # A worker's last row is where it speaks; others write the end of its paragraph.
        speaks = {view[-1].name.partition(":")[0]: row for row, view in enumerate(views)}
        for name, row in speaks.items():
            forced[row, self.lines[name].pop(0) if self.lines.get(name) else Z] = 50.0
        return forced


def random_lines(rng: random.Random, names: Sequence[str], length: int) -> dict[str, list[int]]:
    """Words, finished paragraphs, line breaks that finish nothing, and now and then the end."""
    lines = {}
    for name in names:
        tokens: list[int] = []
        for _ in range(length):
            word = say("".join(rng.choices("abcdefgh ,\n\u20ac", k=rng.randint(1, 4))))
            breaks = rng.choice(["", "", "", "\n\n", ".\n\n", ".\n\n", '!"\n\n', ".\n"])
            tokens += word + TOKENIZER.encode(breaks)
            if rng.random() < 0.03:
                tokens.append(EOS)
        lines[name] = tokens
    return lines
