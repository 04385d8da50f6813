"""`python -m depthfuse.native`: build the engine into the package, if it is not there, and say what runs."""

import shutil
import sys

from depthfuse.native.building import BUILT, NAME, Missing, compile_engine, digest, made
from depthfuse.native.library import in_words


def main() -> int:
    try:
        target = BUILT / digest() / NAME
        if not target.exists():
            shutil.rmtree(BUILT, ignore_errors=True)
            made(target, compile_engine)
    except Missing:
        pass  # which the next line says
    print(f"native CPU engine: {in_words()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
