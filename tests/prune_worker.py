"""`depthfuse prune` as one of several processes, which says which process it is: prune_worker.py FOLDER FLAGS..."""

import os
import sys
from pathlib import Path

from depthfuse.cli import main

if __name__ == "__main__":
    Path(sys.argv[1], f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    sys.exit(main(["prune", *sys.argv[2:]]))
