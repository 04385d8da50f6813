"""What `accelerate` promises, for every kind of model in contract_models.py: what the model gives, or a refusal that
names the cause. In every way of running it, for copies of it, and without a trace in the model.
"""

import contextlib
import copy
import dataclasses
import logging
import pickle
import warnings

import pytest
import torch
from acceleration.contract_models import KINDS
from on_request import LONG
from torch import Tensor

import depthfuse
from depthfuse.acceleration import AccelerationError, accelerate

# Largest allowed |given - expected| / max |expected| by the coarsest dtype that takes part.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
COMPUTED = [name for name, kind in KINDS.items() if not kind.refused]
REFUSED = [name for name, kind in KINDS.items() if kind.refused]


def made(name):
    """The model in evaluation mode, and its calls."""
    kind = KINDS[name]
    torch.manual_seed(1)
    model = kind.make().eval()
    return model, kind.calls()


def clones(value):
    """The same arguments with tensors of their own that lie in memory as these do."""
    return copy.deepcopy(value)


def run(function, given, around=contextlib.nullcontext):
    """Outputs, the tensors that were given as they are afterwards, and which of these the outputs share memory with."""
    args, kwargs = clones(given)
    with torch.no_grad(), around(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = function(*args, **kwargs)
    return outputs, (args, kwargs)


def tensors_in(value):
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in tensors_in(item)] if isinstance(value, list | tuple) else []


def shared(outputs, given):
    """Which outputs are each other, and which lie in memory that was given."""
    found, memory = tensors_in(outputs), [x.untyped_storage().data_ptr() for x in tensors_in(given)]
    first = [next(i for i, y in enumerate(found) if y is x) for x in found]
    return first, [x.numel() > 0 and x.untyped_storage().data_ptr() in memory for x in found]


