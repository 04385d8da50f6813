"""Measure launch configurations: which of the candidates runs a call's launches fastest on the device at hand.

A call runs once, so that the lookups of its launches are seen (`tuning.session`). Then, launch by launch, each
candidate takes the heuristic's place for that launch alone; those that fail to compile or compute something else are
dropped, the others timed, and the fastest is kept if it beats the heuristic by more than noise. Opt-in: nothing calls
this by itself, `python -m benchmarks.kernels.tune` does.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton

from depthfuse.kernels.tuning.lookup import Entry, Request, known, parse, remember, session
from depthfuse.kernels.tuning.space import candidates

logger = logging.getLogger(__name__)

LEAST_GAIN = 1.03  # below this a difference is noise


def time_us(call: Callable[[], object]) -> float:
    """Median microseconds of a call, by graph replay, so that Python's launching does not count."""
    torch.cuda.synchronize()  # the timer runs on a stream of its own, which waits for nothing
    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")


def agrees(result: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether a result differs from the heuristic's by no more than another order of summation and one rounding do."""
    eps = torch.finfo(reference.dtype).eps
    difference = (result.double() - reference.double()).square().mean().sqrt()
    return bool(difference <= 2 * eps * reference.double().square().mean().sqrt())  # NaN does not agree


def measured(request: Request) -> Entry | None:
    """What is known of a request, unless it is from a simulation."""
    entry = known(request)
    return None if entry is None or entry.simulated else entry


def to_measure(request: Request) -> list[Any]:
    """Configurations to try beside the heuristic's: what a simulation found fastest, then the candidates."""
    entry = known(request)
    first = parse(request.config_type, entry.config) if entry is not None and entry.simulated else None
    return list(dict.fromkeys([*([] if first is None else [first]), *candidates(request)]))


def tune(
    call: Callable[[], torch.Tensor],
    timer: Callable[[Callable[[], object]], float] = time_us,
    again: bool = False,
) -> dict[Request, Entry]:
    """Find and keep the fastest configuration of every launch of `call`.

    Args:
        call: runs an operator and returns its result; the same at every call.
        timer: call -> microseconds.
        again: also measure what is known already.

    Returns:
        What is now known of each launch that looked a configuration up.
    """
    with session() as watch:
        reference = call()
        entries = {}
        for request in list(watch.seen):
            entry = None if again else measured(request)
            if entry is None:
                entry = _measure(call, request, reference, watch.forced, timer)
                remember(request, entry)
            entries[request] = entry
            watch.forced[request] = None if entry.config is None else request.config_type(**entry.config)
    return entries


def compile_candidates(call: Callable[[], torch.Tensor]) -> None:
    """Run every candidate of each launch of `call` that is not known yet, so that it is compiled when `tune` comes.

    Triton keeps what it compiled on disk: several processes may do this at once, each for a share of the calls.
    """
    with session() as watch:
        call()
        for request in list(watch.seen):
            for config in [] if measured(request) else to_measure(request):
                watch.forced[request] = config
                try:
                    call()
                except Exception as error:  # whatever a compiler raises that was asked for too much
                    logger.debug("%s does not run with %s: %s", request.key(), config, error)
            watch.forced[request] = None


def _measure(
    call: Callable[[], torch.Tensor],
    request: Request,
    reference: torch.Tensor,
    forced: dict,
    timer: Callable[[Callable[[], object]], float],
) -> Entry:
    forced[request] = None  # the heuristic
    heuristic_us = timer(call)
    best_us, best = heuristic_us / LEAST_GAIN, None
    for config in to_measure(request):
        forced[request] = config
        # The memory that the next result gets holds none of the last, which a lazy candidate would leave as its own.
        torch.full_like(reference, float("nan"))
        try:
            if not agrees(call(), reference):
                logger.warning("%s computes something else with %s: dropped", request.key(), config)
                continue
            latency_us = timer(call)
        except Exception as error:  # whatever a compiler raises that was asked for too much
            logger.info(
                "%s does not run with %s: %s",
                request.key(),
                config,
                (str(error) or repr(error)).splitlines()[0],
            )
            continue
        if latency_us < best_us:
            best_us, best = latency_us, config
    latency_us = heuristic_us if best is None else best_us
    return Entry(None if best is None else asdict(best), round(latency_us, 3), round(heuristic_us, 3))
