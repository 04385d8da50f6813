"""Dense and grouped convolution: exact on integers, within its error bound on reals, blind to what lies outside."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels import conv2d as module
from depthfuse.kernels.arguments import Tail, Window
from depthfuse.kernels.conv2d import conv2d, is_packed, is_readable, pack_weight
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, assert_within, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# batch, channels, (height, width), outputs, kernel, stride, padding, dilation, groups
CASES = {
    "stem_7x7_s2": (2, 3, (15, 14), 40, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "stem_3x3_s2": (1, 3, (14, 13), 32, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "patch_4x4_s4": (1, 3, (16, 16), 48, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "3x3": (2, 48, (7, 7), 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3_s2": (3, 32, (7, 5), 24, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "3x3_few_channels": (1, 16, (7, 7), 24, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3_no_padding": (1, 64, (5, 5), 16, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "5x5": (1, 32, (6, 6), 8, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    "7x7": (1, 40, (8, 7), 8, (7, 7), (1, 1), (3, 3), (1, 1), 1),
    "even_kernel": (1, 24, (6, 6), 24, (2, 4), (1, 2), (1, 0), (1, 1), 1),
    "dilated": (1, 32, (9, 9), 16, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "asymmetric": (1, 32, (9, 6), 16, (3, 1), (2, 1), (1, 0), (1, 1), 1),
    "1x1": (2, 24, (8, 8), 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1_s2": (2, 96, (7, 7), 24, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "grouped": (1, 96, (6, 6), 48, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "grouped_narrow": (1, 16, (6, 6), 24, (3, 3), (2, 2), (1, 1), (1, 1), 4),
    "1x1_image": (3, 32, (1, 1), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2x3_image": (1, 32, (2, 3), 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "one_channel": (1, 1, (6, 6), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def operands(case, dtype, device, integers, seed=0):
    """x, weight, the tail's tensors, each between bands of NaN, and the window."""
    n, c, image, k, kernel, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(seed)

    def sample(*shape):
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = sample(n, c, *image).contiguous(memory_format=torch.channels_last)
    weight = sample(k, c // groups, *kernel).contiguous(memory_format=torch.channels_last)
    window = Window(stride, padding, dilation, groups)
    shape = F.conv2d(x.double(), weight.double(), None, *window).shape
    residual = sample(*shape).contiguous(memory_format=torch.channels_last)
    tensors = (x, weight, sample(k), residual, sample(k), sample(k))
    x, weight, *tail = (guarded(t) for t in tensors)
    return x, weight, tail, window


FEW_CHANNELS = (
    "stem_7x7_s2",
    "stem_3x3_s2",
    "patch_4x4_s4",
    "3x3_few_channels",
    "even_kernel",
    "grouped_narrow",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEW_CHANNELS)
def test_images_are_read_channel_by_channel_as_they_come(name, dtype, device):
    x, weight, tail, window = operands(CASES[name], dtype, device, integers=True)
    tail = Tail(*tail, "relu")
    planes = guarded(x.contiguous())
    assert planes.stride() != x.stride()
    assert is_readable(planes, weight)
    y = conv2d(planes, weight, tail, window)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, oracle.conv2d(x, weight, tail, window).value.to(dtype))


