"""`python -m bminf` is the command `bminf`."""

import sys

from bminf.cli import main

if __name__ == "__main__":
    sys.exit(main())
