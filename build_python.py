"""Whether this Python can build the package. Written so that any Python 3 can read it: an old one
gets to see a build backend before pip has looked at what the package requires."""

import os
import re
import sys


def check():  # type: ignore[no-untyped-def]
    """Ends the build if Python is older than pyproject.toml asks for."""
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "pyproject.toml"), encoding="utf-8") as file:
        oldest = re.search(r'requires-python = ">=(\d+)\.(\d+)"', file.read())
    assert oldest is not None
    if sys.version_info[:2] < (int(oldest.group(1)), int(oldest.group(2))):
        raise SystemExit(
            "\n\nhogwild_ext needs Python {}.{} or newer, and this is {}.{} ({}). With a newer "
            "one, type: python3 -m venv .venv && .venv/bin/pip install .\n".format(
                oldest.group(1), oldest.group(2), *sys.version_info[:2], sys.executable
            )
        )
