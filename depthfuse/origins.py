"""Where a model comes from: timm's list, torchvision's, a folder of Hugging Face's, or a factory of the user's own.

    resnet18, timm:resnet18       timm.create_model("resnet18", ...)
    torchvision:resnet50          torchvision.models.get_model("resnet50", weights=None, ...)
    hf:folder                     an image classifier that transformers saved there; gives its logits
    my_package.nets:build         build(...), from the module my_package.nets

Tasks and data of a user's own are named as factories are: my_package.tasks:depth.

A name may stand in a file, and a file must not make anybody's code run or read other files: a factory is imported, and
a folder read, only where it was named on the command line or allowed by code (`allow_origin`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthfuse import _torchvision
from depthfuse.errors import SpecError
from depthfuse.untrusted import is_out_of_memory

if TYPE_CHECKING:  # the command line asks here before it knows whether anything will run
    from torch import nn

# An architecture with, maybe, the tag of its weights. No scheme (hf-hub:, local-dir:), which makes timm read elsewhere.
_TIMM = re.compile(r"(timm:)?([A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?)")
_TORCHVISION = re.compile(r"torchvision:[A-Za-z0-9_]+")
_FOLDER = re.compile(r"hf:[^\0:]{1,1000}")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_RESERVED = ("timm", "torchvision", "torch", "hf", "depthfuse")  # modules whose names are not for factories

_allowed: set[str] = set()


def check_model_name(name: Any) -> str:
    """A name as it is kept: without "timm:". Raises SpecError for one that is of no known form."""
    if isinstance(name, str):
        timm = _TIMM.fullmatch(name)
        if timm:
            return timm[2]
        if _TORCHVISION.fullmatch(name) or is_own(name):
            return name
    raise SpecError(
        f"{name!r:.100} names no model: expected a name of timm's own list (timm.list_models()), torchvision:NAME, "
        "hf:FOLDER or package.module:factory; names with another scheme or a path are none: build such a model and "
        "pass it on"
    )


def is_own(name: str) -> bool:
    """Whether a name is of something of the user's: package.module:factory or hf:folder."""
    factory = _FACTORY.fullmatch(name) and name.partition(":")[0].partition(".")[0] not in _RESERVED
    return bool(factory or _FOLDER.fullmatch(name))


def allow_origin(name: str) -> None:
    """Let "package.module:factory" be imported and called, or "hf:folder" be read, by whatever names it, for this
    process.

    Raises SpecError for what is no such name.
    """
    if not is_own(name):
        raise SpecError(f"{name!r:.100} needs no leave: expected package.module:factory or hf:FOLDER")
    _allowed.add(name)


def allow_named(words: Iterable[str]) -> None:
    """Allow what stands on a command line, as words or as values of flags."""
    for word in words:
        name = word.partition("=")[2] if word.startswith("--") else word
        if is_own(name):
            _allowed.add(name)


def create(name: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    """The model of a name. Raises SpecError where there is none, OSError for weights that cannot be fetched."""
    if is_own(name):
        _check_allowed(name)
        if name.startswith("hf:"):
            return _of_folder(name[3:], arguments, pretrained)
        return _by_factory(name, arguments, pretrained)
    origin, _, rest = name.rpartition(":")
    return (_of_torchvision if origin else _of_timm)(rest, arguments, pretrained)


def imported(name: str) -> Any:
    """What "package.module:NAME" stands for. Raises SpecError where that is not allowed, or not there."""
    _check_allowed(name)
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:  # as for `python -m`
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module's own code
        raise SpecError(f"{name} cannot be imported: {type(error).__name__} {error}") from error
    finally:
        if added:
            sys.path.remove(here)


def _check_allowed(name: str) -> None:
    if name not in _allowed:
        raise SpecError(
            f"{name} is of somebody's own, and is used only where you name it yourself: on the command line, as in "
            f"--model {name}, or by depthfuse.allow_origin({name!r}) in Python"
        )


def _of_timm(name: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise SpecError(
            f"timm has no model {name!r}{_near(name, timm.list_models())} (timm.list_models() lists all)"
        )
    with _refused(
        "timm", name, arguments, "pretrained weights cannot be loaded with" if pretrained else None
    ):
        return timm.create_model(name, pretrained=pretrained, **arguments)


def _of_torchvision(name: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    _torchvision.ensure()
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise SpecError(f"torchvision:{name} needs torchvision: pip install torchvision") from error
    if pretrained:
        raise SpecError(
            "pretrained weights are fetched for timm's models only: save torchvision's as a safetensors file of the "
            "model's state dict and name it by --weights"
        )
    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    with _refused("torchvision", name, arguments):
        builder = models.get_model_builder(name)
        # a segmentation model would fetch weights for its backbone
        bare = (
            {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
        )
        return builder(weights=None, **bare, **arguments)


def _of_folder(folder: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise SpecError(f"hf:{folder} needs transformers: pip install transformers") from error
    from depthfuse.logits import Logits

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise SpecError(
            f"there is no config.json in {path.absolute()}: expected what transformers saves there"
        )
    # no code from the folder, nothing from the network, no pickle
    safely = {"local_files_only": True, "trust_remote_code": False}
    settings = {{"num_classes": "num_labels"}.get(name, name): value for name, value in arguments.items()}
    classifier = transformers.AutoModelForImageClassification
    with _refused("transformers", folder, arguments):
        if pretrained:
            loaded = classifier.from_pretrained(
                path, use_safetensors=True, ignore_mismatched_sizes=True, **safely, **settings
            )
            return Logits(loaded)
        config = transformers.AutoConfig.from_pretrained(path, **safely, **settings)
        return Logits(classifier.from_config(config, trust_remote_code=False))


def _by_factory(name: str, arguments: Mapping[str, Any], pretrained: bool) -> nn.Module:
    if pretrained:
        raise SpecError(
            f"{name} builds its model by itself: let it load its weights, or name a file by --weights"
        )
    from torch import nn

    module, _, function = name.partition(":")
    factory = imported(name)
    if not callable(factory):
        raise SpecError(f"{name} is a {type(factory).__name__}, expected a function that gives a model")
    with _refused(module, function, arguments):
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise SpecError(f"{name} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


@contextmanager
def _refused(who: str, name: str, arguments: Mapping[str, Any], instead: str | None = None) -> Iterator[None]:
    """SpecError for what a library raises while it builds: an argument out of place may fail anywhere in its code."""
    try:
        yield
    except (OSError, SpecError):  # a download that failed; ours
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        what = instead if instead and isinstance(error, RuntimeError) else f"{who} refused"
        raise SpecError(
            f"{what} the arguments {dict(arguments)} for {name!r}: {type(error).__name__} {error}"
        ) from error


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5)
    return f"; similar names: {', '.join(near)}" if near else ""
