"""The engine: several workers of one model write on one page, each reading the others' live text.

See sections 3 and 4 of arXiv 2504.06261. `Hogwild` is the team; `run` does the steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from . import checks
from .answers import AnswerFinder, AnswerOf, BoxedAnswer, boxed_answer
from .chat_format import added_tokens, check_tokenizer, encode, special_tokens, turn_end
from .events import EVENT_KINDS, STOP_REASONS, Event, Result, Snapshot, Stats, WorkerResult
from .layouts import Layout, layout_from
from .model_support import parameter_count, read_model
from .never_compiled import never_compiled
from .patching import patch
from .prompts import Prompts, prompts_for
from .run import Run
from .sampling import Sampler, config_for

__all__ = [
    "EVENT_KINDS",
    "NAMES",
    "STOP_REASONS",
    "Event",
    "Hogwild",
    "Result",
    "Run",
    "Snapshot",
    "Stats",
    "WorkerResult",
    "worker_names",
]

NAMES = (
    "Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi",
    "Ivan", "Judy", "Kevin", "Laura", "Mallory", "Niaj", "Olivia", "Peggy",
)  # fmt: skip


@never_compiled
class Hogwild:
    """A team of workers that share one model and one page.

    Args:
        model: a causal language model of transformers, of a supported family; see `patch`.
        tokenizer: its tokenizer.
        workers: how many, or their names.
        layout: what a worker sees, a name in `layouts.LAYOUTS` or a `Layout`.
        max_tokens: room for keys and values of this many tokens. None: as many as the model has
            positions, but at most 65536. A run that fills it ends with what there is.
        seed: of the workers' random numbers. None: a fresh one for every run, see `Result.seed`.
        generation_config: how to choose a token, in transformers' terms. As in `generate`, what
            it leaves unset is the model's own, and what that leaves unset the default of
            transformers (`top_k`: 50; `do_sample`: no, greedy). What `sampling.FOLLOWED` lists is
            followed; penalties look at what the worker itself has written. What
            `sampling.HARMLESS` lists changes nothing that is drawn. All else is refused if it is
            set: beams and other ways of decoding, stop strings, lengths of what `generate` makes.
        logits_processors: more processors of transformers, each called with the worker's own
            tokens [1, n] and its logits [1, vocab].
        prompts: the words said to the model. None: those that suit its size.
        question_every: a worker that has written this many tokens since it was last asked finds
            `prompts.question` in front of its next paragraph: whether it does what another does
            already. None: never. A lone worker is not asked.
        final_answer: called with a worker's paragraph so far whenever it grows, and with a
            conclusion so far, closing text included; what it returns, unless None, is the final
            answer and ends the run. By default `boxed_answer`.
        answer_tokens: how long a worker may write behind `prompts.closing` when the steps or the
            context run out, or all have ended, without an answer; it does so greedily. Room for
            it is kept free. 0, or prompts without a closing text: the run ends without.
        paragraph_ends: called with a worker's paragraph so far; whether it is finished. By
            default `prompts.ends_paragraph`.
        linear: "packed" for packed linear layers; the model stays patched so. See `patch`.

    Raises TypeError and ValueError for a bad argument, by its name.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        workers: int | Sequence[str] = 2,
        layout: str | Layout = "combined",
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processors: Sequence[Callable[..., torch.Tensor]] = (),
        prompts: Prompts | None = None,
        question_every: int | None = 1024,
        final_answer: Callable[[str], str | None] | None = None,
        answer_tokens: int = 64,
        paragraph_ends: Callable[[str], bool] | None = None,
        linear: str | None = None,
    ) -> None:
        self.max_position = read_model(model).max_position
        self.model = model
        self.tokenizer = tokenizer
        # What a text is encoded behind, so that there is no space before it: text and tokens.
        self._leads = {lead: tokens for lead in ("\n", "|", "~") if (tokens := self._spaced(lead))}
        check_tokenizer(tokenizer)
        self.names = worker_names(workers)
        self.layout = layout_from(layout)
        if max_tokens is None:
            max_tokens = min(self.max_position, 65536)
        self.max_tokens = checks.is_integer("max_tokens", max_tokens, 1)
        self.seed = None if seed is None else checks.is_integer("seed", seed, 0, 2**63 - 1)
        generation_config = config_for(model, generation_config)
        if prompts is None:
            prompts = prompts_for(parameter_count(model))
        elif not isinstance(prompts, Prompts):
            raise TypeError(f"prompts: expected Prompts, got {checks.describe(prompts)}")
        self.prompts = prompts
        if question_every is not None:
            question_every = checks.is_integer("question_every", question_every, 1)
        self.question_every = question_every if prompts.question and len(self.names) > 1 else None
        self.answer_tokens = checks.is_integer("answer_tokens", answer_tokens, 0)
        self.closing = self.encode(prompts.closing) if self.answer_tokens else []
        self.reserved_tokens = 0  # that must be left for a conclusion
        if self.closing:
            before = len(self.encode(prompts.paragraph_break))
            self.reserved_tokens = before + len(self.closing) + self.answer_tokens
        # A tokenizer may know tokens that the model has no logits for.
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        ends = _ends_of_sequence(model, generation_config, tokenizer)
        self.ends_of_sequence = frozenset(token for token in ends if 0 <= token < self.vocab_size)
        ending = sorted(self.ends_of_sequence)
        never = [self.encode(text) for text in prompts.forbidden(self.names)]
        never += [[token] for token in sorted(special_tokens(tokenizer) - self.ends_of_sequence)]
        never = [tokens for tokens in never if tokens and max(tokens) < self.vocab_size]
        self.sampler = Sampler(generation_config, logits_processors, never, ending)
        plain = GenerationConfig(
            bad_words_ids=generation_config.bad_words_ids,
            suppress_tokens=generation_config.suppress_tokens,
            sequence_bias=generation_config.sequence_bias,
        )
        self.greedy = Sampler(plain, logits_processors, never, ending)  # for conclusions
        self.final_answer = _callable("final_answer", final_answer, boxed_answer)
        self.paragraph_ends = _callable("paragraph_ends", paragraph_ends, prompts.ends_paragraph)
        if linear is not None:
            patch(model, linear=linear)

    def answer_finder(self) -> AnswerFinder:
        """What is told a worker's paragraph, or a conclusion, piece by piece."""
        is_boxed = self.final_answer is boxed_answer
        return BoxedAnswer() if is_boxed else AnswerOf(self.final_answer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that goes on in the middle of the page."""
        for lead, before in self._leads.items():
            tokens = self._tokens(lead + text)
            if tokens[: len(before)] == before:  # or the two have a token in common
                return tokens[len(before) :]
        return self._tokens(text)

    def encode_first(self, text: str) -> list[int]:
        """The tokens of what the page begins with.

        Raises ValueError for tokens that the model does not know.
        """
        tokens, known = self._tokens(text), self.model.get_input_embeddings().weight.shape[0]
        if tokens and max(tokens) >= known:
            raise ValueError(
                f"tokenizer: expected the model's own, which has {known} tokens, got token "
                f"{max(tokens)}, {self.tokenizer.decode([max(tokens)])!r}, in the prompt"
            )
        return tokens

    def _spaced(self, lead: str) -> list[int]:
        """The tokens of a text of one letter, if they begin with a space: some tokenizers put one
        before every text, but in the middle of a page there is none.

        Raises TypeError for what is no tokenizer.
        """
        why = ""
        try:
            tokens = self._tokens(lead)
            read = [self.tokenizer.decode(some) for some in (tokens, tokens[:1])]
            if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
                # It may be a token of its own, or one with the letter.
                is_apart = len(tokens) > 1 and not read[1].strip()
                return tokens if is_apart or read[0] == f" {lead}" else []
        except (AttributeError, TypeError, ValueError) as error:
            why = f": {error}"
        raise TypeError(
            "tokenizer: expected a tokenizer of transformers, with its encode and decode, got "
            f"{checks.describe(self.tokenizer)}{why}"
        )

    def _tokens(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def run(
        self,
        problem: str,
        max_steps: int = 2048,
        *,
        snapshots: Sequence[int] = (),
        trace: str | Path | None = None,
    ) -> Result:
        """Works on the problem until a final answer, the end of all workers, `max_steps` forward
        passes or the end of the context. Ctrl-C ends it too: `stopped_by` is then "interrupted".

        Args:
            snapshots: after each of these numbers of steps the team is asked for the answer that
                it would give if the time were up, and goes on as if it had not been asked. So one
                run tells what it would have been with smaller budgets. Needs `prompts.closing`.
            trace: a file for everything that happens; see `hogwild_ext.trace`.

        Raises TypeError and ValueError for a bad argument, and for a problem too long to begin,
        OSError for a trace that cannot be opened. Where its disk is full later, the run goes on
        without: `Result.trace_error`, and a RuntimeWarning at the end.
        """
        with self.stream(problem, max_steps, snapshots=snapshots, trace=trace) as events:
            try:
                for _ in events:
                    pass
            except KeyboardInterrupt:
                events.close()
            result = events.result()
        if result.trace_error is not None:
            warnings.warn(
                f"the trace is incomplete: {result.trace_error}", RuntimeWarning, stacklevel=2
            )
        return result

    def stream(
        self,
        problem: str,
        max_steps: int = 2048,
        *,
        snapshots: Sequence[int] = (),
        trace: str | Path | None = None,
    ) -> Run:
        """The same as an iterator of events; nothing is computed before the first is asked for.

        Several streams may be open at once, each with its own page.
        """
        if not checks.is_text("problem", problem).strip():
            raise ValueError("problem: expected some text, got none")
        max_steps = checks.is_integer("max_steps", max_steps, 1)
        checks.is_sequence("snapshots", snapshots, "numbers of steps")
        budgets = {checks.is_integer("snapshots", steps, 1, max_steps) for steps in snapshots}
        if budgets and not self.closing:
            raise ValueError(
                "snapshots: expected prompts with a closing text, and answer_tokens above 0, to "
                f"make the team answer, got {'no tokens' if self.prompts.closing else 'no text'}"
            )
        if trace is not None and not isinstance(trace, (str, Path)):
            raise TypeError(f"trace: expected a path, got {checks.describe(trace)}")
        return Run(self, problem, max_steps, budgets, trace)


def worker_names(workers: int | Sequence[str]) -> tuple[str, ...]:
    """Names for a number of workers, or the names given, checked."""
    if isinstance(workers, (list, tuple)):
        if not workers:
            raise ValueError("workers: expected at least one name, got none")
        for name in workers:
            if not isinstance(name, str):
                raise TypeError(f"workers: expected names, got {checks.describe(name)}")
            if not name.strip() or not name.isprintable():
                raise ValueError(f"workers: expected names of printable letters, got {name!r}")
        if len(set(workers)) < len(workers):
            raise ValueError(f"workers: expected different names, got {', '.join(workers)}")
        return tuple(workers)
    if isinstance(workers, str):
        raise TypeError(f"workers: expected a number or a list of names, got {workers!r}")
    count = checks.is_integer("workers", workers, 1, 1024)
    return (*NAMES[:count], *(f"Worker {i + 1}" for i in range(len(NAMES), count)))


def _callable(name: str, value: Any, default: Callable[..., Any]) -> Callable[..., Any]:
    if value is None:
        return default
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {checks.describe(value)}")
    checked: Callable[..., Any] = value
    return checked


def _ends_of_sequence(model: Any, config: GenerationConfig, tokenizer: Any) -> set[int]:
    """All tokens that end a text: what a config does not name, the chat template may write."""
    ends = {*_ids(config.eos_token_id), *_ids(getattr(tokenizer, "eos_token_id", None))}
    # A config of transformers has a default, which is a letter of some tokenizers.
    named = {*_ids(getattr(model.config, "eos_token_id", None))}
    named |= {*_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))}
    ends |= named & added_tokens(tokenizer).keys()
    return ends | {*_ids(turn_end(tokenizer))}


def _ids(tokens: Any) -> list[int]:
    """Tokens, as configs name them: none, one or several."""
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
