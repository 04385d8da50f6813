"""How long PyTorch's threads spin for more work after each operation, on cores that the native engine wants next.

GNU's OpenMP, which PyTorch's wheels have, spins for some 5 ms. A call of the native engine right after an operation of
PyTorch (a normalisation, say) then shares its cores with that, and takes 1.4 times as long. A fifth of a millisecond is
enough for PyTorch itself: its operations follow each other faster.
"""

import os
import sys

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_ROUNDS = "10000"  # 0.2 ms; OpenMP's own number is 300,000


def shorten() -> None:
    """Unless the user has chosen. OpenMP reads it once, when torch is first imported."""
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = _ROUNDS


def in_words() -> str:
    chosen = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return ", ".join(chosen) or (
        "threads spin for some 5 ms after each operation of PyTorch, and slow down the native engine's calls then: "
        f"import depthfuse before torch, or set GOMP_SPINCOUNT={_ROUNDS}"
    )
