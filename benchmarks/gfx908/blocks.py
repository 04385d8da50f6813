"""How many blocks of a network must be merged for a speed-up, by simulated times of its launches."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.kernels.registry import layers

Times = dict[tuple[str, str, str, str], float]  # (operator, shape, batch, dtype) -> microseconds


@dataclass(frozen=True)
class Merged:
    """blocks: merged, those that save most first. of: all that save something. speedup: of the whole network."""

    blocks: int
    of: int
    speedup: float


def times_of(rows: list[dict]) -> Times:
    """Of rows of a CSV of `times`."""
    return {(r["op"], r["shape"], r["batch"], r["dtype"]): float(r["simulated_us"]) for r in rows}


def is_known(network: str, batch: int, dtype: str, times: Times) -> bool:
    """Whether there are times of all layers."""
    return all(
        (case.op, case.shape(), str(batch), dtype) in times
        for merged in (False, True)
        for case in layers(network, merged, batch).values()
    )


def savings(network: str, batch: int, dtype: str, times: Times) -> tuple[float, list[float]]:
    """(the plain network's time, what merging each block saves, most first), in microseconds; of what saves."""

    def by_layer(merged: bool) -> dict[str, float]:
        cases = layers(network, merged, batch)
        return {name: times[case.op, case.shape(), str(batch), dtype] for name, case in cases.items()}

    plain, merged = by_layer(False), by_layer(True)
    # A block's layers are named after it, whichever it is made of.
    changed = {name for name in plain.keys() | merged.keys() if plain.get(name) != merged.get(name)}
    blocks = {_block_of(name) for name in changed}
    saved = [
        sum(t for name, t in plain.items() if _block_of(name) == block)
        - sum(t for name, t in merged.items() if _block_of(name) == block)
        for block in blocks
    ]
    return sum(plain.values()), sorted((s for s in saved if s > 0), reverse=True)


def _block_of(layer: str) -> str:
    """ "layer1.0.conv1" -> "layer1.0", "stages.2.blocks.3.mlp.fc1" -> "stages.2.blocks.3": up to the last number of the
    leading ones that number blocks."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else layer


def merged_for(network: str, batch: int, dtype: str, times: Times, speedup: float) -> Merged:
    """The fewest blocks; all of them where that is not enough."""
    whole_us, saved = savings(network, batch, dtype, times)
    left_us, blocks = whole_us, 0
    for each in saved:
        if whole_us / left_us >= speedup:
            break
        left_us -= each
        blocks += 1
    return Merged(blocks, len(saved), whole_us / left_us)


def table(rows: list[dict], speedup: float = 1.26) -> str:
    """Markdown: the networks, batches and dtypes of a CSV of `times`, but for those of which layers are missing."""
    times = times_of(rows)
    lines = [
        f"| network | batch | dtype | blocks merged for {speedup:g}x | speed-up then |",
        "|---|---|---|---|---|",
    ]
    for network, batch, dtype in dict.fromkeys((r["network"], r["batch"], r["dtype"]) for r in rows):
        if not is_known(network, int(batch), dtype, times):
            continue
        found = merged_for(network, int(batch), dtype, times, speedup)
        lines.append(
            f"| {network} | {batch} | {dtype} | {found.blocks} of {found.of} | {found.speedup:.2f} |"
        )
    return "\n".join(lines) + "\n"
