"""A page to look at a run: `hogwild view` makes one HTML file of a trace.

The page is `viewer.html` with the trace in it. It loads nothing from anywhere, and all that a model
wrote gets into it as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from importlib import resources
from pathlib import Path

from .trace import FIELDS, Trace


def page(read: Trace) -> str:
    """The HTML page of a trace. Of a run that was cut off it shows what there is."""
    # As text: to JavaScript all numbers are floats.
    header = {**read.header, "seed": str(read.header["seed"])}
    template = resources.files(__package__).joinpath("viewer.html").read_text("utf-8")
    # What is known and nothing else: of that it is sure what it holds.
    known = [
        {name: value for name, value in line.items() if name == "kind" or name in fields}
        for line in [header, *read.lines]
        if (fields := FIELDS.get(line["kind"])) is not None
    ]
    data = json.dumps(known, allow_nan=False, separators=(",", ":"))
    # Within JSON these stand in strings only. Without them there is nothing that HTML could read as
    # the end of the script or a comment; json.dumps has escaped all that is not ASCII.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    # In one pass, so that nothing within the trace is taken for a place to fill in.
    values = {"{policy}": _policy(template), "{trace}": data}
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], template)


def write(path: Path, text: str) -> None:
    """Writes a page; the file has its old content or all of the new, whatever happens meanwhile.

    Raises OSError. What is no regular file, such as /dev/stdout, is written as it is.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    path = path.resolve()  # a link stays one
    unfinished = path.with_name(f".hogwild-{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        if path.exists():
            unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
