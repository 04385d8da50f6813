"""Winograd's F(2x2, 3x3): exact where its transforms are, within its own error bound on reals."""

import pytest
import torch
import torch.nn.functional as F

from depthfuse.kernels import winograd as module
from depthfuse.kernels.arguments import Tail, Window
from depthfuse.kernels.launch import INTERPRETED
from depthfuse.kernels.winograd import pack_weight, supports, winograd_conv2d
from depthfuse.selftest import oracle
from depthfuse.selftest.oracle import ACT, Rounding, Value, assert_within, finish, guarded

DTYPES = [torch.float16, torch.float32] + ([] if INTERPRETED else [torch.bfloat16])

# batch, channels, (height, width), outputs, padding
CASES = {
    "same": (2, 40, (7, 6), 33, (1, 1)),
    "no_padding": (1, 64, (6, 5), 16, (0, 0)),
    "wide_padding": (1, 8, (3, 4), 24, (2, 1)),
    "1x1_image": (3, 16, (1, 1), 8, (1, 1)),
    "2x3_image": (1, 33, (2, 3), 70, (1, 1)),
    "one_channel": (1, 1, (4, 5), 1, (1, 1)),
}


def operands(case, dtype, device, integers):
    """x, weight [K, C, 3, 3] and tail. Integer weights are multiples of 4, so that G w G^T is an integer too."""
    n, c, image, k, padding = case

    def sample(*shape):
        return (torch.randint(-2, 3, shape) if integers else torch.randn(shape)).to(device, dtype)

    x = sample(n, c, *image).contiguous(memory_format=torch.channels_last)
    weight = sample(k, c, 3, 3) * (4 if integers else 1)
    size = [extent + 2 * p - 2 for extent, p in zip(image, padding, strict=True)]
    residual = sample(n, k, *size).contiguous(memory_format=torch.channels_last)
    return guarded(x), weight, [guarded(t) for t in (sample(k), residual, sample(k), sample(k))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exact_on_integers(case, dtype, device):
    x, weight, tail = operands(case, dtype, device, integers=True)
    tail, window = Tail(*tail, "relu"), Window(padding=case[-1])
    y = winograd_conv2d(x, guarded(pack_weight(weight)), tail, window)
    exact = oracle.conv2d(x, weight, tail, window).value
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, exact.to(dtype))


def magnitude_of(x, packed, padding):
    """sum |U||V| of the transformed operands, through the output transform's magnitudes: [N, K, P, Q]."""
    k = packed.shape[1]
    absolute = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
    outputs = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.float64)
    n, c, *size = x.shape
    out = [extent + 2 * p - 2 for extent, p in zip(size, padding, strict=True)]
    odd = [extent % 2 for extent in out]
    pad = (padding[1], padding[1] + odd[1], padding[0], padding[0] + odd[0])
    tiles = F.pad(x.double().cpu().abs(), pad).unfold(2, 4, 2).unfold(3, 4, 2)  # [N, C, P/2, Q/2, 4, 4]
    v = absolute @ tiles @ absolute.T
    u = packed.double().cpu().abs().view(4, 4, k, c)
    m = torch.einsum("ijkc,ncpqij->nkpqij", u, v)
    y = outputs @ m @ outputs.T  # [N, K, P/2, Q/2, 2, 2]
    y = y.permute(0, 1, 2, 4, 3, 5).reshape(n, k, 2 * m.shape[2], 2 * m.shape[3])
    return y[:, :, : out[0], : out[1]].to(x.device)


@pytest.mark.parametrize("act", ACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_bound(dtype, act, device):
    x, weight, tail = operands(CASES["same"], dtype, device, integers=False)
    packed = pack_weight(weight)
    y = winograd_conv2d(x, packed, Tail(*tail, act))
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    rounding = Rounding.of(x, torch.float32)
    # Both transformed operands are rounded to the dtype: half a unit each.
    relative = rounding.relative(x.shape[1] + 8) + torch.finfo(dtype).eps
    product = Value(exact, relative * magnitude_of(x, packed, (1, 1)))
    assert_within(y, *finish(product, Tail(*tail, act), rounding))


def test_64_bit_offsets_and_repeated_runs_give_the_same_bits(device, monkeypatch):
    x, weight, tail = operands(CASES["same"], torch.float16, device, integers=False)
    packed = pack_weight(weight)
    first = winograd_conv2d(x, packed, Tail(*tail))
    assert torch.equal(winograd_conv2d(x, packed, Tail(*tail)), first)
    monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    assert torch.equal(winograd_conv2d(x, packed, Tail(*tail)), first)


def test_empty_batch_and_no_tail(device):
    x, weight, _ = operands(CASES["same"], torch.float32, device, integers=True)
    packed = pack_weight(weight)
    assert winograd_conv2d(x[:0], packed).shape == (0, 33, 7, 6)
    assert torch.equal(winograd_conv2d(x, packed).double(), F.conv2d(x.double(), weight.double(), padding=1))


def test_supports_only_its_own_geometry():
    assert supports((3, 3), (1, 1), (1, 1), 1)
    assert not supports((3, 3), (2, 2), (1, 1), 1)
    assert not supports((5, 5), (1, 1), (1, 1), 1)
    assert not supports((3, 3), (1, 1), (2, 2), 1)
    assert not supports((3, 3), (1, 1), (1, 1), 2)


def test_a_bad_layout_is_named(device):
    x, weight, _ = operands(CASES["same"], torch.float32, device, integers=True)
    packed = pack_weight(weight)
    with pytest.raises(ValueError, match="x .* expected channels_last"):
        winograd_conv2d(x.contiguous(), packed)
    with pytest.raises(ValueError, match="weight .* has strides .* expected contiguous"):
        winograd_conv2d(x, packed.transpose(1, 2).contiguous().transpose(1, 2))


def test_only_3x3_weights_are_packed():
    with pytest.raises(ValueError, match=r"weight has shape \[4, 4, 5, 5\], expected \[K, C, 3, 3\]"):
        pack_weight(torch.zeros(4, 4, 5, 5))
