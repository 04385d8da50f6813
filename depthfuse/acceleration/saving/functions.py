"""The operators that a saved plan may call, by name: what computes tensors from tensors and numbers.

A file names operators, and whoever loads it runs them; so nothing is looked up that is not listed here. Nothing listed
reads files, draws random numbers, or writes over its inputs (but `copy_`, where a model writes over what it is given).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

_OPERATORS = """
    add sub mul truediv floordiv mod pow neg pos abs getitem eq ne lt le gt ge and_ or_ not_
"""
_ATEN = """
    abs acos adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add
    addcdiv addcmul addmm alias all alpha_dropout amax amin aminmax angle any arange argmax argmin argsort asin
    atan atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bitwise_and bitwise_not bitwise_or
    bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat ceil celu chunk clamp clamp_max clamp_min clone
    complex conj constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    convolution copy copy_ cos cosh cosine_similarity cross cummax cumprod cumsum deg2rad detach diag diag_embed
    diagonal div dot dropout einsum elu embedding empty empty_like eq erf erfc exp exp2 expand expand_as expm1 eye
    feature_dropout fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft
    fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill flatten flip floor floor_divide fmod frac frobenius_norm
    full full_like gather ge gelu ger glu grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt hardshrink
    hardsigmoid hardswish hardtanh hypot im2col imag index index_add index_copy index_fill index_put index_select
    instance_norm isfinite isinf isnan kthvalue layer_norm le leaky_relu lerp lift_fresh lift_fresh_copy linalg_norm
    linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logical_and logical_not
    logical_or logical_xor logit logsumexp lt masked_fill masked_scatter matmul max max_pool1d max_pool2d
    max_pool2d_with_indices max_pool3d maximum mean median meshgrid min minimum mish mm movedim mul mv nan_to_num
    narrow ne neg new_empty new_full new_ones new_zeros norm numpy_T one_hot ones ones_like outer pad permute
    pixel_shuffle pixel_unshuffle pow prelu prod real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d
    relu relu6 remainder repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
    resolve_conj resolve_neg rms_norm roll rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
    scatter_add scatter_reduce select select_scatter selu sgn sigmoid sign silu sin sinh slice slice_scatter softmax
    softplus softshrink softsign sort split split_with_sizes sqrt square squeeze stack std std_mean sub sum swapaxes
    sym_numel sym_size sym_stride t take take_along_dim tan tanh tensor_split tensordot threshold tile to topk trace
    transpose tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d var var_mean vdot view view_as view_as_complex view_as_real where xlogy zeros zeros_like
    _adaptive_avg_pool2d _assert_scalar _fft_c2c _fft_c2r _fft_r2c _log_softmax _native_batch_norm_legit_no_training
    _softmax _to_copy _unsafe_index _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa native_group_norm
    native_layer_norm unsafe_chunk unsafe_split unsafe_split_with_sizes
    _conj _native_batch_norm_legit_functional affine_grid_generator bilinear cdist channel_shuffle col2im embedding_bag
    gru linalg_inv linalg_inv_ex lstm max_unpool2d max_unpool3d nonzero rnn_relu rnn_tanh rrelu
"""
_SYMBOLIC = {
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_not": torch.sym_not,
    "torch.sym_int": torch.sym_int,
    "torch.sym_float": torch.sym_float,
    "torch.sym_ite": torch.sym_ite,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "round": round,
}


def _named() -> dict[str, Callable[..., Any]]:
    named: dict[str, Callable[..., Any]] = dict(_SYMBOLIC)
    named |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()}
    for name in _ATEN.split():
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            continue  # another version of PyTorch's
        for overload in packet.overloads():
            found = getattr(packet, overload)
            if name == "copy_" or not found._schema.is_mutable:
                named[f"aten.{name}.{overload}"] = found
    return named


FUNCTIONS = _named()
NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
