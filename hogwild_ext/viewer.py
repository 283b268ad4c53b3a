"""A page to look at a run: `hogwild view` makes one HTML file of a trace.

The page is `viewer.html` with the trace in it. It loads nothing from anywhere, and all that a model
wrote gets into it as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources

from .trace import Trace

# What each kind of line has to hold; lines of other kinds are left out of the page.
_FIELDS = {
    "run": {"problem", "layout", "workers", "seed", "max_steps", "segments", "model"},
    "step": {"step", "time", "rows", "encoded_tokens", "committed_tokens", "copied_bytes"},
    "commit": {"step", "worker", "paragraph", "segment", "into"},
    "truncate": {"step", "segment", "length"},
    "start": {"step", "worker", "paragraph"},
    "question": {"step", "worker", "text"},
    "token": {"step", "worker", "paragraph", "token", "text", "sees"},
    "end": {"step", "worker", "paragraph", "token", "sees"},
    "conclusion": {"step", "worker", "text", "answer"},
    "stop": {"step", "worker", "reason", "answer"},
}


def page(read: Trace) -> str:
    """The HTML page of a trace. Of a run that was cut off it shows what there is.

    Raises ValueError for a line without what the page needs.
    """
    _check(read)
    template = resources.files(__package__).joinpath("viewer.html").read_text("utf-8")
    data = json.dumps(
        [read.header, *(line for line in read.lines if line["kind"] in _FIELDS)],
        allow_nan=False,
        separators=(",", ":"),
    )
    # Within JSON these stand in strings only. Without them there is nothing that HTML could read as
    # the end of the script or a comment; json.dumps has escaped all that is not ASCII.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    # In one pass, so that nothing within the trace is taken for a place to fill in.
    values = {"{policy}": _policy(template), "{trace}": data}
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], template)


def _policy(template: str) -> str:
    """Allows the template's own script and style, by their digests, and no network."""

    def digest(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _check(read: Trace) -> None:
    """Raises ValueError for a line without what the page needs."""
    for number, line in enumerate([read.header, *read.lines], start=1):
        kind = line["kind"]
        if lacking := sorted(_FIELDS.get(kind, set()) - line.keys()):
            raise ValueError(f"line {number}, {kind}: expected {', '.join(lacking)}, got none")
