"""An ONNX file in 8 bits in the one form that ONNX Runtime multiplies as integers.

It takes an operator as one of integers where all that it reads and gives is quantised, by tensor, in one type, and the
bias of a convolution is int32 by (scale of the input) * (scale of the weight). What is in any other form it computes in
float, with rounding around it: slower than if nothing had been rounded.
"""

from __future__ import annotations

from typing import Any

_LARGEST = 2**31 - 1


def as_uniform_integers(model: Any) -> Any:
    """Activations as unsigned integers and biases as integers, in place.

    What is computed stays the same, but for biases: they are rounded, to a step far finer than that of the layer's
    output. A bias stays as it is where the input has a scale for each channel, or where it does not fit 31 bits.

    Args:
        model: onnx.ModelProto with QuantizeLinear and DequantizeLinear, weights as int8 initializers.
    """
    _make_unsigned(model.graph)
    _round_biases(model.graph)
    read = {name for node in model.graph.node for name in node.input}
    for each in [each for each in model.graph.initializer if each.name not in read]:
        model.graph.initializer.remove(each)
    return model


def _make_unsigned(graph: Any) -> None:
    """int8 about zero as uint8 about 128: the same steps, and the type that ReLU's values have."""
    import numpy as np
    from onnx import numpy_helper

    stored = {each.name: each for each in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    changed: set[str] = set()
    for node in graph.node:
        of_activation = node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] in made_by
        )
        if not of_activation or len(node.input) < 3 or node.input[2] not in stored:
            continue
        zero = numpy_helper.to_array(stored[node.input[2]])
        if zero.dtype != np.int8:
            continue
        name = f"{node.input[2]}_unsigned"
        if name not in stored:
            stored[name] = numpy_helper.from_array((zero.astype(np.int16) + 128).astype(np.uint8), name)
            graph.initializer.append(stored[name])
        node.input[2] = name
        changed |= {*node.output} if node.op_type == "QuantizeLinear" else set()
    for each in [each for each in graph.value_info if each.name in changed]:
        graph.value_info.remove(each)  # it says int8


def _round_biases(graph: Any) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

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
