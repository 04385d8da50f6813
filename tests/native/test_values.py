"""What is asked of an input's values before the engine runs on it, and its casts, with and without the engine."""

import functools

import pytest
import torch
from native_ops import needs_engine

from depthfuse.native import library, values
from depthfuse.native.values import all_within, cast, in_rows

LIMIT = 100.0
NOT = (float("nan"), float("inf"), -float("inf"), LIMIT, -LIMIT, 1e30)


@pytest.fixture(params=[pytest.param(True, marks=needs_engine), False], ids=["engine", "numpy"])
def engine(request, monkeypatch):
    monkeypatch.setattr(values, "ready", library.library if request.param else lambda: None)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.usefixtures("engine")
def test_every_place_is_looked_at(count):
    x = torch.full((count,), -99.5)
    x[::2] = 99.5
    assert all_within(x, LIMIT)
    for place in range(count):
        for value in NOT:
            spoilt = x.clone()
            spoilt[place] = value
            assert not all_within(spoilt, LIMIT)


@pytest.mark.usefixtures("engine")
def test_only_the_tensor_s_own_values_count():
    whole = torch.full((4, 3, 6, 6), float("nan"))
    whole[1:3] = 1.0
    assert all_within(whole[1:3], LIMIT) and not all_within(whole[1:], LIMIT)
    image = torch.full((2, 6, 6, 6), float("nan"))
    image[:, :3, ::2] = 1.0
    assert all_within(image[:, :3, ::2], LIMIT)  # neither in order nor without gaps
    last = torch.ones(2, 3, 5, 5).to(memory_format=torch.channels_last)
    assert all_within(last, LIMIT)
    last[1, 2, 4, 4] = float("nan")
    assert not all_within(last, LIMIT) and not all_within(last.double(), LIMIT)
    assert all_within(torch.ones(5).double(), LIMIT)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def same(a, b):
    return (
        a.dtype == b.dtype
        and torch.equal(a.nan_to_num(1.5e4), b.nan_to_num(1.5e4))
        and torch.equal(a.isnan(), b.isnan())
    )


@HALVES
@pytest.mark.usefixtures("engine")
def test_halves_are_looked_at(dtype):
    x = torch.full((2, 3, 5, 7), 99.0, dtype=dtype).to(memory_format=torch.channels_last)
    assert all_within(x, LIMIT)
    for value in NOT:
        x[1, 2, 4, 6] = value
        assert not all_within(x, LIMIT)


@needs_engine
@HALVES
@pytest.mark.parametrize("flush", [False, True], ids=["", "flush"])
def test_all_numbers_of_16_bits_are_widened(dtype, flush):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wanted = every.to(torch.float32)
    torch.set_flush_denormal(flush)
    try:
        given = cast(every, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    # by their bits: 0 and -0 are equal
    real = ~wanted.isnan()
    assert torch.equal(given.view(torch.int32)[real], wanted.view(torch.int32)[real])
    assert given[~real].isnan().all()


@needs_engine
@HALVES
def test_numbers_are_narrowed_to_the_nearest_and_halves_to_even(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(torch.float32)
    # Halfway to the next one, and the float32 on either side of that.
    finite = every[every.isfinite()]
    half = torch.tensor(1 << (15 if dtype is torch.bfloat16 else 12), dtype=torch.int32)
    near = [(finite.view(torch.int32) + half + step).view(torch.float32) for step in (-1, 0, 1)]
    torch.manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    tiny = torch.randn(50_000) * 2.0 ** torch.randint(-30, -10, (50_000,))
    values = torch.cat([every, *near, any_bits, tiny])
    wanted, given = values.to(dtype), cast(values, dtype)
    real = ~wanted.isnan()
    assert torch.equal(given.view(torch.int16)[real], wanted.view(torch.int16)[real])
    assert given[~real].isnan().all()


@needs_engine
@HALVES
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 100])
def test_nothing_but_the_numbers_is_read_or_written(dtype, count):
    x = torch.randn(count + 40).to(dtype)[20 : 20 + count]
    assert same(cast(x, torch.float32), x.to(torch.float32))
    wide = torch.randn(count + 40)[20 : 20 + count]
    assert same(cast(wide, dtype), wide.to(dtype))


VIEWS = [
    lambda x: x,
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: x.transpose(2, 3),
    lambda x: x[:, :, ::2],
    lambda x: x[1:, :2],
    lambda x: x[:0],
]
SIGNED = [torch._neg_view, lambda x: x.requires_grad_()]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize(
    ("own", "view"),
    [(own, view) for own in (*FLOATS, torch.float64) for view in VIEWS + SIGNED]
    + [(torch.uint8, view) for view in VIEWS],
)
def test_a_cast_is_pytorch_s(own, view, wanted):
    x = view((torch.randn(3, 4, 6, 6) * 20 + 50).to(own))
    y = cast(x, wanted)
    assert y.stride() == x.to(wanted).stride() and same(y.detach(), x.detach().to(wanted))


@pytest.mark.parametrize("view", VIEWS + SIGNED)
def test_in_rows(view):
    x = view(torch.randn(3, 4, 6, 6))
    y = in_rows(x)
    assert y.is_contiguous() and torch.equal(y, x)


def test_nothing_is_built_to_look(monkeypatch):
    @functools.cache
    def loading():
        pytest.fail("the engine was asked for")

    monkeypatch.setattr(library, "_loaded", loading)
    assert library.ready() is None and all_within(torch.ones(5), LIMIT)
