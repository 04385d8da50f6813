"""`python tests/native/sanitize.py [ARGUMENTS OF PYTEST]`: the engine's tests under GCC's sanitizers.

The engine is built once for each, which takes minutes, beside the one that is used. What a sanitizer finds ends the
tests with its report. Leaks are not looked for: Python itself never gives back all of its memory.
"""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# flags, the libraries that must be loaded before all others, settings
SANITIZERS = {
    "address and undefined behaviour": (
        "-g1 -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=1"},
    ),
    # PyTorch and Python are not built for it: only what the engine itself does is judged.
    "threads": (
        "-g1 -O1 -fsanitize=thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 die_after_fork=0"},
    ),
}
LEFT_OUT = (
    "test_inverted_residual.py",  # built by compilers that do not run with these libraries loaded
    "test_machine_code.py",  # reads what the compiler makes without a sanitizer
)
BUILD = """
from depthfuse.native.building import BUILT, NAME, compile_engine, digest, made
made(BUILT / digest() / NAME, compile_engine)
"""


def main() -> int:
    compiler = os.environ.get("CXX", "g++")
    for name, (flags, libraries, settings) in SANITIZERS.items():
        print(f"== {name}", flush=True)
        environment = os.environ | settings | {"DEPTHFUSE_CXXFLAGS": flags}
        subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True)
        found = [
            subprocess.check_output([compiler, f"-print-file-name={library}"], text=True).strip()
            for library in libraries
        ]
        environment["LD_PRELOAD"] = " ".join(found)
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(TESTS),
            *(f"--ignore={TESTS / name}" for name in LEFT_OUT),
            *sys.argv[1:],
        ]
        if code := subprocess.run(tests, env=environment).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
