"""Made-up traces, and what they say: for the tests of what reads traces.

`simulate` plays a run without a model: random words, but the engine's rules of who appends what,
when paragraphs join the history, and who sees what. `shown` says in plain Python what stood where.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hogwild_ext import trace

Line = dict[str, Any]

WORDS = (
    " the", " sum", " of", " all", " squares", " is", " even", " so", " we", " count", " each",
    " of", " them", " once", ",", " and", " then", " check", " 12", " =", " 3", " +", " 9", " Bob",
    "",  # a part of a character
)  # fmt: skip
# What could break a page, or be taken for something other than text.
HOSTILE = (
    "<script>window.broken=1</script>", "</script>", "<!--", "-->", "<img src=x onerror=broken=1>",
    "</p></main>", "&lt;", "&amp;", "{trace}", "{policy}", "\\boxed{", '"', "'", "\\", "\\u003c",
    " \u05e9\u05dc\u05d5\u05dd", "\u202eabc", "\U0001f98a", "e\u0301", "\u2028", "\u2029", "\t",
    "\x00", "\x07", "\r\n", "x" * 300, "\ufeff", "]]>", "http://127.0.0.1:9/x.png", " \n",
)  # fmt: skip
QUESTION = " Is any of this redundant? <i>Yes</i> or no:"


def simulate(
    seed: int,
    workers: Sequence[str] = ("Alice", "Bob"),
    layout: str = "combined",
    steps: int = 60,
    *,
    words: Sequence[str] = (*WORDS, *HOSTILE),
    paragraph: float = 0.08,
    extras: float = 0.03,
    problem: str = "How many <b>squares</b>?",
    prompt: str = "You are {names}. <script>",
    version: int = trace.VERSION,
) -> list[Line]:
    """The lines of a trace. layout: combined, contiguous or interleaved.

    `paragraph`: how often one ends; `extras`: how often a question, a conclusion or an end comes.
    Views that have changed are told whole, one by one.
    """
    random_ = random.Random(seed)
    commits = layout != "contiguous"
    names = ["prompt", "history", "others heading", "own heading"]
    live: list[int] = []
    spare: list[int] = []
    unfinished: list[int] = []
    for name in workers:
        live.append(len(names))
        names.append(f"{name}: live, one")
        spare.append(len(names))
        names.append(f"{name}: live, two")
        unfinished.append(len(names))
        names.append(f"{name}: unfinished")
    texts: list[list[tuple[int, str]]] = [[] for _ in names]  # (tokens, text) by segment
    writing = list(range(len(workers)))
    finishing: list[int] = []
    number = [1] * len(workers)
    ended = [False] * len(workers)
    closes = [False] * len(workers)
    opens = [True] * len(workers)
    written = [False] * len(workers)  # something in the paragraph
    pending: list[tuple[list[int], str]] = [([], "") for _ in workers]
    asked: list[str | None] = [None] * len(workers)
    headings = [""] * len(workers)
    chosen: dict[int, tuple[int, str]] = {}  # by worker
    told: dict[int, list[int]] = {}  # views
    encoded = committed = copied = 0
    lines: list[Line] = [
        {
            "kind": "run", "version": version, "hogwild_ext": "0.1.0", "model": "made up",
            "seed": seed, "problem": problem, "layout": layout, "workers": list(workers),
            "max_steps": steps, "segments": names, "bytes_per_token": 46080,
        }
    ]  # fmt: skip

    def tokens(count: int) -> list[int]:
        return [random_.randrange(1000) for _ in range(count)]

    def view(w: int) -> list[int]:
        others = [other for other in writing if other != w]
        if layout == "contiguous":
            return [0, 2, *(live[other] for other in range(len(workers)) if other != w), 3, live[w]]
        seen = [0, 1, *finishing]
        if layout == "combined" and others:
            seen.append(2)
            for other in others:
                seen += [live[other], unfinished[other]]
            seen.append(3)
        return [*seen, live[w]]

    def open_paragraph(w: int) -> tuple[list[int], str]:
        opens[w], written[w], headings[w] = True, False, f"**{workers[w]} [{number[w]}]:**"
        if number[w] > 1 and random_.random() < 4 * extras:
            asked[w] = QUESTION
        return tokens(5), headings[w]

    def row(w: int | None, segment: int, ids: list[int], text: str) -> None:
        nonlocal encoded
        encoded += len(ids)
        texts[segment].append((len(ids), text))
        if version > 1 and w is not None and w in chosen:  # goes without saying
            token, its_text = chosen.pop(w)
            assert ids[0] == token and text.startswith(its_text)
            ids, text = ids[1:], text[len(its_text) :]
            if not ids:
                return
        name = None if w is None else workers[w]
        rows.append({"worker": name, "segment": segment, "tokens": ids, "text": text})

    def seen(at: Line, w: int) -> Line:
        """What says that: a field of a token's line, or a line before it."""
        view, sees = views[w], sees_of[w]
        if version == 1:
            return {"sees": sees}
        if told.get(w) != view:
            told[w] = view
            later.append({"kind": "view", **at, "worker": workers[w], "segments": view})
        return {"segment": view[-1]}

    for w in range(len(workers)):
        pending[w] = open_paragraph(w)
    for step in range(1, steps + 1):
        rows: list[Line] = []
        if step == 1:
            row(None, 0, tokens(100), prompt)
            if layout != "interleaved":
                row(None, 2, tokens(3), "## Others\n\n")
                row(None, 3, tokens(4), "## Own\n\n")
                for segment in unfinished:
                    row(None, segment, tokens(2), " ...\n\n")
        for w in range(len(workers)):
            if closes[w] and not commits:
                row(w, live[w], *pending[w])
                closes[w] = False
                number[w] += 1
                pending[w] = open_paragraph(w)
            elif closes[w]:
                row(w, live[w], *pending[w])
                finishing.append(live[w])
                closes[w] = False
                live[w], spare[w] = spare[w], live[w]
                if ended[w]:
                    writing.remove(w)
                else:
                    number[w] += 1
                    pending[w] = open_paragraph(w)
        for w in writing:
            if ended[w]:
                continue
            if (question := asked[w]) is not None and random_.random() < 0.5:
                ids, text = pending[w]  # in one row with the token before it, or in its own
                pending[w] = ([*ids, *tokens(7)], text + question)
                row(w, live[w], *pending[w])
            else:
                row(w, live[w], *pending[w])
                if question is not None:
                    row(w, live[w], tokens(7), question)
        ended_before = list(ended)
        later: list[Line] = []
        time = round(0.2 + 0.05 * step, 3)
        at: Line = {"step": step, "time": time}
        drawers = [w for w in writing if not ended[w]]
        views = {w: view(w) for w in drawers}
        sees_of = {
            w: [[segment, sum(count for count, _ in texts[segment])] for segment in views[w]]
            for w in drawers
        }
        for w in drawers:
            named: Line = {**at, "worker": workers[w], "paragraph": number[w]}
            if opens[w]:
                opens[w] = False
                later.append({"kind": "start", **named, "text": headings[w]})
            if asked[w] is not None:
                later.append({"kind": "question", **named, "text": asked[w]})
                asked[w] = None
        for w in drawers:
            named = {**at, "worker": workers[w], "paragraph": number[w], **seen(at, w)}
            if step > 1 and len(writing) > 1 and random_.random() < extras / 3:
                later.append({"kind": "end", **named, "token": 2, "text": ""})
                ended[w] = True
                closes[w] = commits and written[w]
                pending[w] = (tokens(1), "\n\n")
                continue
            text = random_.choice(words)
            if written[w] and random_.random() < paragraph:
                text = random_.choice(["\n\n", ".\n\n"])
                closes[w] = True
            written[w] = written[w] or text != ""
            token = random_.randrange(1000)
            pending[w], chosen[w] = ([token], text), (token, text)
            later.append({"kind": "token", **named, "token": token, "text": text})
            if not closes[w] and random_.random() < extras:
                asked[w] = QUESTION  # in the middle of a paragraph
        for w in range(len(workers)):
            if spare[w] in finishing:
                moved = texts[spare[w]]
                size = sum(count for count, _ in moved)
                done = number[w] - (0 if ended_before[w] else 1)
                text = "".join(part for _, part in moved[1:])
                later.append(
                    {"kind": "commit", **at, "worker": workers[w], "paragraph": done,
                     "segment": spare[w], "into": 1, "tokens": size, "text": text}
                )  # fmt: skip
                copied += size if texts[1] else 0
                texts[1] += moved
                texts[spare[w]] = []
                committed += size
        finishing.clear()
        for w in drawers:
            if random_.random() < extras:
                answer = random_.choice([None, "<b>4</b>"])
                later.append(
                    {"kind": "conclusion", **at, "worker": workers[w], "text": "So it is </p>4.",
                     "answer": answer}
                )  # fmt: skip
        for w in range(len(workers)):
            if ended[w] and not closes[w] and w in writing:
                writing.remove(w)
                if commits:
                    texts[live[w]] = []
                    later.append({"kind": "truncate", **at, "segment": live[w], "length": 0})
        lines.append(
            {"kind": "step", **at, "forward_seconds": 0.03, "sampling_seconds": 0.001, "rows": rows,
             "encoded_tokens": encoded, "committed_tokens": committed,
             "copied_bytes": copied * 46080}
        )  # fmt: skip
        lines += later
        if all(ended):
            break
    lines.append(
        {"kind": "stop", **at, "worker": workers[-1], "reason": "answer", "answer": "<i>12</i>"}
    )
    return lines


