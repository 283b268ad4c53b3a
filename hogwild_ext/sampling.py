"""Choosing the next token of a worker, in transformers' terms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

from . import checks

# Every setting of transformers' GenerationConfig is in one of these three.
FOLLOWED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "min_new_tokens",
    "exponential_decay_length_penalty", "eos_token_id",
}  # fmt: skip
# These do not change what is drawn: how long a run is, is said by `max_steps`; the cache is ours;
# the rest is about what `generate` returns, about beams, which are refused, or about other models
# that guess ahead.
HARMLESS = {
    "max_length", "max_new_tokens", "renormalize_logits", "bos_token_id", "pad_token_id",
    "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "prefill_chunk_size", "low_memory", "compile_config", "disable_compile",
    "continuous_batching_config", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "early_stopping", "length_penalty", "use_mtp",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "max_matching_ngram_size", "transformers_version",
}  # fmt: skip
# Not followed, and would change what is drawn -> the values that mean that they are off.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "watermarking_config": (),
    "token_healing": (False,),
    "min_length": (0,),
    "max_time": (),
    "stop_strings": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,),
}


def check_config(config: Any) -> None:
    """Raises TypeError for what is not a GenerationConfig."""
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config: expected a GenerationConfig, got {checks.describe(config)}"
        )


def config_for(model: Any, given: GenerationConfig | None) -> GenerationConfig:
    """What `generate` of the model would go by: what `given` leaves unset, the model's own says.

    Raises TypeError for what is not a GenerationConfig.
    """
    own = getattr(model, "generation_config", None) or GenerationConfig()
    if given is None:
        return own
    check_config(given)
    config = copy.copy(given)
    for name, value in vars(own).items():
        if not name.startswith("_") and getattr(config, name, None) is None:
            setattr(config, name, value)
    return config


def _check_settings(config: GenerationConfig) -> None:
    """Raises ValueError for a setting that would change what is drawn and is not followed."""
    known = vars(GenerationConfig())
    for name, value in vars(config).items():
        if name.startswith("_") or value is None or name in FOLLOWED or name in HARMLESS:
            continue
        if name in REFUSED or name in known:  # or new in transformers
            if value not in REFUSED.get(name, ()):
                raise ValueError(
                    f"generation_config: expected {name} not to be set, got {name}={value!r}: "
                    "that is not done here. None, in model.generation_config too, does without"
                )
        else:
            warnings.warn(
                f"generation_config: {name}={value!r} is not a setting of transformers and means "
                "nothing here",
                stacklevel=4,
            )


class Written(list[int]):
    """Tokens that only ever become more: a list, and a tensor that grows with it."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        super().__init__(tokens)
        self._tensor = torch.empty(0, dtype=torch.int64, device="cpu")
        self._filled = 0  # so many of them are in the tensor

    def tensor(self, device: torch.device) -> torch.Tensor:
        """All of them: [n] int64. The tokens that it has already are not copied again."""
        count = len(self)
        if self._tensor.device != device:
            self._tensor, self._filled = torch.empty(0, dtype=torch.int64, device=device), 0
        if count > len(self._tensor):
            larger = torch.empty(max(64, 2 * count), dtype=torch.int64, device=device)
            larger[: self._filled] = self._tensor[: self._filled]
            self._tensor = larger
        if count > self._filled:
            new = torch.tensor(self[self._filled :], dtype=torch.int64, device=device)
            self._tensor[self._filled : count] = new
            self._filled = count
        return self._tensor[:count]


