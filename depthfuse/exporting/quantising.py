"""A file in 8 bits: ranges from images, the loss measured in the runtime, and layers left in float until it is small.

NNCF (nncf.quantize) rounds the ONNX form of a model, for OpenVINO, too: weights symmetrically with a scale for each
output channel, activations with one scale, biases corrected for what rounding shifts on average. Its own
`quantize_with_accuracy_control` is not used: it tries every group of quantisers on the images held out, which for ONNX
it can only rank by a metric of single images, tells what it found to its log alone, and gives a file that missed the
budget like any other.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import rich
import torch
from torch import Tensor

from depthfuse.acceleration.running.conversion import Run
from depthfuse.errors import ExportError
from depthfuse.exporting.calibration import Samples
from depthfuse.exporting.onnx_file import layer_names
from depthfuse.exporting.programs import reason_of
from depthfuse.exporting.sensitivity import sensitivities
from depthfuse.exporting.subject import Subject
from depthfuse.exporting.uniform_integers import as_uniform_integers
from depthfuse.fused.blocks import FusedAttention
from depthfuse.untrusted import is_out_of_memory

logger = logging.getLogger(__name__)

PACKAGES = ("nncf", "onnx", "onnxscript", "onnxruntime")
PRESET = "performance"
# How an activation's range follows from what it reaches on each image: the largest of these, or as NNCF does by
# default, where a tensor has one scale the mean of them. The mean cuts off what only some classes reach (the outputs of
# a net that knows five colours are off by 0.64 of the largest, and by 0.06 with the largest), the largest follows what
# a single image reaches.
LARGEST, BY_DEFAULT = "largest", "NNCF's default"
RANGES = (LARGEST, BY_DEFAULT)
_RANKED_BY = 16  # images; which layers suffer most shows on few
# Of layers that may stay in float: with more of them the file is hardly faster, and the budget the wrong one.
_MOST_IN_FLOAT = 0.5


@dataclass(frozen=True)
class Quantisation:
    """How a file in 8 bits was made, and what it lost.

    metric: what was scored, in percent, on `images` images held out. float_score, score: of the file in float and in 8
    bits, both in the runtime. points: the loss that was allowed. ranges: of `RANGES`, the one that was kept. equalised:
    streams of values whose channels were scaled, see `depthfuse.exporting.equalising`. layers: {name: squared error of
    the outputs over their squares where this layer alone is in 8 bits}, the largest first. in_float: the names of those
    that were left in float, as the file lost too much without.
    """

    metric: str
    images: int
    float_score: float
    score: float
    points: float
    ranges: str
    equalised: int
    layers: dict[str, float]
    in_float: tuple[str, ...]

    @property
    def lost(self) -> float:
        """Points; below zero where 8 bits happen to score better."""
        return self.float_score - self.score

    def document(self) -> dict[str, Any]:
        """For the file's facts: plain values."""
        return {
            "metric": self.metric,
            "images": self.images,
            "float_score": self.float_score,
            "score": self.score,
            "points_allowed": self.points,
            "ranges": self.ranges,
            "layers": {name: float(f"{error:.3g}") for name, error in self.layers.items()},
            "in_float": list(self.in_float),
        }

    def worst(self, count: int = 8) -> str:
        """The layers that the outputs suffer most from, a line each."""
        rows = [
            f"  {name}: {error:.1e}{', left in float' if name in self.in_float else ''}"
            for name, error in list(self.layers.items())[:count]
        ]
        title = f"squared error of the outputs where one layer alone is in 8 bits, the worst of {len(self.layers)}:"
        return "\n".join([title, *rows])

    def __str__(self) -> str:
        kept = ""
        if self.in_float:
            named = ", ".join(f"{name} ({self.layers[name]:.1e})" for name in self.in_float)
            kept = f"; left in float, for what they alone do to the outputs: {named}"
        return (
            f"8 bits: {self.metric} {self.float_score:.2f} -> {self.score:.2f} % on {self.images} images held out "
            f"({self.points:g} points allowed), ranges of activations: {self.ranges}{kept}"
        )