def test_what_is_read_as_it_lies():
    few, many = torch.ones(2, 3, 8, 8), torch.ones(2, 64, 8, 8)
    kernel, pointwise, wide = torch.ones(8, 3, 3, 3), torch.ones(8, 3, 1, 1), torch.ones(8, 64, 3, 3)
    assert is_readable(few, kernel)
    assert not is_readable(few, pointwise)
    assert not is_readable(many, wide)
    assert is_readable(many.to(memory_format=torch.channels_last), wide)
    assert not is_readable(few[:, :, ::2], kernel)
    with pytest.raises(ValueError, match="channels_last"):
        conv2d(many, wide, window=Window(padding=(1, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weight, tail, window = operands(case, dtype, device, integers=True)
    tail = Tail(*tail, "relu")
    y = conv2d(x, weight, tail, window)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, oracle.conv2d(x, weight, tail, window).value.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACT)
def test_error_bound(act, dtype, device):
    x, weight, tail, window = operands(CASES["3x3_s2"], dtype, device, integers=False)
    tail = Tail(*tail, act)
    y = conv2d(x, weight, tail, window)
    assert_within(y, *oracle.conv2d(x, weight, tail, window, sums=torch.float32))


@pytest.mark.parametrize("present", range(16))
def test_every_part_of_the_tail_is_optional(present, device):
    x, weight, tail, window = operands(CASES["3x3_s2"], torch.float32, device, integers=True)
    tail = Tail(*(t if present >> i & 1 else None for i, t in enumerate(tail)), "relu6")
    y = conv2d(x, weight, tail, window)
    assert torch.equal(y.double(), oracle.conv2d(x, weight, tail, window).value)


@pytest.mark.parametrize("case", ["3x3", "stem_7x7_s2", "1x1", "grouped"])
def test_64_bit_offsets_give_the_same_bits(case, device, monkeypatch):
    x, weight, tail, window = operands(CASES[case], torch.float32, device, integers=False)
    narrow = conv2d(x, weight, Tail(*tail), window)
    for owner in (module, module.linear):
        monkeypatch.setattr(owner, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(conv2d(x, weight, Tail(*tail), window), narrow)


def test_same_bits_from_run_to_run(device):
    x, weight, tail, window = operands(CASES["3x3"], torch.float16, device, integers=False)
    first = conv2d(x, weight, Tail(*tail, "silu"), window)
    assert all(torch.equal(conv2d(x, weight, Tail(*tail, "silu"), window), first) for _ in range(2))


def test_nan_passes_through_relu(device):
    x = torch.full((1, 32, 2, 2), float("nan"), device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(8, 32, 1, 1, device=device)
    for act in ("relu", "relu6", "hardswish"):
        assert conv2d(x, weight, Tail(act=act)).isnan().all()


@pytest.mark.parametrize("case", ["3x3", "1x1"])
def test_empty_batch(case, device):
    x, weight, (bias, _, scale, shift), window = operands(CASES[case], torch.float16, device, integers=True)
    y = conv2d(x[:0], weight, Tail(bias, None, scale, shift), window)
    assert y.shape == F.conv2d(x[:0], weight, None, *window).shape


def test_unaligned_and_sliced_input(device):
    x, weight, tail, window = operands(CASES["3x3"], torch.float16, device, integers=True)
    expected = conv2d(x, weight, Tail(*tail), window)
    moved = guarded(x, offset=1)
    assert torch.equal(conv2d(moved, weight, Tail(*tail), window), expected)
    assert torch.equal(conv2d(moved[1:], weight, window=window), conv2d(x[1:], weight, window=window))


@pytest.mark.parametrize("case", ["stem_7x7_s2", "one_channel", "3x3_few_channels", "3x3", "grouped_narrow"])
def test_packed_weight_gives_the_same_bits(case, device):
    x, weight, tail, window = operands(CASES[case], torch.float16, device, integers=False)
    packed = pack_weight(weight)
    assert is_packed(packed)
    assert torch.equal(packed, weight)
    assert packed.shape[0] == 1 or packed.stride(0) % 8 == 0
    assert torch.equal(conv2d(x, packed, Tail(*tail), window), conv2d(x, weight, Tail(*tail), window))


def test_a_bad_layout_is_named(device):
    """What would be read from the wrong place; all else is checked once, in the op."""
    x = torch.zeros(1, 32, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(6, 32, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"x \[1, 32, 5, 5\] has strides .* expected channels_last"):
        conv2d(x.contiguous(), weight)
    with pytest.raises(ValueError, match=r"weight \[6, 32, 3, 3\] has strides .* expected channels_last"):
        conv2d(x, weight.contiguous())
    with pytest.raises(ValueError, match=r"residual \[1, 6, 3, 3\] has strides .* expected channels_last"):
        conv2d(x, weight, Tail(residual=torch.zeros(1, 6, 3, 3, device=device)))
    for name in ("bias", "scale", "shift"):
        with pytest.raises(ValueError, match=rf"{name} \[6\] has strides \[0\], expected contiguous"):
            conv2d(x, weight, Tail(**{name: torch.zeros(1, device=device).expand(6)}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of any device")
def test_a_tensor_that_is_not_on_the_gpu_is_refused():
    x = torch.zeros(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="x is on cpu, but Triton kernels need a GPU tensor"):
        conv2d(x, torch.zeros(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_than_2_to_the_31_elements():
    x = torch.zeros(172, 64, 448, 448, dtype=torch.float16, device="cuda").to(
        memory_format=torch.channels_last
    )
    assert x.numel() > 2**31
    x[-1] = 1
    weight = torch.ones(8, 64, 3, 3, dtype=torch.float16, device="cuda").to(memory_format=torch.channels_last)
    y = conv2d(x, weight, window=Window(padding=(1, 1)))
    assert (y[-1, :, 1:-1, 1:-1] == 576).all()
    assert (y[0] == 0).all()
