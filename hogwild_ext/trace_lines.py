"""The lines of a trace: what each kind has, and what workers see as differences.

`docs/trace.md` tells what the fields mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from . import checks

Line = dict[str, Any]

# ---- what they have -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Type:
    """What a field may hold: in words, and as a check, which must not raise anything."""

    words: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53  # beyond that JavaScript rounds


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _pair_of(*holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(holds)
        and all(check(item) for check, item in zip(holds, value, strict=True))
    )


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and all(
        name in value and type_.holds(value[name]) for name, type_ in ROW.items()
    )


def _are_names(value: Any) -> bool:
    return _list_of(_is_text)(value) and 0 < len(value) == len(set(value))


COUNT = Type("an integer from 0 to 2**53 - 1", _is_count)
SEED = Type("an integer from 0 to 2**63 - 1", lambda x: type(x) is int and 0 <= x < 2**63)
SECONDS = Type("a number, not negative", lambda x: type(x) in (int, float) and 0 <= x < 2**53)
TEXT = Type("a text", _is_text)
MAYBE_TEXT = Type("a text or null", lambda x: x is None or _is_text(x))
NAMES = Type("a list of different names, at least one", _are_names)
COUNTS = Type("a list of integers, not negative", _list_of(_is_count))
ROW = {"worker": MAYBE_TEXT, "segment": COUNT, "tokens": COUNTS, "text": TEXT}
ROWS = Type(f"a list of objects with {', '.join(ROW)}", _list_of(_is_row))
PLACES = Type(
    "a list of [segment, list of segments]", _list_of(_pair_of(_is_count, _list_of(_is_count)))
)
SEEN = Type("a list of [segment, tokens]", _list_of(_pair_of(_is_count, _is_count)))

_AT = {"step": COUNT, "time": SECONDS}
_BY = {**_AT, "worker": TEXT, "paragraph": COUNT, "text": TEXT}

# What each kind of line has, beside its kind; docs/trace.md tells what it means.
TYPES: dict[str, dict[str, Type]] = {
    "run": {
        "version": COUNT, "hogwild_ext": TEXT, "model": MAYBE_TEXT, "problem": TEXT,
        "layout": TEXT, "workers": NAMES, "seed": SEED, "max_steps": COUNT, "segments": NAMES,
        "bytes_per_token": COUNT,
    },
    "step": {
        **_AT, "rows": ROWS, "encoded_tokens": COUNT, "committed_tokens": COUNT,
        "copied_bytes": COUNT, "forward_seconds": SECONDS, "sampling_seconds": SECONDS,
    },
    "start": _BY,
    "question": _BY,
    "change": {**_AT, "places": PLACES},
    "view": {**_AT, "worker": TEXT, "segments": COUNTS},
    "token": {**_BY, "token": COUNT, "segment": COUNT},
    "end": {**_BY, "token": COUNT, "segment": COUNT},
    "commit": {**_BY, "segment": COUNT, "into": COUNT, "tokens": COUNT},
    "conclusion": {**_AT, "worker": TEXT, "text": TEXT, "answer": MAYBE_TEXT},
    "truncate": {**_AT, "segment": COUNT, "length": COUNT},
    "stop": {**_AT, "worker": MAYBE_TEXT, "reason": TEXT, "answer": MAYBE_TEXT},
}  # fmt: skip
FIELDS = {kind: types.keys() for kind, types in TYPES.items()}
TYPES_1 = {
    **TYPES,
    "token": {**_BY, "token": COUNT, "sees": SEEN},
    "end": {**_BY, "token": COUNT, "sees": SEEN},
}


def check(line: Any, kinds: Mapping[str, Mapping[str, Type]]) -> None:
    """Raises ValueError for what is no line, or lacks a field, or has a wrong one."""
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise ValueError("expected an object with a kind")
    kind, types = line["kind"], kinds.get(line["kind"], {})
    if lacking := sorted(types.keys() - line.keys()):
        raise ValueError(f"{kind} without {', '.join(lacking)}")
    for name, type_ in types.items():
        if not type_.holds(line[name]):
            raise ValueError(
                f"{kind}: expected {name} to be {type_.words}, got {described(line[name])}"
            )


def described(value: Any) -> str:
    return "an object" if isinstance(value, dict) else checks.describe(value)


# ---- what workers see, as differences ------------------------------------------------------------

Places = Mapping[int, Sequence[int]]  # what stands in a view where one segment stood
ViewsByWorker = dict[str, Sequence[int]]


def changed(views: ViewsByWorker, places: Places) -> ViewsByWorker:
    """All views after a change of places; a segment that is not named stays.

    A view that would then have a segment twice is not there any more. It was not meant, and is
    told whole before it matters.
    """
    after = {
        worker: [segment for old in view for segment in places.get(old, (old,))]
        for worker, view in views.items()
    }
    return {worker: view for worker, view in after.items() if len(set(view)) == len(view)}


def difference(before: Sequence[int], after: Sequence[int]) -> dict[int, list[int]] | None:
    """The change of places that leads from one view to another; None if there is none.

    Named by segments and not by positions, so that it says the same of every worker's view: what
    is new stands where the last of those stood that went away there, or else behind the one that
    stayed.
    """
    places: dict[int, list[int]] = {}
    for what, i, j, k, m in SequenceMatcher(None, before, after, False).get_opcodes():
        if what in ("delete", "replace"):
            places.update((segment, []) for segment in before[i:j])
            places[before[j - 1]] = list(after[k:m])
        elif what == "insert":
            if i == 0:
                return None
            places[before[i - 1]] = [before[i - 1], *after[k:m]]
    return places


class Views:
    """What all workers see, and how to say what became of it."""

    def __init__(self) -> None:
        self._views: ViewsByWorker = {}  # as a reader knows them
        self._changed_in = 0  # step

    def told(self, worker: str, view: list[int], at: Line) -> Iterator[Line]:
        """Lines that tell a reader what the worker sees; none if that is known.

        As a rule one change says it of all workers. Whose view it does not fit gets it whole.
        """
        before = self._views.get(worker)
        if before is not None and before != view and self._changed_in < at["step"]:
            places = difference(before, view)
            if places is not None:
                self._changed_in = at["step"]
                self._views = changed(self._views, places)
                yield {"kind": "change", **at, "places": [list(item) for item in places.items()]}
        if self._views.get(worker) != view:
            self._views[worker] = view
            yield {"kind": "view", **at, "worker": worker, "segments": view}
