"""Whether a model gives the same again: nobody can plan what depends on earlier calls, or on chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from depthfuse.acceleration.checking.verify import other_values
from depthfuse.acceleration.planning.own import main_dtype, tensors_by_name
from depthfuse.acceleration.planning.program import Call
from depthfuse.acceleration.planning.trees import flatten, in_words
from depthfuse.errors import AccelerationError
from depthfuse.measuring.accuracy import TOLERANCE, relative_error

_PLAIN = (bool, int, float, str, type(None))


def check_repeatable(model: nn.Module, unused: nn.Module, call: Call) -> None:
    """Run a copy of a model twice on the same, and in between on something else, which an unused copy is given as well.

    Args:
        model, unused: copies in evaluation mode; what they keep between calls stays in them.
        call: as the model takes it.

    Raises:
        AccelerationError: it does not take the call, returns what is no tensor or plain value, writes over its own
            tensors, or gives another output or has other attributes after the second call.
    """
    first, first_tree = _run(model, call)
    # What the first call leaves behind may be a table that depends on sizes alone; `unused` tells if it is more.
    before = {name: tensor.clone() for name, tensor in tensors_by_name(model).items() if _is_small(tensor)}
    between = _attributes(model)
    # Halved as well: what is calibrated by a mean or a deviation is the same for the same values in another order.
    tensors = (other_values(x) for x in call.tensors)
    other = Call(tuple(x * 0.5 if x.is_floating_point() else x for x in tensors), call.tree)
    of_other = _try(model, other)
    after_other = {name: x.clone() for name, x in tensors_by_name(model).items() if name in before}
    second, second_tree = _run(model, call)
    after = tensors_by_name(model)
    written = [
        name
        for name, tensor in before.items()
        if not (_same(tensor, after_other.get(name)) and _same(tensor, after.get(name)))
    ]
    changed = [name for name, value in _attributes(model).items() if not _same(between.get(name), value)]
    if written or changed:
        raise AccelerationError(
            f"the model keeps state between calls, in {', '.join([*written, *changed][:3])}: accelerate the parts of "
            "it that keep none"
        )
    alike = first_tree == second_tree and all(map(_close, first, second))
    if alike and of_other is not None:
        anew = _try(unused, other)  # what the first call of all left behind was there both times
        alike = anew is not None and anew[1] == of_other[1] and all(map(_close, anew[0], of_other[0]))
    if not alike:
        raise AccelerationError(
            f"the model gives another output when it is called again with the same "
            f"({in_words(second_tree, second)}): it draws random numbers, or depends on earlier calls"
        )


def _try(model: nn.Module, call: Call) -> tuple[list[Any], Any] | None:
    """None where the model does not take such values."""
    try:
        return _run(model, call)
    except AccelerationError:
        return None


def _run(model: nn.Module, call: Call) -> tuple[list[Any], Any]:
    args, kwargs = call.on_clones().arguments()
    try:
        with torch.no_grad():
            outputs = model(*args, **kwargs)
    except Exception as error:  # of the model's own code, which may raise any
        if isinstance(error, AccelerationError | torch.OutOfMemoryError):
            raise
        text = (str(error) or type(error).__name__).splitlines()[0]
        main = main_dtype(model)
        floats = {x.dtype for x in call.tensors if x.is_floating_point()}
        own = f" (its weights are in {main})" if floats - {main} else ""
        raise AccelerationError(f"the model does not take the example input {call}{own}: {text}") from error
    leaves, tree = flatten(outputs, once=True)
    # A later call may write over what this one gave.
    return [x.clone() if isinstance(x, Tensor) else x for x in leaves], tree


def _is_small(tensor: Tensor) -> bool:
    """Whether keeping a copy costs nothing; nobody counts in a large tensor."""
    return tensor.numel() <= 2**20 and tensor.layout == torch.strided


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The plain values, tensors and lengths that modules hold as attributes of theirs."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in _OWN_OF_MODULES:
                continue
            if isinstance(value, list | dict | set | tuple):
                found[f"{path}.{name}".lstrip(".")] = len(value)
            elif isinstance(value, Tensor):
                found[f"{path}.{name}".lstrip(".")] = value.detach().clone()
            elif isinstance(value, _PLAIN):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


_OWN_OF_MODULES = frozenset(vars(nn.Module()))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        if not (a.is_floating_point() or a.is_complex()):
            return torch.equal(a, b)
        return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    return type(a) is type(b) and (a == b or a != a)


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return relative_error(a, b) <= TOLERANCE.get(a.dtype, 0.0)
