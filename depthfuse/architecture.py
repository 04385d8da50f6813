"""Which keyword arguments reach `timm.create_model`: names of a list, with plain values within bounds.

They come from files: a spec, a saved plan, a YAML config. timm has keywords that read files of any kind and unpickle
them (`checkpoint_path`, `pretrained_cfg`), so that a list of the harmless is the only safe one. All here only say how
large a net is and which of timm's own parts it is made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from depthfuse.errors import SpecError

# {keyword: what the numbers in its value may be at most}. Names of layers are looked up in timm's own tables.
_WIDTH, _SIDE, _FACTOR = 2**16, 2**11, 2**10
_LARGEST = 2**24  # of a factory's arguments
_KEYWORDS: dict[str, int] = {
    # what comes in and goes out
    **dict.fromkeys(("in_chans", "img_size"), _SIDE),
    "num_classes": 2**24,
    **dict.fromkeys(("global_pool", "features_only", "out_indices", "output_stride"), _FACTOR),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "strict_img_size"), _FACTOR),
    # width
    **dict.fromkeys(("channels", "dims", "embed_dim", "embed_dims", "stem_width", "stem_size"), _WIDTH),
    **dict.fromkeys(("base_width", "num_features", "head_hidden_size", "growth_rate", "cardinality"), _WIDTH),
    **dict.fromkeys(
        ("mlp_ratio", "mlp_ratios", "expand_ratio", "bottle_ratio", "channel_multiplier"), _FACTOR
    ),
    **dict.fromkeys(("num_heads", "head_dim", "block_reduce_first", "reg_tokens", "width_factor"), _FACTOR),
    # depth; the sum of these is bounded below
    **dict.fromkeys(("depth", "depths", "layers"), 128),
    "depth_multiplier": 8,
    # parts and their settings
    **dict.fromkeys(("patch_size", "kernel_size", "kernel_sizes", "down_kernel_size", "window_size"), 64),
    **dict.fromkeys(("act_layer", "norm_layer", "aa_layer", "pad_type", "stem_type", "norm_eps"), _FACTOR),
    **dict.fromkeys(("bn_eps", "bn_momentum", "fix_stem", "fix_stem_head", "se_from_exp"), _FACTOR),
    **dict.fromkeys(("avg_down", "replace_stem_pool", "zero_init_last", "head_norm_first"), _FACTOR),
    **dict.fromkeys(("conv_mlp", "conv_bias", "use_grn", "head_init_scale", "weight_init"), _FACTOR),
    **dict.fromkeys(("init_values", "ls_init_value", "layer_scale_init_value"), _FACTOR),
    **dict.fromkeys(("qkv_bias", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm"), _FACTOR),
    **dict.fromkeys(
        ("class_token", "no_embed_class", "pos_embed", "pre_norm", "final_norm", "fc_norm"), _FACTOR
    ),
    # what training drops
    **dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate"), 1),
    **dict.fromkeys(("attn_drop_rate", "pos_drop_rate", "patch_drop_rate"), 1),
}
# timm's deepest net has 100 blocks; each takes 10 ms to build.
_MOST_LAYERS = 128
_LAYERS = ("depth", "depths", "layers")
# Read files, load weights, take code, or are set by depthfuse itself: never taken, whoever asks.
_NEVER = frozenset(
    (
        "model_name",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "pretrained_strict",
        "pretrained_filter_fn",
        "checkpoint_path",
        "cache_dir",
        "device",
        "dtype",
        "scriptable",
        "exportable",
        "no_jit",
        "model_cfg",
        "cfg",
        "feature_cfg",
        "feature_cls",
        "kwargs_filter",
        "pruned",
    )
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")
_MOST_ITEMS, _MOST_NESTED = 64, 3


def allow_keywords(*names: str, at_most: int = _FACTOR) -> None:
    """Let further keywords of `timm.create_model` through, for this process. Never done by a file.

    Args:
        names: keywords of the model's constructor that only say how it is built.
        at_most: largest number that their values may hold.

    Raises:
        SpecError: a keyword that makes timm read files or load weights.
    """
    for name in names:
        if name in _NEVER or not _NAME.fullmatch(name):
            raise SpecError(
                f"the keyword {name!r} can never be allowed: build that model by timm and pass it on"
            )
        _KEYWORDS[name] = at_most


def plain_arguments(arguments: Any, any_name: bool = False) -> dict[str, Any]:
    """Arguments of `timm.create_model` checked, sorted by name, with tuples for lists (JSON cannot tell them apart).

    any_name: whether names that are not in the list are taken, too: for a factory of the user's own.

    Raises:
        SpecError: a keyword that is not in the list, or a value that is not plain or too large.
    """
    if not isinstance(arguments, Mapping):
        raise SpecError(
            f"the model's arguments are a {type(arguments).__name__}, where names and values are expected"
        )
    unknown = [name for name in arguments if not isinstance(name, str) or name not in _KEYWORDS]
    if any_name:
        unknown = [name for name in unknown if not isinstance(name, str) or not _NAME.fullmatch(name)]
    if unknown:
        raise SpecError(
            f"the model argument {unknown[0]!r:.60} is refused, as it is none of those known to be harmless: "
            f"{', '.join(sorted(_KEYWORDS))}. Others are allowed by code, depthfuse.spec.allow_keywords(name), "
            "and never by a file"
        )
    return {name: _plain(name, arguments[name]) for name in sorted(arguments)}


def _plain(name: str, value: Any) -> Any:
    """Numbers, words, booleans, None, and nested tuples of them."""
    items = list(_leaves(name, value, _MOST_NESTED))
    if len(items) > _MOST_ITEMS:
        raise SpecError(f"the model argument {name} has {len(items)} items, where {_MOST_ITEMS} are the most")
    numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
    for number in numbers:
        if not abs(number) <= _KEYWORDS.get(name, _LARGEST):  # NaN too
            raise SpecError(
                f"the model argument {name}={number!r:.40}: numbers up to {_KEYWORDS.get(name, _LARGEST)} are taken"
            )
    if name in _LAYERS and sum(numbers) > _MOST_LAYERS:
        raise SpecError(
            f"the model argument {name} asks for {sum(numbers)} layers, {_MOST_LAYERS} are the most"
        )
    return _as_tuples(value)


def _leaves(name: str, value: Any, levels: int) -> Iterable[Any]:
    if isinstance(value, list | tuple):
        if levels == 0 or len(value) > _MOST_ITEMS:
            raise SpecError(
                f"the model argument {name} is nested too deep or too long: {_MOST_NESTED} levels, {_MOST_ITEMS} items"
            )
        for item in value:
            yield from _leaves(name, item, levels - 1)
    elif isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise SpecError(
                f"the model argument {name}={value!r:.60} is no word (letters, digits and _ . + -, to 64)"
            )
        yield value
    elif value is None or type(value) in (bool, int, float):
        yield value
    else:
        raise SpecError(
            f"the model argument {name} holds a {type(value).__name__}: numbers, words, booleans, None and lists of "
            "them are taken"
        )


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
