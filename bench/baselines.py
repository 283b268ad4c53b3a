"""Other ways to let one model work in parallel, on the same cache: `python bench/baselines.py`

    self-consistency    N workers solve the problem on their own, and vote (arXiv 2203.11171)
    skeleton-of-thought one worker writes the points of an answer, then each point is written out
                        by a worker of its own, all at once (arXiv 2307.15337)
    Hogwild             the package's engine: workers that read each other's live text

The first two are examples of `hogwild_ext.forward`, to be read and changed: all that they need is
who sees which segments. They are kept plain. A method's passes are limited by --max-steps.

The default model is too small to solve problems: its figures compare what is generated, encoded and
waited for, not the quality of answers. Prints a table of Markdown.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

import hogwild_ext as hx
from hogwild_ext import default_model
from hogwild_ext.answers import boxed_answer
from hogwild_ext.bench.attention import cpu_name

PROBLEMS = {  # and what is right
    "pencils": (
        "A box holds 4 rows of 6 pencils. Then 5 pencils are taken out. How many are left?",
        "19",
    ),
    "ages": ("Anna is 3 years older than Ben. Together they are 21. How old is Anna?", "12"),
    "town": ("How can a small town save energy?", None),
}
OPEN = ("town",)  # nothing to vote on
TEMPERATURE, TOP_K = 0.7, 40
SHARE_OF_SKELETON = 0.25  # of the passes, at most


@dataclass(frozen=True)
class Outcome:
    """What a method came to, and what it took."""

    method: str
    answer: str | None
    text: str
    generated: int  # tokens, ends of sequence not counted
    encoded: int  # tokens, each once
    passes: int
    seconds: float


# ---- the methods ---------------------------------------------------------------------------------


def self_consistency(
    model: Any, tokenizer: Any, problem: str, workers: int, max_steps: int, seed: int
) -> Outcome:
    """Independent attempts and a majority vote (Wang et al., arXiv 2203.11171).

    All workers read one prompt, which is encoded once. None of them sees another.
    """
    started = time.perf_counter()
    cache = hx.SegmentCache.for_model(model)
    prompt = cache.segment("prompt")
    attempts = [cache.segment(f"attempt {i + 1}") for i in range(workers)]
    views = [[prompt, attempt] for attempt in attempts]

    request = f"{problem}\nReason step by step, then write the answer in \\boxed{{}}."
    first = hx.forward(model, cache, [[prompt]], [in_chat_format(tokenizer, request)])
    texts = write(
        model, tokenizer, cache, views, first.expand(workers, -1), max_steps - 1, seed,
        done=lambda text: boxed_answer(text) is not None,
    )  # fmt: skip

    return Outcome(
        method="self-consistency",
        answer=vote([answer_in(text) for text, _ in texts]),
        text="\n\n---\n\n".join(text for text, _ in texts),
        generated=sum(count for _, count in texts),
        encoded=cache.stats.appended_tokens,
        passes=cache.stats.steps,
        seconds=time.perf_counter() - started,
    )


def skeleton_of_thought(
    model: Any, tokenizer: Any, problem: str, workers: int, max_steps: int, seed: int
) -> Outcome:
    """Points first, then all of them at once (Ning et al., arXiv 2307.15337).

    One worker writes a list of points, as many as there are workers. Whoever writes out a point
    sees the prompt and the list, which both are encoded once, and not the others.
    """
    started = time.perf_counter()
    cache = hx.SegmentCache.for_model(model)
    prompt, skeleton = cache.segment("prompt"), cache.segment("skeleton")

    request = (
        f"{problem}\nFirst list only the {workers} points of your answer, numbered, a few words "
        "each. Then write out one point after another."
    )
    hx.forward(model, cache, [[prompt]], [in_chat_format(tokenizer, request)])
    opening = encode(tokenizer, "1.")
    first = hx.forward(model, cache, [[prompt, skeleton]], [opening])
    [(outline, outlined)] = write(
        model, tokenizer, cache, [[prompt, skeleton]], first,
        max(1, int(max_steps * SHARE_OF_SKELETON) - 2), seed,
        done=lambda text: f"1.{text}".count("\n") >= workers and text.endswith("\n"),
    )  # fmt: skip
    points = points_of("1." + outline, workers)

    views = [[prompt, skeleton, cache.segment(f"point {i + 1}")] for i in range(len(points))]
    headings = [f"\n\nPoint {i + 1}, {point}:" for i, point in enumerate(points)]
    first = hx.forward(model, cache, views, [encode(tokenizer, heading) for heading in headings])
    texts = write(
        model, tokenizer, cache, views, first, max_steps - cache.stats.steps, seed,
        done=lambda text: text.endswith("\n\n") and text.strip() != "",
    )  # fmt: skip

    written = [
        heading + text.rstrip() for heading, (text, _) in zip(headings, texts, strict=True)
    ]  # in the order of the points, whoever was done first
    return Outcome(
        method="skeleton-of-thought",
        answer=answer_in("".join(text for text, _ in texts)),
        text="".join(written).strip(),
        generated=outlined + sum(count for _, count in texts),
        encoded=cache.stats.appended_tokens,
        passes=cache.stats.steps,
        seconds=time.perf_counter() - started,
    )


def hogwild(
    model: Any, tokenizer: Any, problem: str, workers: int, max_steps: int, seed: int
) -> Outcome:
    """Workers that read each other's live text (arXiv 2504.06261)."""
    result = hx.Hogwild(model, tokenizer, workers=workers, seed=seed).run(problem, max_steps)
    return Outcome(
        method="Hogwild",
        answer=result.answer,
        text=result.text,
        generated=result.stats.generated_tokens,
        encoded=result.stats.encoded_tokens,
        passes=result.steps,
        seconds=result.stats.seconds,
    )


