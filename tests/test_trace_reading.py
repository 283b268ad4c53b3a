"""What is no trace, or one that cannot be true, is refused, and nothing but that is raised."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hogwild_ext import trace, trace_lines
from hogwild_ext.layouts import LAYOUTS, Combined, Page
from hogwild_ext.pages import PAGE_SIZE
from hogwild_ext.trace_lines import Views
from traces import Line, simulate, write

WORKERS = ("Alice", "Bob", "Carol")


def read(path: Path, lines: Sequence[Line]) -> trace.Trace:
    return trace.read(write(path / "run.jsonl", lines))


def replayed(read: trace.Trace) -> trace.Replay:
    replay = trace.Replay(read.header)
    for line in read.lines:
        replay.apply(line)
    return replay


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """A trace with lines of all kinds."""
    path = tmp_path_factory.mktemp("everything")
    for seed in range(100):
        found = read(path, simulate(seed, WORKERS, steps=40, extras=0.2, version=1))
        if {line["kind"] for line in found.lines} == trace.FIELDS.keys() - {"run"}:
            return [found.header, *found.lines]
    raise AssertionError("no seed gives all kinds")


# ---- two versions --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_versions_say_the_same(tmp_path: Path, seed: int, layout: str) -> None:
    """What every writer saw stands in a trace of version 1; one of version 2 implies it."""
    names = [f"W{i}" for i in range(5)]
    old, new = (simulate(seed, names, layout, 80, extras=0.1, version=v) for v in (1, 2))
    sees = [line["sees"] for line in old if "sees" in line]
    for lines in (old, new):
        kept = read(tmp_path, lines)
        assert kept.header == {**new[0], "version": trace.VERSION}
        assert not any("sees" in line for line in kept.lines)
        for header, told in ((kept.header, kept.lines), (lines[0], lines[1:])):
            replay = trace.Replay(header)  # which takes the lines of a file as they are, too
            seen = []
            for line in told:
                replay.apply(line)
                if line["kind"] in ("token", "end"):
                    seen.append(replay.sees(line["worker"]))
                    assert seen[-1][-1][0] == line.get("segment", seen[-1][-1][0])
            assert seen == sees


def test_a_trace_that_version_1_wrote_is_read() -> None:
    """By the engine of that time, with all kinds of lines."""
    path = Path(__file__).parent / "trace_version_1.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    assert old[0]["version"] == 1
    assert {line["kind"] for line in old} == trace.FIELDS.keys() - {"change", "view"}
    found = trace.read(path)
    replay = trace.Replay(found.header)
    seen = []
    for line in found.lines:
        replay.apply(line)
        if line["kind"] in ("token", "end"):
            seen.append((line["worker"], line["token"], replay.sees(line["worker"])))
    assert seen == [(x["worker"], x["token"], x["sees"]) for x in old if "sees" in x]
    told = [line for line in found.lines if line["kind"] not in ("change", "view")]
    for line, as_told in zip(told, old[1:], strict=True):
        for name in line.keys() - {"rows", "segment"}:
            assert line[name] == as_told[name]


def test_what_is_read_is_as_small_as_version_2_is(tmp_path: Path) -> None:
    """An old file may be large; what is kept of it is not, and is linear in the workers."""
    sizes = {}
    for count in (8, 32):
        names = [f"W{i}" for i in range(count)]
        lines = simulate(1, names, steps=60, words=[" a"], extras=0, version=1)
        kept = read(tmp_path, lines).lines[3 * count :]  # without the first views
        sizes[count] = sum(len(json.dumps(line)) for line in kept)
    assert sum(len(json.dumps(line)) for line in lines) > 3 * sizes[32]
    assert sizes[32] < 4.5 * sizes[8]


@pytest.mark.parametrize("change", ["shorter", "longer", "other", "none", "twice"])
def test_a_view_of_version_1_that_cannot_be_is_refused(tmp_path: Path, change: str) -> None:
    lines = simulate(1, WORKERS, steps=9, version=1)
    sees = [line for line in lines if line["kind"] == "token"][-1]["sees"]
    if change in ("shorter", "longer"):
        sees[0][1] += 1 if change == "longer" else -1
    elif change == "other":
        sees[0][0] = 1000
    elif change == "none":
        sees.clear()
    else:
        sees.append(sees[0])
    with pytest.raises(ValueError, match="line [0-9]+ is broken: step 9|expected segments below"):
        read(tmp_path, lines)


def test_differences_of_views_lead_to_them(seed: int) -> None:
    """For views of all shapes, most workers' changed in the same way."""
    random_ = random.Random(seed)
    names = "ABCDE"
    for _ in range(300):
        views, page = Views(), trace.Replay(header(names, 30))
        shared = random_.sample(range(25), 10)
        for step in range(1, 8):
            for line in step_lines(step):
                page.apply(line)
            if random_.random() < 0.7:  # some come, some go, some change places
                shared = [s for s in shared if random_.random() < 0.8]
                for segment in random_.sample(range(25), 3):
                    if segment not in shared:
                        shared.insert(random_.randint(0, len(shared)), segment)
            if random_.random() < 0.2:
                random_.shuffle(shared)
            for w, name in enumerate(names):
                view = [s for s in shared if (s + w) % 7 or random_.random() < 0.02] + [25 + w]
                at = {"step": step, "time": 0}
                for line in views.told(name, view, at):
                    page.apply(line)
                assert [segment for segment, _ in page.sees(name)] == view


