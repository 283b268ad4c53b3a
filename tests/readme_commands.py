"""Prints a command of the README, so that scripts run what the README says, word for word.

    python tests/readme_commands.py torch|run|test

A command is the first code block after the line `<!-- command: NAME -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def readme_command(name: str) -> str:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    found = re.search(rf"<!-- command: {name} -->\s*```bash\n(.*?)```", readme, re.DOTALL)
    if found is None:
        raise SystemExit(f"README.md has no command {name!r}")
    return found[1]


if __name__ == "__main__":
    print(readme_command(sys.argv[1]), end="")
