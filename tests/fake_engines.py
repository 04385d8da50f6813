"""Engines for benchmarks that other processes can import: a wrong one, and some that fail."""

import os


def wrong(model, x):
    return lambda x: model(x) * 1.1


def nan(model, x):
    return lambda x: model(x) / 0


def failing(model, x):
    raise RuntimeError("no such operator\nand more")


def dying(model, x):
    os._exit(7)


def once(model, x):
    """Fails at its second call."""
    calls = []

    def run(x):
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError("it runs once")
        return model(x)

    return run