def quantise(
    model: bytes,
    in_full: Run,
    subject: Subject,
    samples: Samples,
    load: Callable[[bytes], Run],
    equalised: int,
    uniform: bool,
) -> tuple[bytes, Quantisation]:
    """A model in 8 bits that loses no more than it may, as ONNX.

    Ranges are taken in each of the ways of `RANGES`. Of what loses no more than it may, that is kept whose outputs err
    the least: on some hundred images scores that differ by a few answers tell nothing apart, and are often equal. Where
    all in 8 bits loses too much, the layers that suffer the most stay in float: 1, 2, 4, ... of them until it is
    enough, then fewer by bisection.

    Args:
        model: ONNX, in float32, its layers called as `layer_names` says. in_full: what runs it in the runtime.
        samples: whose `points` may be lost. load: from ONNX to what runs it in the runtime. equalised: streams that
            have been, for the result. uniform: see `rounded`.

    Raises:
        ExportError: NNCF does not take the model, or too much is lost with half of its layers in float, too.
    """
    names = layer_names(subject)
    first = samples.images[0]  # of the only batch that the plan takes, or a single image
    images = first if len(first) > 1 else torch.cat(samples.images[:_RANKED_BY])
    ranked = {names[layer]: error for layer, error in sensitivities(subject.plan.module, images).items()}
    float_score = samples.score(in_full)
    most = int(len(ranked) * _MOST_IN_FLOAT)
    order = list(ranked)
    is_transformer = any(isinstance(each, FusedAttention) for each in subject.plan.module.modules())

    def tried(count: int, ranges: str) -> tuple[bytes, float, float]:
        settings = {"is_transformer": is_transformer, "uniform": uniform, "ranges": ranges}
        tried_model = rounded(model, samples.images, order[:count], **settings)
        score, error = samples.compare(load(tried_model), in_full)
        logger.info(
            "%s in 8 bits with %d of %d layers in float, ranges: %s: %s %.2f %%, in float %.2f %%, error %.1e",
            *(subject.name(), count, len(order), ranges, samples.metric, score, float_score, error),
        )
        return tried_model, score, error

    known: dict[int, tuple[str, bytes, float]] = {}

    def fits(count: int) -> bool:
        # A layer that spoils everything hides which ranges are the better ones: so both, each time.
        both = [(ranges, *tried(count, ranges)) for ranges in RANGES]
        within = [each for each in both if float_score - each[2] <= samples.points]
        best = min(within, key=lambda each: each[3]) if within else max(both, key=lambda each: each[2])
        known[count] = best[:3]
        return bool(within)

    too_few, count = -1, 0
    while not fits(count):
        if count == most:
            scores = {number: score for number, (*_, score) in known.items()}
            raise ExportError(_refusal(subject.name(), samples, float_score, scores, order))
        too_few, count = count, min(max(1, 2 * count), most)
    while count - too_few > 1:
        middle = (count + too_few) // 2
        count, too_few = (middle, too_few) if fits(middle) else (count, middle)
    ranges, chosen, score = known[count]
    result = Quantisation(
        metric=samples.metric,
        images=samples.count,
        float_score=float_score,
        score=score,
        points=samples.points,
        ranges=ranges,
        equalised=equalised,
        layers=ranked,
        in_float=tuple(order[:count]),
    )
    return chosen, result


def _refusal(
    name: str, samples: Samples, float_score: float, scores: dict[int, float], order: Sequence[str]
) -> str:
    """scores: {how many layers were in float: what that reached}. order: of all layers, the worst first."""
    best = max(scores, key=scores.__getitem__)
    return (
        f"{name} in 8 bits loses {float_score - scores[0]:.2f} points ({samples.metric} {float_score:.2f} -> "
        f"{scores[0]:.2f} % on {samples.count} images), and {float_score - scores[best]:.2f} with {best} of its "
        f"{len(order)} layers in float, where {samples.points:g} are allowed. The worst layers are "
        f"{', '.join(order[:3])}. Allow more points, give more or other images to calibrate by, or export in float"
    )


def rounded(
    model: bytes,
    images: Sequence[Tensor],
    in_float: Collection[str] = (),
    *,
    is_transformer: bool = False,
    uniform: bool = False,
    preset: str = PRESET,
    ranges: str = LARGEST,
    bias_correction: bool = True,
) -> bytes:
    """A model in 8 bits, by NNCF.

    Args:
        model: ONNX, of one input. images: as it takes them; ranges are taken from all. in_float: names of layers that
            stay as they are, see `layer_names`. is_transformer: NNCF spares what attention does not bear then.
        uniform: in the form that ONNX Runtime computes by integers, see `uniform_integers`. Otherwise a depthwise
            layer's activations have a scale for each channel, as OpenVINO takes them.
        preset: "performance", activations symmetric about zero, or "mixed", with a zero point of their own.
        ranges: one of `RANGES`.

    Raises:
        ExportError: NNCF does not take the model.
    """
    import onnx

    nncf = _nncf()
    advanced = importlib.import_module("nncf.quantization.advanced_parameters")
    estimators = importlib.import_module("nncf.quantization.range_estimator")
    estimator = estimators.RangeEstimatorParametersSet.MINMAX if ranges == LARGEST else None
    proto = onnx.load_model_from_string(model)
    (source,) = proto.graph.input
    spared = [node.name for node in proto.graph.node if node.name.rpartition("/")[0] in in_float]
    by_tensor = advanced.QuantizationParameters(per_channel=False)
    try:
        with _quiet():
            found = nncf.quantize(
                proto,
                nncf.Dataset([{source.name: x.numpy()} for x in images]),
                preset=nncf.QuantizationPreset(preset),
                subset_size=len(images),
                model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
                ignored_scope=nncf.IgnoredScope(names=spared) if spared else None,
                advanced_parameters=advanced.AdvancedQuantizationParameters(
                    disable_bias_correction=not bias_correction,
                    activations_quantization_params=by_tensor if uniform else None,
                    activations_range_estimator_params=estimator,
                ),
            )
    except Exception as error:  # whatever another project raises
        if is_out_of_memory(error):
            raise
        raise ExportError(f"NNCF does not take this model: {reason_of(error)}; export it in float") from error
    return (as_uniform_integers(found) if uniform else found).SerializeToString()


@functools.cache
def _nncf() -> Any:
    """The library. At its import it sets the class of all loggers, and decides whether to report its use to Intel, by
    default without asking: not on behalf of our users.
    """
    loggers = logging.getLoggerClass()
    try:
        with mock.patch.dict(os.environ, {"NNCF_CI": "1"}):
            import nncf
    finally:
        logging.setLoggerClass(loggers)
    return nncf


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its own lines and bars of progress."""
    own, console = logging.getLogger("nncf"), rich.get_console()
    level, was_quiet = own.level, console.quiet
    own.setLevel(logging.ERROR)
    console.quiet = True
    try:
        yield
    finally:
        own.setLevel(level)
        console.quiet = was_quiet