class Sampler:
    """Chooses the next token of one worker: transformers' processors, then a draw.

    `more`: processors after those that `config` asks for. `never`: runs of tokens that are never
    completed. `ends`: the tokens with which a worker ends.

    Raises TypeError for what is not a GenerationConfig, ValueError for a setting that is not
    followed or out of its range. Warns of one that nobody knows.
    """

    def __init__(
        self,
        config: GenerationConfig,
        more: Sequence[Callable[..., torch.Tensor]] = (),
        never: Sequence[list[int]] = (),
        ends: Sequence[int] = (),
    ) -> None:
        check_config(config)
        _check_settings(config)
        checks.is_sequence("logits_processors", more, "logits processors")
        for i, process in enumerate(more):
            if not callable(process):
                raise TypeError(
                    f"logits_processors[{i}]: expected a logits processor, got "
                    f"{checks.describe(process)}"
                )
        try:
            self._build(config, more, never, list(ends))
        except (ValueError, TypeError) as error:  # of a processor of transformers
            raise ValueError(f"generation_config: {error}") from None

    def _build(
        self,
        config: GenerationConfig,
        more: Sequence[Callable[..., torch.Tensor]],
        never: Sequence[list[int]],
        ends: list[int],
    ) -> None:
        def setting(name: str, *off: Any) -> Any:
            """What is asked for, None if nothing is. Older transformers lack some."""
            value = getattr(config, name, None)
            return None if value in off else value

        # Those that look at tokens, over the whole vocabulary. In the order of `generate`.
        use: list[Callable[..., torch.Tensor]] = []
        if (bias := setting("sequence_bias", {}, [])) is not None:
            use.append(processors.SequenceBiasLogitsProcessor(bias))
        if (penalty := setting("repetition_penalty", 1)) is not None:
            use.append(processors.RepetitionPenaltyLogitsProcessor(float(penalty)))
        if (size := setting("no_repeat_ngram_size", 0)) is not None:
            use.append(processors.NoRepeatNGramLogitsProcessor(size))
        if ends and (decay := setting("exponential_decay_length_penalty")) is not None:
            use.append(processors.ExponentialDecayLengthPenalty(tuple(decay), ends, 0))
        self._processors = [*use, *more]

        # What is forbidden stays so, whatever comes after: it need not be a processor, each of
        # which looks at the whole vocabulary.
        self._never = list(setting("suppress_tokens") or ())
        self._never_first = list(setting("begin_suppress_tokens") or ())
        self._ends, self._ends_from = ends, setting("min_new_tokens") or 0
        self._never_behind: dict[int, list[list[int]]] = {}  # by the token before the last one
        bad_words = [word for word in setting("bad_words_ids") or () if word not in _ones(ends)]
        for tokens in (*bad_words, *never):
            if len(tokens) == 1:
                self._never += tokens
            else:
                self._never_behind.setdefault(tokens[-2], []).append(tokens)

        # Those that look at scores only, over the top_k best tokens. In the order of `generate`,
        # but for the temperature, which does not change who is best, after the choice of them.
        self._warpers: list[Callable[..., torch.Tensor]] = []
        self._top_k = 0
        self.greedy = not config.do_sample or config.temperature == 0
        if self.greedy:
            return
        top_k = setting("top_k")
        self._top_k = 50 if top_k is None else checks.is_integer("top_k", top_k, 0)
        if (temperature := setting("temperature", 1)) is not None:
            self._warpers.append(processors.TemperatureLogitsWarper(float(temperature)))
        if (top_h := setting("top_h")) is not None:  # it looks at more than the top_k best
            self._processors += [*self._warpers, processors.TopHLogitsWarper(float(top_h))]
            self._warpers = []
        if (top_p := setting("top_p", 1)) is not None:
            self._warpers.append(processors.TopPLogitsWarper(float(top_p)))
        if (min_p := setting("min_p")) is not None:
            self._warpers.append(processors.MinPLogitsWarper(float(min_p)))
        if (typical_p := setting("typical_p", 1)) is not None:
            self._warpers.append(processors.TypicalLogitsWarper(float(typical_p)))
        if (epsilon := setting("epsilon_cutoff", 0, 1)) is not None:
            self._warpers.append(processors.EpsilonLogitsWarper(float(epsilon)))
        if (eta := setting("eta_cutoff", 0, 1)) is not None:
            self._warpers.append(processors.EtaLogitsWarper(float(eta)))

    def __call__(
        self,
        logits: torch.Tensor,
        written: Sequence[int],
        generator: torch.Generator,
        forbidden: Sequence[int] = (),
    ) -> int:
        """Chooses a token.

        Args:
            logits: [vocab] of one worker.
            written: its own tokens so far. `Written` saves copying them for every token.
            generator: its random numbers, on the CPU.
            forbidden: tokens that must not be chosen.

        Raises RuntimeError if there is nothing to choose from: NaN or infinite numbers from the
        model, or no token that is not forbidden.
        """
        scores = logits.float().unsqueeze(0)  # [1, vocab]
        # NaN counts as the largest number wherever the largest is looked for.
        _check_highest(float(scores.max()), logits)
        banned = [*forbidden, *self._never, *self._completing(written)]
        banned += self._never_first if not written else ()
        banned += self._ends if len(written) < self._ends_from else ()
        if banned:
            where = torch.tensor(banned, dtype=torch.int64, device=scores.device)
            scores = scores.index_fill(1, where, float("-inf"))
        if self._processors:
            if not isinstance(written, Written):
                written = Written(written)
            tokens = written.tensor(scores.device).unsqueeze(0)
            with _float32_by_default():
                for process in self._processors:
                    scores = process(tokens, scores)
        if self.greedy:
            highest, token = scores.max(-1)
            _check_highest(float(highest), logits)
            return int(token)
        best: torch.Tensor | None = None
        if 0 < self._top_k < scores.shape[-1]:
            scores, best = _top(scores, self._top_k)
        scores = scores.cpu()  # the generator is there, so that a seed means the same everywhere
        _check_highest(float(scores.max()), logits)
        for warp in self._warpers:
            scores = warp(None, scores)
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        return int(drawn if best is None else best[0, int(drawn)])

    def _completing(self, written: Sequence[int]) -> list[int]:
        """The tokens that would complete what is never written."""
        return [
            tokens[-1]
            for tokens in self._never_behind.get(written[-1] if written else -1, ())
            if list(written[1 - len(tokens) :]) == tokens[:-1]
        ]


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


