"""What each operation of a network takes in the native CPU engine, with its share of a core's measured peak.

    python -m benchmarks.kernels.engine --model resnet34 --threads 1

Operations are counted directly, so that Winograd's may exceed the peak. The peak is what the engine's own innermost
loop reaches when all of its operands stay in the first cache: a product of 24 pixels' 64 channels, again and again.
"""

from __future__ import annotations

import argparse
import math

import torch

from benchmarks.models.__main__ import build
from depthfuse import accelerate
from depthfuse.acceleration.running.native_engine import fastest_algorithm
from depthfuse.acceleration.running.native_lowering import Lowering
from depthfuse.env import collect
from depthfuse.merging.model_inputs import input_size
from depthfuse.native import plan as native
from depthfuse.native.plan import Builder, Node

OPERATIONS = {
    native.CONV: "conv",
    native.DEPTHWISE: "depthwise",
    native.MAX_POOL: "max pool",
    native.MEAN: "mean",
    native.ADD: "add",
    native.LAYER_NORM: "layer norm",
    native.ATTENTION: "attention",
    native.COPY: "copy",
    native.FROM_PLANES: "from planes",
    native.TO_PLANES: "to planes",
    native.CONSTANT: "constant",
    native.MULTIPLY: "multiply",
    native.MAP: "map",
    native.AVERAGE_POOL: "average pool",
    native.PAD: "pad",
    native.GROUP_NORM: "group norm",
    native.RESIZE: "resize",
}
_NOTHING_MS = 2e-4
ALGORITHMS = {
    native.DIRECT: "",
    native.WINOGRAD_2: "F(2,3)",
    native.WINOGRAD_4: "F(4,3)",
    native.TILES: "tiles",
    native.TILES_BF16: "tiles of bfloat16",
}


def macs(builder: Builder, node: Node) -> int:
    """Multiply-adds, counted directly; 0 for what moves or reduces."""
    *pixels, filters = builder.shape(node.y)
    if node.op == native.CONV:
        return (
            math.prod(pixels)
            * filters
            * math.prod(node.numbers[:2])
            * (builder.shape(node.x)[3] // node.groups)
        )
    if node.op == native.DEPTHWISE:
        return math.prod(pixels) * filters * math.prod(node.numbers[:2])
    if node.op == native.ATTENTION:
        return 2 * math.prod(pixels) * math.prod(pixels[1:]) * filters
    return 0


def peak_gflops() -> float:
    """Of one core, in fp32."""
    builder = Builder()
    shape = (1, 1, 24 * 100, 64)
    source, x = builder.tensor(shape, native.INPUT), builder.tensor(shape)
    y = builder.tensor(shape, native.OUTPUT)
    builder.copy(source, x)
    node = Node(native.CONV, x, y, numbers=(1, 1, 1, 1, 0, 0, 1, 1), weight=torch.randn(64, 64))
    builder.nodes.append(node)
    times = builder.build().profile([torch.randn(shape)], [torch.empty(shape)], threads=1, runs=200)
    return 2e-6 * macs(builder, node) / times[1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--variant", choices=("plain", "merged"), default="plain")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args.model, args.variant)
    x = torch.randn(args.batch, *input_size(model))
    planned = accelerate(model, x, tune="heuristic", verify=False)
    lowering = Lowering(planned.plan, fastest_algorithm)
    shapes, _ = lowering.lower([x])
    outputs = [torch.empty(shape) for shape in shapes]
    builder = lowering.builder
    times = builder.build().profile([x], outputs, runs=args.runs)
    peak = peak_gflops()
    print(f"{collect()['cpu']['name']}, {args.threads} threads, {peak:.0f} GFLOP/s measured peak of a core")
    waiting = 0  # multiply-adds of operations that run in strips with the next one
    for node, took in zip(builder.nodes, times, strict=True):
        n, h, w, c = builder.shape(node.y)
        kernel = (
            "x".join(map(str, node.numbers[:2])) + f"/{node.numbers[2]}" if len(node.numbers) == 8 else ""
        )
        source = builder.shape(node.x)[3] if node.x >= 0 else 0
        what = f"{OPERATIONS[node.op]} {kernel} {ALGORITHMS[node.algorithm]}"
        tail = node.act + (" + residual" if node.x2 >= 0 else "")
        waiting += macs(builder, node)
        figures = "in strips, with the next"
        if took > _NOTHING_MS:
            rate, waiting = 2e-6 * waiting / took, 0
            share = f"{rate:6.0f} GFLOP/s {100 * rate / peak / args.threads:4.0f} %" if rate else ""
            figures = f"{1e3 * took:8.0f} us {share}"
        print(f"{what:24} {n}x{h}x{w} {source:5} -> {c:<5} {tail:18} {figures}")
    total_ms, total = sum(times), sum(macs(builder, node) for node in builder.nodes)
    print(f"{'all':24} {total_ms:.2f} ms, {2e-6 * total / total_ms:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
