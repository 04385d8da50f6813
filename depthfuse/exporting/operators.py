"""What the parsers of runtimes that cannot run here do not read of ONNX, by their own documentation.

TensorRT: docs/operators.md of onnx-tensorrt, release 10.1; MIGraphX: docs/dev/onnx_operators.rst of AMDMIGraphX.
"""

from __future__ import annotations

from typing import Any

from depthfuse.errors import ExportError

_BOTH = """
    Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow CenterCropPad Col2Im Compress
    ConcatFromSequence DFT Det HammingWindow HannWindow MaxRoiPool MaxUnpool MelWeightMatrix NegativeLogLikelihoodLoss
    Optional OptionalGetElement OptionalHasElement STFT SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringNormalizer TfIdfVectorizer
"""
_UNREAD = {
    "TensorRT": f"""{_BOTH} AffineGrid ConvInteger DynamicQuantizeLinear ImageDecoder MatMulInteger Multinomial
        QLinearConv QLinearMatMul RegexFullMatch StringConcat StringSplit Unique""",
    "MIGraphX": f"{_BOTH} DeformConv Mish",
}
# {parser: {operator: which of its inputs has to be a constant}}
_CONSTANT = {
    "TensorRT": {},
    "MIGraphX": {"Reshape": 1, "Expand": 1, "Tile": 1, "Split": 1, "Pad": 1, "ConstantOfShape": 0},
}


def check_operators(model: Any, parser: str) -> None:
    """Raise ExportError where a model (onnx.ModelProto) has what a parser, "TensorRT" or "MIGraphX", does not read."""
    unread = set(_UNREAD[parser].split())
    constants = {each.name for each in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type in unread:
            raise ExportError(
                f"{parser} does not read the operator {node.domain}{node.op_type} ({node.name})"
            )
        place = _CONSTANT[parser].get(node.op_type)
        if place is not None and place < len(node.input) and node.input[place] not in ("", *constants):
            raise ExportError(
                f"{parser} does not read {node.op_type} ({node.name}) with sizes that depend on the input's: export "
                "with dynamic='none'"
            )