def header(names: Sequence[str], segments: int) -> Line:
    return {
        **simulate(1, steps=1)[0],
        "workers": list(names),
        "segments": [f"segment {i}" for i in range(segments)],
    }


def step_lines(step: int, **changes: Any) -> list[Line]:
    counters = dict.fromkeys(("encoded_tokens", "committed_tokens", "copied_bytes"), 0)
    seconds = dict.fromkeys(("time", "forward_seconds", "sampling_seconds"), 0.5)
    return [{"kind": "step", "step": step, "rows": [], **counters, **seconds, **changes}]


def test_one_change_says_it_of_all_workers() -> None:
    """Whoever finishes a paragraph, alone or with others, or ends."""
    names = [f"W{i}" for i in range(5)]
    page: Any = Page(0, 1, 2, 3, [10, 11, 12, 13, 14], [20, 21, 22, 23, 24], list(range(5)))
    views, step = Views(), 0

    def told() -> list[str]:
        nonlocal step
        step += 1
        at = {"step": step, "time": 0}
        seen = [(names[w], Combined().view(page, w)) for w in page.writing]
        return [line["kind"] for name, view in seen for line in views.told(name, view, at)]

    assert told() == ["view"] * 5
    assert told() == []
    for finished in ([0], [1], [4], [1, 3], [0, 1, 2, 3, 4]):
        for w in finished:
            page.finishing.append(page.live[w])
            page.live[w] = page.live[w] + 30 if page.live[w] < 30 else page.live[w] - 30
        assert told() == ["change"]  # to read it behind the history, and to write elsewhere
        page.finishing.clear()
        assert told() == ["change"]  # it has joined the history
    page.finishing.append(page.live[2])
    page.writing.remove(2)
    assert told() == ["change"]
    page.finishing.clear()
    assert told() == ["change"]
    page.writing.remove(4)
    assert told() == ["change"]


def test_not_every_difference_is_one_of_places() -> None:
    difference = trace_lines.difference
    assert difference([1, 2], [3, 1, 2]) is None  # in front of all: in no segment's place
    assert difference([], [1]) is None
    assert difference([1, 2], [1, 2]) == {}
    assert difference([1, 2, 3, 4], [1, 5, 4]) == {2: [], 3: [5]}
    assert difference([1, 2, 3], [2, 3, 1]) == {1: [], 3: [3, 1]}


def test_what_is_new_to_one_worker_alone_is_told_of_it_alone() -> None:
    views = Views()
    seen = {"A": [0, 1], "B": [0, 2], "C": [0, 3]}
    for name, view in seen.items():
        assert [line["kind"] for line in views.told(name, view, {"step": 1})] == ["view"]
    seen |= {"B": [0, 4, 2], "C": [5, 3]}
    told = [line for name, view in seen.items() for line in views.told(name, view, {"step": 2})]
    assert [(line["kind"], line.get("worker")) for line in told] == [
        ("change", None),
        ("view", "C"),
    ]
    told = [line for name, view in seen.items() for line in views.told(name, view, {"step": 3})]
    assert [(line["kind"], line.get("worker")) for line in told] == [
        ("change", None), ("view", "B"),
    ]  # fmt: skip
    assert [
        line for name, view in seen.items() for line in views.told(name, view, {"step": 4})
    ] == []


# ---- what is refused -----------------------------------------------------------------------------


