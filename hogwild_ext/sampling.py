"""Choosing the next token of a worker, in transformers' terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

from . import checks

# Settings that mean another way of decoding -> the values that mean it is off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "watermarking_config": (None,),
}


def check_config(config: Any) -> None:
    """Raises TypeError for what is not a GenerationConfig."""
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config: expected a GenerationConfig, got {checks.describe(config)}"
        )


class Sampler:
    """Chooses the next token of one worker: transformers' processors, then a draw.

    `more`: processors after those that `config` asks for. `never`: runs of tokens that are never
    completed.

    Raises TypeError for what is not a GenerationConfig, ValueError for a setting that is not
    followed or out of its range.
    """

    def __init__(
        self,
        config: GenerationConfig,
        more: Sequence[Callable[..., torch.Tensor]] = (),
        never: Sequence[list[int]] = (),
    ) -> None:
        check_config(config)
        for name, off in _REFUSED.items():
            if (value := getattr(config, name, None)) not in off:
                raise ValueError(
                    f"generation_config: expected {name} not to be set, got {name}={value}"
                )
        try:
            self._build(config, never)
        except ValueError as error:  # of a processor of transformers
            raise ValueError(f"generation_config: {error}") from None
        checks.is_sequence("logits_processors", more, "logits processors")
        for i, process in enumerate(more):
            if not callable(process):
                raise TypeError(
                    f"logits_processors[{i}]: expected a logits processor, got "
                    f"{checks.describe(process)}"
                )
        self._processors += list(more)

    def _build(self, config: GenerationConfig, never: Sequence[list[int]]) -> None:
        # Those that look at tokens, over the whole vocabulary.
        self._processors: list[Callable[..., torch.Tensor]] = []
        if config.repetition_penalty not in (None, 1.0):
            self._processors.append(
                processors.RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))
            )
        if config.no_repeat_ngram_size:
            self._processors.append(
                processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
            )
        if bad_words := [*(config.bad_words_ids or ()), *never]:
            self._processors.append(processors.NoBadWordsLogitsProcessor(bad_words))
        if config.suppress_tokens:
            self._processors.append(
                processors.SuppressTokensLogitsProcessor(config.suppress_tokens)
            )

        # Those that look at scores only, over the top_k best tokens. In the order of `generate`,
        # but for the temperature, which does not change who is best, after the choice of them.
        self._warpers: list[Callable[..., torch.Tensor]] = []
        self._top_k = 0
        self.greedy = not config.do_sample or config.temperature == 0
        if self.greedy:
            return
        self._top_k = 50 if config.top_k is None else checks.is_integer("top_k", config.top_k, 0)
        if config.temperature not in (None, 1.0):
            self._warpers.append(processors.TemperatureLogitsWarper(float(config.temperature)))
        if config.top_p not in (None, 1.0):
            self._warpers.append(processors.TopPLogitsWarper(float(config.top_p)))
        if config.min_p is not None:
            self._warpers.append(processors.MinPLogitsWarper(float(config.min_p)))
        if config.typical_p not in (None, 1.0):
            self._warpers.append(processors.TypicalLogitsWarper(float(config.typical_p)))

    def __call__(
        self,
        logits: torch.Tensor,
        written: list[int],
        generator: torch.Generator,
        forbidden: Sequence[int] = (),
    ) -> int:
        """Chooses a token.

        Args:
            logits: [vocab] of one worker.
            written: its own tokens so far.
            generator: its random numbers, on the CPU.
            forbidden: tokens that must not be chosen.
        """
        scores = logits.float().unsqueeze(0)  # [1, vocab]
        if forbidden:
            where = torch.tensor(forbidden, device=scores.device)
            scores = scores.index_fill(1, where, float("-inf"))
        if self._processors:
            tokens = torch.tensor([written], dtype=torch.int64, device=scores.device)
            with _float32_by_default():
                for process in self._processors:
                    scores = process(tokens, scores)
        if self.greedy:
            return int(scores.argmax())
        best: torch.Tensor | None = None
        if 0 < self._top_k < scores.shape[-1]:
            scores, best = scores.topk(self._top_k)
        scores = scores.cpu()  # the generator is there, so that a seed means the same everywhere
        for warp in self._warpers:
            scores = warp(None, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        return int(drawn if best is None else best[0, int(drawn)])


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """transformers' processors take the numbers that they make for float32."""
    before = torch.get_default_dtype()
    if before is torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def generator_of(seed: int, worker: int) -> torch.Generator:
    """A worker's random numbers: a function of the seed and of its place in the team."""
    state = np.random.SeedSequence([seed, worker]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
