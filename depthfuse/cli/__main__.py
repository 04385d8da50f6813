"""`python -m depthfuse.cli`, as torchrun starts it."""

import sys

from depthfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