def test_a_trace_that_was_cut_off_has_what_is_there(tmp_path: Path, everything: list[Line]) -> None:
    """At whatever byte of its last lines."""
    path = write(tmp_path / "run.jsonl", everything)
    content = path.read_bytes()
    starts = [0]
    for line in everything:
        starts.append(starts[-1] + len(json.dumps(line)) + 1)
    for end in random.sample(range(starts[1], len(content)), 100):
        path.write_bytes(content[:end])
        found = trace.read(path)
        whole = sum(start - 1 <= end for start in starts[1:])
        assert found.lines == everything[1:whole] and not found.is_complete


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n", b"hello", b"hello\n", b"[]\n", b"1\n", b"null\n", b"{}\n", b'{"kind": 1}\n',
        b"\x89PNG\r\n\x1a\n", bytes(range(256)) * 9, b"\0" * 99, b"\xff\xfe", b"[" * 100_000,
        b'{"kind":' * 100_000, b'{"kind": "run"}', b'{"kind": "run", "version": 2}\n',
        b'{"kind": "run", "version": ' + b"[" * 900 + b"]" * 900 + b"}\n",
        b'{"kind": "run", "version": ' + b"9" * 5000 + b"}\n",
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        trace.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp037"])
def test_other_encodings_are_refused(tmp_path: Path, everything: list[Line], encoding: str) -> None:
    text = "".join(json.dumps(line) + "\n" for line in everything)
    (tmp_path / "run.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="expected a trace of hogwild run --trace"):
        trace.read(tmp_path / "run.jsonl")


@pytest.mark.parametrize("version", [0, 3, 2**70, -1, None, True, 1.0, "2", [2], {}])
def test_other_versions_are_refused(
    tmp_path: Path, everything: list[Line], version: object
) -> None:
    with pytest.raises(ValueError, match="version"):
        read(tmp_path, [{**everything[0], "version": version}, *everything[1:]])


@pytest.mark.parametrize("kind", sorted(trace.FIELDS))
def test_lines_that_lack_something_are_refused(
    tmp_path: Path, everything: list[Line], kind: str
) -> None:
    number, line = next((n, x) for n, x in enumerate(everything, 1) if x["kind"] == kind)
    assert trace.FIELDS[kind] <= line.keys()
    for lacking in trace.FIELDS[kind]:
        bad = {key: value for key, value in line.items() if key != lacking}
        where = "version" if lacking == "version" else f"{kind} without {lacking}$"
        with pytest.raises(ValueError, match=where) as error:
            read(tmp_path, [bad if x is line else x for x in everything])
        assert number == 1 or f"line {number} is broken" in str(error.value)


WRONG: list[Any] = [
    None, True, -1, 1.5, 2**53, 10**400, float("nan"), float("inf"), "", "x", [], [[]], [None],
    ["a", "a"], [-1], ["x"], [[0, -1]], [[0, [0.5]]], {}, {"a": 1}, [{}], [{"worker": 1}],
]  # fmt: skip


# What of that a field may hold as far as its type goes.
ALLOWED = {
    trace_lines.COUNT: [], trace_lines.SEED: [2**53], trace_lines.SECONDS: [1.5],
    trace_lines.TEXT: ["", "x"], trace_lines.MAYBE_TEXT: [None, "", "x"],
    trace_lines.NAMES: [["x"]], trace_lines.COUNTS: [[]], trace_lines.ROWS: [[]],
    trace_lines.PLACES: [[]],
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(trace.FIELDS))
def test_fields_of_wrong_types_are_refused(
    tmp_path: Path, everything: list[Line], kind: str
) -> None:
    """Every field with everything that it might hold."""
    at, line = next((n, x) for n, x in enumerate(everything) if x["kind"] == kind)
    for name, type_ in trace_lines.TYPES[kind].items():
        for value in WRONG:
            is_refused = refuses(tmp_path, [*everything[:at], {**line, name: value}])
            is_allowed = any(value is x or value == x for x in ALLOWED[type_])
            assert is_refused or is_allowed, (name, value)


def refuses(path: Path, lines: Sequence[Line]) -> bool:
    """Whether it is. Raises what is raised, but for what is promised."""
    try:
        found = read(path, lines)
    except ValueError:
        return True
    replayed(found)  # nothing that is read is refused afterwards
    return False


def test_any_other_line_raises_nothing_else(
    tmp_path: Path, everything: list[Line], seed: int
) -> None:
    """Whole traces with something wrong in one place: values, fields, lines, bytes."""
    random_ = random.Random(seed)
    refused = 0
    for _ in range(400):
        lines = copy.deepcopy(everything[: random_.randint(2, len(everything))])
        random_.choice(CHANGES)(random_, lines)
        refused += refuses(tmp_path, lines)
    assert refused > 200


def test_any_other_bytes_raise_nothing_else(
    tmp_path: Path, everything: list[Line], seed: int
) -> None:
    random_ = random.Random(seed)
    path = write(tmp_path / "run.jsonl", everything[:40])
    content = path.read_bytes()
    for _ in range(300):
        start = random_.randrange(len(content))
        end = start + random_.choice([0, 1, 1, 1, 50])
        new = random_.choice([b"", b"\0", b'"', b"9", b"\n", b"[", b"}", b"\xff", b"\xe2\x80\xa8"])
        path.write_bytes(content[:start] + new + content[end:])
        with contextlib.suppress(ValueError):
            replayed(trace.read(path))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers of a value with the keys of what they hold."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_value(random_: random.Random, lines: list[Line]) -> None:
    container, key = random_.choice(list(places(random_.choice(lines))))
    old = container[key]
    near = [old + 1, old - 1, -old, old * 10**6, str(old)] if isinstance(old, (int, float)) else []
    container[key] = copy.deepcopy(
        random_.choice([*near, random_.choice(WRONG), {old_key(old): 1}])
    )


def old_key(value: Any) -> str:
    return str(value)[:20]


def drop_value(random_: random.Random, lines: list[Line]) -> None:
    container, key = random_.choice(list(places(random_.choice(lines))))
    del container[key]


def double_value(random_: random.Random, lines: list[Line]) -> None:
    lists = [c[k] for c, k in places(random_.choice(lines)) if isinstance(c[k], list) and c[k]]
    for found in lists[:1]:
        found.append(random_.choice(found))


def take_value(random_: random.Random, lines: list[Line]) -> None:
    """From another line, where it has the right type."""
    one, other = random_.choice(lines), random_.choice(lines)
    for name in sorted((one.keys() & other.keys()) - {"kind"})[:1] or ["step"]:
        one[name] = copy.deepcopy(other.get(name))


def drop_line(random_: random.Random, lines: list[Line]) -> None:
    del lines[random_.randrange(len(lines))]


def double_line(random_: random.Random, lines: list[Line]) -> None:
    lines.insert(random_.randint(1, len(lines)), random_.choice(lines))


def swap_lines(random_: random.Random, lines: list[Line]) -> None:
    i, j = (random_.randrange(len(lines)) for _ in range(2))
    lines[i], lines[j] = lines[j], lines[i]


CHANGES: list[Callable[[random.Random, list[Line]], None]] = [
    change_value, change_value, change_value, drop_value, double_value, take_value, drop_line,
    double_line, swap_lines,
]  # fmt: skip


# ---- what cannot be true -------------------------------------------------------------------------


def first(lines: Sequence[Line], kind: str, at: int = 0) -> Line:
    return [line for line in lines if line["kind"] == kind][at]


def change_of(change: str, lines: list[Line]) -> None:
    """A lie in a trace of lines of all kinds."""
    step, token, commit = (first(lines, kind) for kind in ("step", "token", "commit"))
    if change == "encoded":
        step["rows"][0]["tokens"].append(5)
    elif change == "committed":
        commit["tokens"] += 1
    elif change == "counted":
        first(lines, "step", -1)["committed_tokens"] += 1
    elif change == "copied less":
        next(x for x in lines if x.get("copied_bytes"))["copied_bytes"] -= 1
    elif change == "no such segment":
        commit["segment"] = 1000
    elif change == "no such target":
        commit["into"] = 1000
    elif change == "into itself":
        commit["into"] = commit["segment"]
    elif change == "no such worker":
        token["worker"] = "Nobody"
    elif change == "no such row's worker":
        step["rows"][0]["worker"] = "Nobody"
    elif change == "no such row's segment":
        step["rows"][0]["segment"] = 1000
    elif change == "no such segment in a view":
        first(lines, "view")["segments"].insert(0, 1000)
    elif change == "a segment twice in a view":
        first(lines, "view")["segments"].insert(0, 0)
    elif change == "no such segment in a change":
        first(lines, "change")["places"].append([0, [1000]])
    elif change == "another segment than the view's last":
        token["segment"] = 0
    elif change == "a step twice":
        first(lines, "step", 2)["step"] = 2
    elif change == "a step left out":
        lines.remove(first(lines, "step", 3))
    elif change == "of another step":
        token["step"] += 1
    elif change == "a token twice":
        lines.insert(lines.index(token), token)
    elif change == "a token behind an end":
        end = first(lines, "end")
        lines.insert(lines.index(end) + 1, {**end, "kind": "token"})
    elif change == "before the first step":
        lines.insert(1, {**first(lines, "start"), "step": 0})
    elif change == "a second first line":
        lines.insert(5, lines[0])
    elif change == "behind the end":
        lines.append({**lines[-1]})
    elif change == "cut where no piece ends":
        lines.insert(lines.index(step) + 1, {
            "kind": "truncate", "step": 1, "time": 0, "segment": 0, "length": 3,
        })  # fmt: skip
    else:
        assert change == "cut behind its end"
        first(lines, "truncate")["length"] = 10**6


LIES = {
    "encoded": "tokens were encoded, [0-9]+ were appended",
    "committed": "tokens were committed, [0-9]+ were there",
    "counted": "tokens were committed, [0-9]+ were moved",
    "copied less": "bytes were copied",
    "no such segment": "expected segments below",
    "no such target": "expected segments below",
    "into itself": "committed into itself",
    "no such worker": "expected a worker of the run, got 'Nobody'",
    "no such row's worker": "expected a worker of the run, got 'Nobody'",
    "no such row's segment": "expected segments below",
    "no such segment in a view": "expected segments below",
    "a segment twice in a view": "expected each segment of a view once",
    "no such segment in a change": "expected segments below",
    "another segment than the view's last": "expected a view of .* that ends with segment 0",
    "a step twice": "expected step of step 3, got one of 2",
    "a step left out": "expected start|token of step 3|expected step of step",
    "of another step": "expected token of step 1, got one of 2",
    "a token twice": "chose a second token",
    "a token behind an end": "chose a second token or had ended",
    "before the first step": "expected the first step, got start",
    "a second first line": "of a run that goes on, got another one: run",
    "behind the end": "of a run that goes on, got another one: stop",
    "cut where no piece ends": "at which a piece ends",
    "cut behind its end": "at which a piece ends",
}


@pytest.mark.parametrize("change", LIES)
def test_a_trace_that_cannot_be_true_is_refused(
    tmp_path: Path, everything: list[Line], change: str
) -> None:
    lines = copy.deepcopy(everything)
    assert not refuses(tmp_path, lines)
    change_of(change, lines)
    with pytest.raises(ValueError, match=r"line \d+ is broken: .*" + LIES[change]):
        read(tmp_path, lines)
    replay = trace.Replay(lines[0])
    with pytest.raises(ValueError, match=LIES[change]):
        for line in lines[1:]:
            replay.apply(line)


def test_forks_copy_a_page_for_each_conclusion_at_most(everything: list[Line]) -> None:
    size, concluded = everything[0]["bytes_per_token"], 0
    assert size > 0
    for number, line in enumerate(everything):
        if line["kind"] == "step" and concluded in (0, 1, 2):
            allowed = line["copied_bytes"] + concluded * PAGE_SIZE * size
            for more, is_refused in ((0, False), (1, True)):
                replay = trace.Replay(everything[0])
                for before in everything[1:number]:
                    replay.apply(before)
                replay.apply({**line, "copied_bytes": allowed + more})
                for each in everything[number + 1 :]:
                    if each["kind"] in ("step", "stop"):
                        break
                    replay.apply(each)
                stop = {**everything[-1], "step": line["step"]}
                if is_refused:
                    with pytest.raises(ValueError, match=f"with {concluded} conclusions"):
                        replay.apply(stop)
                else:
                    replay.apply(stop)
        concluded += line["kind"] == "conclusion"
    assert concluded > 2


@pytest.mark.parametrize(
    "line",
    [
        None, 1, "step", [], {}, {"kind": []}, {"kind": None}, {"kind": "run"},
        {"kind": "commit", "segment": 7, "into": 0, "tokens": 1, "step": 1},
        {"kind": "token", "worker": [], "token": 1}, {"kind": "step", "rows": 1},
    ],
)  # fmt: skip
def test_a_replay_takes_lines_and_nothing_else(line: Any) -> None:
    for version in (1, 2):
        replay = trace.Replay(simulate(1, steps=1, version=version)[0])
        with pytest.raises(ValueError):
            replay.apply(line)
        replay.apply({"kind": "weather", "whatever": [1]})
        with pytest.raises(ValueError, match="view"):
            replay.sees("Alice")
        with pytest.raises(ValueError, match="segments below"):
            replay.text([[1000, 0]])
    for header in (None, [], {}, {"kind": "run"}, {"kind": "step", "version": 2}):
        with pytest.raises(ValueError):
            trace.Replay(header)  # type: ignore[arg-type]


def test_a_view_that_doubles_with_every_change_does_not_grow() -> None:
    replay = trace.Replay(header("A", 3))
    at = {"step": 1, "time": 0}
    for line in step_lines(1):
        replay.apply(line)
    replay.apply({"kind": "view", **at, "worker": "A", "segments": [0, 1]})
    for _ in range(16):  # 65,000 segments, were it to grow
        replay.apply({"kind": "change", **at, "places": [[0, [0, 0]]]})
    with pytest.raises(ValueError, match="view"):
        replay.sees("A")
