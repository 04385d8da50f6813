"""`python -m depthfuse.native`: build the engine into the package, if it is not there, and say what runs."""

import shutil
import sys

from depthfuse.native.library import BUILT, Missing, build, digest, isa


def main() -> int:
    try:
        folder = BUILT / digest()
        if not folder.exists():
            shutil.rmtree(BUILT, ignore_errors=True)
            build(folder)
        print(f"the native CPU engine runs with {isa()}")
    except Missing as reason:
        print(f"there is no native CPU engine, and all runs as without it: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
