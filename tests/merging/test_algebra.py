"""The merge algebra against what it claims to equal, in float64, over random geometries."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from depthfuse.merging.algebra import LinearConv, add, compose, norm_affine

EXACT = 1e-12  # relative: a few hundred roundings in float64


def random_conv(c_in, c_out, k, stride, padding, dilation, groups, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(c_out, c_in // groups, k, k, generator=g, dtype=torch.float64)
    bias = torch.randn(c_out, generator=g, dtype=torch.float64)
    return LinearConv(weight, bias, (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)


def close(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max().clamp_min(1)


geometry = st.tuples(
    st.integers(1, 4),  # kernel
    st.integers(1, 3),  # stride
    st.integers(0, 3),  # padding
    st.integers(1, 3),  # dilation
)


@settings(deadline=None, max_examples=150)
@given(geometry, geometry, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_compose_equals_applying_both_on_zero_extended_input(first, second, groups1, groups2, seed):
    (k1, s1, p1, d1), (k2, s2, p2, d2) = first, second
    a = random_conv(4, 8, k1, s1, p1, d1, groups1, seed)
    b = random_conv(8, 4, k2, s2, p2, d2, groups2, seed + 1)
    merged = compose(b, a)
    size = 15 + (d1 * (k1 - 1) + 1) + s1 * d2 * (k2 - 1)
    x = torch.randn(2, 4, size, size + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # the definition: all padding at the input, none between
    wide = F.pad(x, (p1 + p2 * s1,) * 4)
    wanted = F.conv2d(
        F.conv2d(wide, a.weight, a.bias, a.stride, 0, a.dilation, a.groups),
        b.weight,
        b.bias,
        b.stride,
        0,
        b.dilation,
        b.groups,
    )
    close(merged(x), wanted)


@pytest.mark.parametrize("channels,k1,k2", [(6, 3, 5), (5, 1, 3), (3, 7, 3)])
def test_depthwise_after_depthwise_stays_depthwise(channels, k1, k2):
    a = random_conv(channels, channels, k1, 1, 0, 1, channels, 0)
    b = random_conv(channels, channels, k2, 2, 0, 1, channels, 1)
    merged = compose(b, a)
    assert merged.groups == channels
    x = torch.randn(2, channels, 20, 20, dtype=torch.float64)
    close(merged(x), b(a(x)))


def test_compose_on_integers_is_exact():
    a = random_conv(3, 5, 3, 2, 0, 1, 1, 0)
    b = random_conv(5, 4, 3, 1, 0, 2, 1, 1)
    a = LinearConv(a.weight.round(), a.bias.round(), a.stride)
    b = LinearConv(b.weight.round(), b.bias.round(), b.stride, dilation=(2, 2))
    x = torch.randint(-9, 9, (2, 3, 21, 17)).double()
    assert torch.equal(compose(b, a)(x), b(a(x)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.integers(0, 2**31))
def test_add_lays_taps_on_taps(k_main, k_side, stride, seed):
    main = random_conv(4, 4, k_main, stride, k_main // 2, 1, 1, seed)
    side = random_conv(4, 4, k_side, stride, k_side // 2, 1, 2, seed + 1)
    x = torch.randn(2, 4, 11, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(add(main, side)(x), main(x) + side(x))


def test_add_identity_is_a_skip():
    main = random_conv(4, 4, 3, 1, 2, 2, 1, 0)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    close(add(main, LinearConv.identity(4, x))(x), main(x) + x)


@pytest.mark.parametrize("size", [8, 9])
def test_add_average_pool_to_a_strided_convolution(size):
    main = random_conv(4, 4, 3, 2, 1, 1, 1, 0)
    pool = LinearConv.average_pool(4, 2, 2, main.weight)
    x = torch.randn(1, 4, size, size, dtype=torch.float64)
    side = F.avg_pool2d(F.pad(x, (0, size % 2, 0, size % 2)), 2)
    close(add(main, pool)(x), main(x) + side)


def test_add_refuses_kernels_whose_outputs_differ_in_size():
    main = random_conv(4, 4, 1, 1, 0, 1, 1, 0)
    side = random_conv(4, 4, 2, 1, 0, 1, 1, 0)
    with pytest.raises(ValueError, match="no symmetric padding"):
        add(main, side)
    with pytest.raises(ValueError, match="4 -> 4 with stride"):
        add(main, random_conv(4, 4, 1, 2, 0, 1, 1, 0))


def test_compose_refuses_mismatched_channels():
    with pytest.raises(ValueError, match=r"gives 8 channels.*takes 6"):
        compose(random_conv(6, 4, 1, 1, 0, 1, 1, 0), random_conv(4, 8, 1, 1, 0, 1, 1, 0))


@settings(deadline=None, max_examples=40)
@given(geometry, st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_ungrouped_undilated_and_module_are_the_same_map(shape, groups, seed):
    k, s, p, d = shape
    conv = random_conv(4, 8, k, s, p, d, groups, seed)
    x = torch.randn(2, 4, 19, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = conv(x)
    close(conv.ungrouped()(x), wanted)
    close(conv.undilated()(x), wanted)
    close(conv.to_conv(x)(x), wanted)
    close(LinearConv.from_conv(conv.to_conv(x))(x), wanted)


def test_centre_tap_samples_the_same_places():
    conv = random_conv(3, 4, 3, 2, 2, 2, 1, 0)
    x = torch.randn(1, 3, 13, 14, dtype=torch.float64)
    masked = LinearConv(
        conv.weight * F.pad(torch.ones(1, 1), (1, 1, 1, 1)),
        conv.bias,
        conv.stride,
        conv.padding,
        conv.dilation,
    )
    close(conv.centre_tap()(x), masked(x))
    with pytest.raises(ValueError, match="no centre tap"):
        random_conv(3, 4, 2, 1, 0, 1, 1, 0).centre_tap()


@pytest.mark.parametrize("affine", [True, False])
def test_norm_affine_is_the_norm_in_eval_mode(affine):
    norm = nn.BatchNorm2d(5, eps=1e-3, affine=affine).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    scale, shift = norm_affine(norm)
    close(x * scale[:, None, None] + shift[:, None, None], norm(x))
    with pytest.raises(ValueError, match="no running statistics"):
        norm_affine(nn.BatchNorm2d(5, track_running_stats=False))


def test_linear_reads_as_a_1x1_convolution():
    linear = nn.Linear(6, 4).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    conv = LinearConv.from_linear(linear)
    close(conv(x[:, :, None, None])[:, :, 0, 0], linear(x))
    close(conv.to_linear(x)(x), linear(x))
    with pytest.raises(ValueError, match="no linear layer"):
        random_conv(4, 4, 3, 1, 1, 1, 1, 0).to_linear(x)


def test_unfixed_padding_is_refused():
    with pytest.raises(ValueError, match="padding 'same'"):
        LinearConv.from_conv(nn.Conv2d(2, 2, 3, padding="same"))
    with pytest.raises(ValueError, match="reflect"):
        LinearConv.from_conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