def _ones(tokens: list[int]) -> list[list[int]]:
    return [[token] for token in tokens]


def _top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `count` of the scores [1, vocab] and who they are, and all that are as good as the
    last of them, as in `generate`: logits in half precision are often equal."""
    best, who = scores.topk(count + 1)
    last = best[0, count - 1]
    if best[0, count] != last:
        return best[:, :count], who[:, :count]
    who = (scores[0] >= last).nonzero().T
    return scores.gather(1, who), who


def _check_highest(highest: float, logits: torch.Tensor) -> None:
    """Raises RuntimeError if the highest score says that there is no choice. `logits`: [vocab]."""
    if np.isfinite(highest):
        return
    nans, infs = int(logits.isnan().sum()), int((logits == torch.inf).sum())
    if nans or infs or bool((logits == -torch.inf).all()):
        got = f"{nans} NaN and {infs} infinite" if nans or infs else "-inf alone"
        raise RuntimeError(
            f"logits: expected finite numbers from the model, got {got} of {len(logits)}, in "
            f"{str(logits.dtype).removeprefix('torch.')}. Either its numbers overflow (a model "
            "made for bfloat16 does in float16: load it with dtype=torch.bfloat16, or float32), "
            "or its weights are damaged"
        )
    raise RuntimeError(
        f"logits_processors, generation_config: expected them to leave a token to choose from, got "
        f"{highest} as the highest score; the model's logits are finite"
    )


def generator_of(seed: int, worker: int) -> torch.Generator:
    """A worker's random numbers: a function of the seed and of its place in the team."""
    # In words of 32 bits, each at a place of its own: numpy joins a list without saying where a
    # number ends.
    words = [seed % 2**32, worker, seed // 2**32]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
