"""Which blocks of many nets can be made shallower, and the merged twin of each net compared with it in float64.

    python -m benchmarks.zoo.blocks                        # all, into benchmarks/results/blocks.csv and blocks.md
    python -m benchmarks.zoo.blocks --only torchvision     # those whose names have that in them

For each net: how many blocks were found, how many can be pruned, what stands in the way of the others, and the largest
relative error of a twin with every block merged by its default candidate, block by block and at the output, on random
images in float64 (`depthfuse.merge`). A second call goes on where the first one was stopped. Exit status 1 where a twin
differs by more than 1e-10.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

from benchmarks.zoo.nets import ZOO, Net
from benchmarks.zoo.rows import RESULTS, read, write
from depthfuse.benching.bench import machine
from depthfuse.errors import DepthfuseError
from depthfuse.merging.adapters import find_blocks
from depthfuse.merging.merge import LARGEST_ERROR, merge
from depthfuse.merging.supernet import Supernet

COLUMNS = ("library", "kind", "net", "blocks", "prunable", "error", "classes", "candidates", "reasons")


def row_of(net: Net) -> dict[str, object]:
    """What is found in one net, and its merged twin's error."""
    model, image = net.build()
    from timm.utils import reparameterize_model  # after depthfuse, which makes torchvision importable

    model = reparameterize_model(model)  # RepVGG, MobileOne and others: what they deploy
    infos = find_blocks(model)
    prunable = [info for info in infos if info.candidates]
    row: dict[str, object] = {
        "library": net.library,
        "kind": net.kind,
        "net": net.name,
        "blocks": len(infos),
        "prunable": len(prunable),
        "error": "",
        "classes": _counted(info.block_type for info in prunable),
        "candidates": _counted(candidate.name for info in prunable for candidate in info.candidates),
        "reasons": _counted(info.reason for info in infos if not info.candidates),
    }
    if not prunable:
        return row
    supernet = Supernet(model).eval()
    supernet.set_choices({path: names[0] for path, names in supernet.options().items()})
    try:
        report = merge(supernet, tuple(image.shape[1:])).merge_report
        errors = [max(block.border, block.interior) for block in report.blocks]
        row["error"] = max(report.output, *errors)
    except DepthfuseError as problem:
        row["error"] = f"failed: {str(problem).splitlines()[0][:150]}"
    return row


def _counted(words) -> str:
    return "; ".join(f"{count} x {word}" for word, count in Counter(words).most_common(4))


def table(rows: list[dict[str, str]]) -> str:
    """The rows as Markdown, with a summary."""
    facts = machine(torch.device("cpu"))
    twins = [row for row in rows if _is_exact(row)]
    lines = [
        "# Blocks of many nets",
        "",
        f"Written by `python -m benchmarks.zoo.blocks`: torch {facts['torch']}, timm {facts['timm']}, random weights. "
        "Error: of the net with every prunable block merged by its default candidate against the pruned net, the "
        "largest of any block and of the output, relative, in float64. Branches that are one convolution after "
        "training (RepVGG, MobileOne) are made one first, by `timm.utils.reparameterize_model`.",
        "",
        f"**{len(rows)} nets, {sum(int(row['prunable']) > 0 for row in rows)} with blocks that can be pruned, "
        f"{len(twins)} merged twins within {LARGEST_ERROR:.0e}.**",
        "",
        "| net | blocks | prunable | candidates | error | what stands in the way of the others |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["net"] if row["library"] == "timm" else f"{row['library']}: {row['net']}"
        error = f"{float(row['error']):.0e}" if _is_exact(row) else row["error"]
        reasons = row["reasons"].replace("|", "/")
        lines.append(
            f"| {name} | {row['blocks']} | {row['prunable']} | {row['candidates']} | {error} | {reasons} |"
        )
    return "\n".join(lines) + "\n"


def _is_exact(row: dict[str, str]) -> bool:
    try:
        return float(row["error"]) <= LARGEST_ERROR
    except ValueError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="nets whose names hold one of these"
    )
    parser.add_argument("--again", action="store_true", help="also those that are there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of blocks.csv and blocks.md")
    options = parser.parse_args()
    path = options.out / "blocks.csv"
    rows = read(path)
    nets = [net for net in ZOO if any(text in net.key for text in options.only)]
    for number, net in enumerate(nets, 1):
        if net.key in rows and not options.again:
            continue
        row = {name: str(value) for name, value in row_of(net).items()}
        rows[net.key] = row
        write(path, COLUMNS, rows)
        print(
            f"[{number}/{len(nets)}] {net.key}: {row['prunable']} of {row['blocks']} {row['error']}",
            flush=True,
        )
    ordered = [rows[each.key] for each in ZOO if each.key in rows]
    (options.out / "blocks.md").write_text(table(ordered))
    failed = [row["net"] for row in ordered if int(row["prunable"]) and not _is_exact(row)]
    print(f"{len(ordered)} nets, {len(failed)} without an exact twin: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
