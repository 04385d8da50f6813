"""`python -m depthfuse`: the command line."""

import sys

from depthfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