def assert_same(given, expected, bound, where="the output"):
    """The same containers of the same classes, and tensors of the same shapes, dtypes and values."""
    if isinstance(expected, Tensor):
        assert isinstance(given, Tensor), f"{where}: {type(given)} for a tensor"
        assert given.shape == expected.shape, where
        assert given.dtype == expected.dtype, where
        assert_close(given, expected, bound, where)
        return
    assert type(given) is type(expected), f"{where}: {type(given)} for {type(expected)}"
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            ours, theirs = getattr(given, field.name), getattr(expected, field.name)
            assert_same(ours, theirs, bound, f"{where}.{field.name}")
    if isinstance(expected, dict):
        assert list(given) == list(expected), where
        for key in expected:
            assert_same(given[key], expected[key], bound, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(given) == len(expected), where
        for i, (g, e) in enumerate(zip(given, expected, strict=True)):
            assert_same(g, e, bound, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert given == pytest.approx(expected, rel=bound, nan_ok=True), where
    elif not dataclasses.is_dataclass(expected):
        assert given == expected, where


def assert_same_layouts(given, expected):
    """Outputs lie in memory as the model's do: that holds for calls like the example."""
    for ours, theirs in zip(tensors_in(given), tensors_in(expected), strict=True):
        for layout in (torch.contiguous_format, torch.channels_last)[: 2 if theirs.dim() == 4 else 1]:
            if theirs.numel() and theirs.is_contiguous(memory_format=layout):
                assert ours.is_contiguous(memory_format=layout), (
                    f"{ours.stride()}, expected {theirs.stride()}"
                )


def assert_close(given, expected, bound, where):
    if not expected.is_floating_point() and not expected.is_complex():
        assert torch.equal(given, expected), where
        return
    given, expected = given.resolve_conj().detach(), expected.resolve_conj().detach()
    if expected.is_complex():
        given, expected = torch.view_as_real(given), torch.view_as_real(expected)
    given, expected = given.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(given.isfinite(), finite), f"{where}: NaN or infinity in other places"
    torch.testing.assert_close(given[~finite], expected[~finite], equal_nan=True)
    if finite.any():
        error = (given - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-30)
        assert error <= bound, f"{where}: relative error {error:.1e}"


def bound_of(model, outputs, coarsest):
    dtypes = {coarsest} | {x.dtype for x in [*model.parameters(), *model.buffers(), *tensors_in(outputs)]}
    return max(BOUNDS[dtype] for dtype in dtypes if dtype in BOUNDS)


def state_of(model):
    """All of a model that a user can see, its weights byte by byte."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    weights = {
        name: (
            x.data_ptr(),
            x.stride(),
            x.dtype,
            x.requires_grad,
            x.detach().contiguous().clone().view(torch.uint8),
        )
        if x.dim()
        else (x.data_ptr(), x.dtype, x.requires_grad, x.item())
        for name, x in tensors.items()
    }
    attributes = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                held = list(value) if isinstance(value, dict | list) else value
                attributes[path, name] = (type(value), id(value), held)
    return weights, attributes


def assert_unchanged(model, before):
    (weights, attributes), (weights_before, attributes_before) = state_of(model), before
    assert attributes.keys() == attributes_before.keys()
    for key, (cls, identity, held) in attributes.items():
        assert (cls, identity) == attributes_before[key][:2], key
        if isinstance(held, list):
            assert [id(x) for x in held] == [id(x) for x in attributes_before[key][2]], key
    assert weights.keys() == weights_before.keys()
    for name, found in weights.items():
        assert found[:-1] == weights_before[name][:-1], name
        ours, theirs = found[-1], weights_before[name][-1]
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, name


def check(run_it, name, model, calls, expected, may_refuse=False):
    """Each call gives what the model gave, also when all of them have been made."""
    results, around = [], KINDS[name].around
    for number, given in enumerate(calls):
        try:
            results.append((number, *run(run_it, given, around)))
        except AccelerationError as error:
            # What was loaded has no model for calls that its plan is not made for.
            assert may_refuse, error
            assert number or around is not contextlib.nullcontext, f"the example is refused: {error}"
    for number, outputs, given in results:
        wanted, wanted_given = expected[number]
        bound = bound_of(model, wanted, KINDS[name].coarsest)
        assert_same(outputs, wanted, bound, f"call {number}")
        if number == 0:
            assert_same_layouts(outputs, wanted)
        assert_same(given, wanted_given, bound, f"the arguments of call {number}")
        assert shared(outputs, given) == shared(wanted, wanted_given), f"call {number}"


# Users get the default. A plan for which nothing was chosen is tried in long runs: the default starts from one.
TUNES = ["default", "off"] if LONG else ["default"]


@pytest.fixture(autouse=True)
def quiet():
    """torch.export and torch.compile say much about models that they do not take."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("name", COMPUTED)
def test_gives_what_the_model_gives(name, tune, tmp_path):
    around, unsaved = KINDS[name].around, KINDS[name].unsaved
    model, calls = made(name)
    untouched, _ = made(name)
    if tune == "off":  # all that goes beyond one plan is tried with the default
        calls = calls[:1]
    expected = [run(untouched, given, around) for given in calls]
    before = state_of(model)
    args, kwargs = clones(calls[0])
    options = {} if tune == "default" else {"tune": tune}
    fast = accelerate(model, args, example_kwargs=kwargs, **options)
    assert_unchanged(model, before)
    assert_same((args, kwargs), calls[0], 0.0, "the example")
    check(fast, name, model, calls, expected)
    assert_unchanged(model, before)
    assert not fast.training
    assert next(fast.parameters()).dtype == fast.dtype

    if tune == "off":
        return
    check(copy.deepcopy(fast), name, model, calls[:2], expected)
    if can_be_pickled(model, calls[0], expected[0][0], around):
        check(pickle.loads(pickle.dumps(fast)), name, model, calls[:2], expected)
    if unsaved:
        with pytest.raises(AccelerationError, match=unsaved):
            fast.save(tmp_path / "fast.safetensors")
    else:
        fast.save(tmp_path / "fast.safetensors")
        loaded = depthfuse.load_accelerated(tmp_path / "fast.safetensors")
        check(loaded, name, model, calls, expected, may_refuse=True)
    # By the plans for other calls, where it made any; and nothing that is done to the model reaches it.
    spoil(model)
    check(fast, name, untouched, calls, expected)


def spoil(model):
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            x.zero_()


def can_be_pickled(model, given, expected, around):
    """Whether pickle brings the model back as it was: functions inside functions it refuses, and a method that was
    wrapped it takes for the one of the class.
    """
    try:
        twin = pickle.loads(pickle.dumps(model))
    except (AttributeError, TypeError, pickle.PicklingError, RuntimeError):
        return False
    try:
        assert_same(run(twin, given, around)[0], expected, 1e-3)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name(name, tune):
    model, calls = made(name)
    before = state_of(model)
    args, kwargs = calls[0]
    options = {} if tune == "default" else {"tune": tune}
    with pytest.raises(AccelerationError, match=KINDS[name].refused):
        accelerate(model, args, example_kwargs=kwargs, **options)
    assert_unchanged(model, before)