METHODS = (self_consistency, skeleton_of_thought, hogwild)

# ---- what the first two are made of --------------------------------------------------------------


def write(
    model: Any,
    tokenizer: Any,
    cache: hx.SegmentCache,
    views: Sequence[list[hx.Segment]],
    logits: torch.Tensor,
    max_steps: int,
    seed: int,
    done: Callable[[str], bool],
) -> list[tuple[str, int]]:
    """Lets a worker go on at the end of each view, all at once, for up to `max_steps` passes.

    `logits` [W, vocab] are those for the first tokens. A worker stops at an end of sequence, or
    when its text is `done`. Returns the workers' texts and their numbers of tokens.
    """
    generators = [torch.Generator().manual_seed(seed + w) for w in range(len(views))]
    written: list[list[int]] = [[] for _ in views]
    texts = ["" for _ in views]
    writing = list(range(len(views)))
    for step in range(max_steps + 1):
        going_on = []
        for w, row in zip(writing, logits, strict=True):
            token = draw(row, generators[w])
            if token == tokenizer.eos_token_id:
                continue
            written[w].append(token)
            texts[w] = tokenizer.decode(written[w])
            if not done(texts[w]):
                going_on.append(w)
        writing = going_on
        if not writing or step == max_steps:
            break
        logits = hx.forward(
            model, cache, [views[w] for w in writing], [written[w][-1:] for w in writing]
        )
    return [(text, len(tokens)) for text, tokens in zip(texts, written, strict=True)]


def draw(logits: torch.Tensor, generator: torch.Generator) -> int:
    """A token at random; `logits` are [vocab]."""
    best, tokens = logits.float().topk(min(TOP_K, len(logits)))
    chances = (best / TEMPERATURE).softmax(-1).cpu()
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text in the middle of another."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def in_chat_format(tokenizer: Any, request: str) -> list[int]:
    """Tokens up to where the answer begins."""
    if getattr(tokenizer, "chat_template", None) is None:
        return encode(tokenizer, request + "\n\n")
    messages = [{"role": "user", "content": request}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, text)


def answer_in(text: str) -> str | None:
    """The boxed answer, or else the last number; None without either."""
    if (boxed := boxed_answer(text)) is not None:
        return boxed
    numbers = re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else None


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer; among equals, the one that comes first. None does not vote."""
    given = [answer.strip().rstrip(".") for answer in answers if answer is not None]
    return Counter(given).most_common(1)[0][0] if given else None


def points_of(outline: str, most: int) -> list[str]:
    """The first `most` points of a numbered list; of lines, if nothing is numbered."""
    lines = [line.strip(" *-") for line in outline.splitlines()]
    found = [re.match(r"\d+[.)]\W*(\w.*)", line) for line in lines]
    numbered = [point[1].rstrip(" *-.:") for point in found if point]
    return (numbered or [line for line in lines if line] or ["the answer"])[:most]


# ---- the run -------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a folder or a hub name (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--problem", help=f"a text, or one of {', '.join(PROBLEMS)} (default: all of these)"
    )
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=160, help="forward passes of a method")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the texts too")
    options = parser.parse_args()

    transformers.logging.disable_progress_bar()
    folder = options.model or default_model.ensure()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    dtype = torch.float32 if options.model is None else "auto"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False
    ).eval()
    hx.patch(model)
    problems = PROBLEMS
    if options.problem:
        problems = {"given": PROBLEMS.get(options.problem, (options.problem, None))}
    settings = (options.workers, options.max_steps, options.seed)
    for method in METHODS:  # once for nothing: the first passes of a process are slow
        method(model, tokenizer, "Say yes.", options.workers, 8, options.seed)

    print(f"- {time.strftime('%Y-%m-%d')}: python {' '.join(sys.argv)}")
    print(
        f"- {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; hogwild_ext "
        f"{hx.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"- {options.model or 'SmolLM2-135M-Instruct'}, {model.dtype}; {options.workers} workers")
    if options.model is None:
        print(
            "- This model is too small to solve problems: compare tokens, passes and times, not "
            "answers"
        )
    print("\n| problem | method | answer | right | generated | encoded | passes | s | tokens/s |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (problem, right) in problems.items():
        for method in METHODS:
            out = method(model, tokenizer, problem, *settings)
            answer = "" if name in OPEN else out.answer or ""
            cells = (
                name, out.method, answer, right or "", out.generated, out.encoded, out.passes,
                f"{out.seconds:.1f}", f"{out.generated / out.seconds:.1f}",
            )  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            if options.show:
                print(f"\n{out.text}\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
