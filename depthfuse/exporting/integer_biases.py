"""Biases of an ONNX file in 8 bits as integers, as ONNX Runtime wants them before it multiplies integers."""

from __future__ import annotations

from typing import Any

_LARGEST = 2**31 - 1


def with_integer_biases(model: Any) -> Any:
    """Round each bias of a layer in 8 bits to a multiple of the step that its products come in, in place.

    ONNX Runtime takes a convolution as one of integers where all that it reads is dequantised, the bias from int32 by
    (scale of the input) * (scale of the weight); one whose bias is left in float it computes in float, slower than if
    nothing had been rounded. The step is far finer than that of the layer's output, so that nothing is lost. A bias
    stays as it is where the input has a scale for each channel, or where it does not fit 31 bits.

    Args:
        model: onnx.ModelProto with QuantizeLinear and DequantizeLinear, weights as int8 initializers.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {each.name: each for each in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}

    def scale_of(name: str) -> Any:
        """Of a value that is dequantised, through what leaves numbers alone; None for any other."""
        node = made_by.get(name)
        while node is not None and node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            node = made_by.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in stored:
            return None
        return numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)

    for node in list(graph.node):
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or node.input[2] not in stored:
            continue
        x_scale, weight_scale = scale_of(node.input[0]), scale_of(node.input[1])
        if x_scale is None or weight_scale is None or x_scale.size != 1:
            continue
        name = node.input[2]
        bias = numpy_helper.to_array(stored[name]).astype(np.float64)
        steps = (x_scale.reshape(()) * weight_scale).astype(np.float32)
        whole = np.rint(bias / steps.astype(np.float64))
        if not np.isfinite(whole).all() or np.abs(whole).max(initial=0) > _LARGEST:
            continue
        base = f"{node.name}.bias"
        graph.initializer.extend(
            numpy_helper.from_array(value, f"{base}_{kind}")
            for kind, value in (
                ("integers", whole.astype(np.int32)),
                ("steps", steps),
                ("zero", np.zeros_like(steps, dtype=np.int32)),
            )
        )
        given = [f"{base}_{kind}" for kind in ("integers", "steps", "zero")]
        axis = {"axis": 0} if steps.ndim else {}
        place = list(graph.node).index(node)
        graph.node.insert(
            place, helper.make_node("DequantizeLinear", given, [base], f"{base}_dequantised", **axis)
        )
        node.input[2] = base
    read = {name for node in graph.node for name in node.input}
    for each in [each for each in graph.initializer if each.name not in read]:
        graph.initializer.remove(each)
    return model