@dataclass
class Shown:
    """What a trace says stood where at the end of a step; by worker, but for the history."""

    history: str
    live: list[str]  # with the token that was drawn from this step
    seen: dict[str, str]  # by the writer of that token


def shown(lines: Sequence[Line], step: int) -> Shown:
    """Replays a trace up to a step."""
    replay = trace.Replay(lines[0])
    owner: dict[int, str] = {}
    drawn: dict[str, str] = {}
    seen: dict[str, str] = {}
    for line in lines[1:]:
        if line["step"] > step:
            break
        replay.apply(line)
        if line["kind"] == "step":
            drawn, seen = {}, {}
            owner |= {row["segment"]: row["worker"] for row in line["rows"] if row["worker"]}
        elif line["kind"] in ("token", "end"):
            drawn[line["worker"]] = line["text"] if line["kind"] == "token" else ""
            seen[line["worker"]] = replay.text(replay.sees(line["worker"]))

    def text(segment: int) -> str:
        return "".join(text for _, text in replay.segments[segment])

    live = [
        "".join(text(segment) for segment, name in owner.items() if name == worker)
        + drawn.get(worker, "")
        for worker in lines[0]["workers"]
    ]
    return Shown(text(lines[0]["segments"].index("history")), live, seen)


def write(path: Path, lines: Sequence[Line]) -> Path:
    """As `hogwild run --trace` writes it."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
