"""`python -m hogwild_ext` is the command `hogwild`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
