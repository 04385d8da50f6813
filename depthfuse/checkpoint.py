"""Artefacts on disk: weights and training state as safetensors, everything else as JSON. Never pickle.

Every write is atomic: a temporary file beside the target is written, flushed to the disk and renamed over
it, so that a reader finds the old file or the new one, whole, whatever interrupts the writer, and however many
write at once. Every file carries a SHA-256 over its contents, so that a flipped byte is found like a missing one.
"""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from depthfuse.errors import CheckpointError
from depthfuse.untrusted import MALFORMED, MAX_JSON_BYTES, check_plain, conform, parse_json

JSON_FORMAT = "depthfuse.json/1"
# All of ours lives in one metadata entry, because safetensors keeps several in no fixed order, and equal
# contents should give equal files.
_ENTRY = "depthfuse"
_REMEDY = "delete it and run the stage that writes it again, or restore a whole copy"
# Of a safetensors file; ours hold a plan or the structure of a training state, under 2 MB.
_MAX_HEADER_BYTES = 4 * 2**20

# Names of the temporary files that this process is writing now.
_own_temporaries: set[str] = set()
_own_lock = threading.Lock()


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors and a few strings atomically. Equal contents give equal bytes.

    Args:
        path: the file; its folder is created.
        tensors: dense tensors of any shape, dtype and device; views and shared storage are copied apart.
        metadata: strings to strings.

    Raises:
        CheckpointError: a write that failed (the earlier file stays whole), or contents that are not storable.
    """
    strings = dict(metadata or {})
    for key, value in strings.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise CheckpointError(f"cannot write {path}: metadata must be strings, not {key!r}: {value!r}")
    _save(path, "tensors", tensors, strings)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: CPU tensors, contiguous, and the metadata.

    Raises:
        CheckpointError: a file that is missing, truncated, corrupt, or of another kind.
    """
    return _load(path, "tensors")


def save_state(path: str | Path, state: Mapping[Any, Any]) -> None:
    """Write nested training state atomically.

    Args:
        path: the file; its folder is created.
        state: dicts (keys: str, int, float, bool, None), lists and tuples of int, float, str, bool, None and
            tensors, to any depth. Numbers come back exactly, NaN and infinities included; order is kept.

    Raises:
        CheckpointError: as for `save_tensors`; for a value of another type it names the place and the type.
    """
    tensors: dict[str, Tensor] = {}
    try:
        structure = _encode(state, "state", tensors)
        check_plain(structure, strict_numbers=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    _save(path, "state", tensors, structure)


def load_state(path: str | Path) -> dict[Any, Any]:
    """Read what `save_state` wrote, with tensors on the CPU. Raises CheckpointError like `load_tensors`."""
    tensors, structure = _load(path, "state")
    try:
        state = _decode(structure, tensors)
    except MALFORMED as error:
        raise _damaged(path, f"its structure is malformed: {type(error).__name__} {error}") from error
    if not isinstance(state, dict):
        raise _damaged(path, f"it holds a {type(state).__name__}, where a dict is expected")
    return state


def save_json(path: str | Path, document: Any) -> None:
    """Write a document as indented JSON with a checksum, atomically: {"format", "sha256", "content"}.

    Raises:
        CheckpointError: a write that failed (the earlier file stays whole), or a document that is no JSON
            (NaN and infinities are not).
    """
    document = plain_json(path, document)
    whole = {"format": JSON_FORMAT, "sha256": _json_digest(document), "content": document}
    save_text(path, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def plain_json(path: str | Path, document: Any) -> Any:
    """A document as it will come back from JSON. Raises CheckpointError, naming `path`, for one that is no JSON."""
    try:
        check_plain(document)
        return json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot write {path}: not storable as JSON: {error}") from error


def save_text(path: str | Path, text: str) -> None:
    """Write text atomically. Raises CheckpointError like `save_json`."""
    _replace(path, text.encode())


def save_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, as of a picture, atomically. Raises CheckpointError like `save_json`."""
    _replace(path, data)


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy a file atomically. Raises CheckpointError like `save_json`, and for a source that is missing."""
    _replace(target, _read(source))


def load_json(path: str | Path, shape: Any = Any) -> Any:
    """Read what `save_json` wrote.

    Args:
        shape: of the document, see `depthfuse.untrusted.conform`.

    Raises:
        CheckpointError: a file that is missing, unreadable, damaged, of an earlier version, or of another shape.
    """
    whole = read_json(path)
    if not isinstance(whole, dict) or whole.get("format") != JSON_FORMAT:
        raise CheckpointError(
            f"{path} carries no checksum: it is of another kind, or of an earlier version ({JSON_FORMAT!r} is "
            f"expected): {_REMEDY}"
        )
    if "content" not in whole or whole.get("sha256") != _json_digest(whole["content"]):
        raise _damaged(path, "its checksum does not match its contents")
    try:
        conform(whole["content"], shape)
    except ValueError as error:
        raise CheckpointError(f"{path} is of another kind or version ({error}): {_REMEDY}") from error
    return whole["content"]


def read_json(path: str | Path) -> Any:
    """Any JSON within bounds, without a checksum. Raises CheckpointError where it is missing or no JSON."""
    data = read_bounded(path)
    try:
        return parse_json(data)
    except MALFORMED as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}), or was cut short: {_REMEDY}") from error


def read_bounded(path: str | Path, at_most: int = MAX_JSON_BYTES) -> bytes:
    """All bytes of a file. Raises CheckpointError for one that is missing, unreadable or larger than `at_most`."""
    data = _read(path, at_most + 1)
    if len(data) > at_most:
        raise CheckpointError(
            f"{path} is larger than {at_most} bytes, too large for what it should hold: {_REMEDY}"
        )
    return data


def _json_digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).hexdigest()


def _damaged(path: str | Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({how}): {_REMEDY}")


def _save(path: str | Path, kind: str, tensors: Mapping[str, Tensor], extra: Any) -> None:
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"cannot write {path}: {name!r} is no dense tensor, but {tensor!r:.80}")
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # safetensors refuses tensors that share storage; on the way in, each is its own.
        if dense.untyped_storage().data_ptr() in storages:
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        apart[name] = dense
    entry = {"kind": kind, "extra": extra, "sha256": _digest(kind, extra, apart)}
    try:
        data = safetensors.torch.save(apart, {_ENTRY: json.dumps(entry)})
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    _replace(path, data)


def load_foreign_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of anybody's safetensors file. Raises CheckpointError for any other, damaged or missing file."""
    return _parse_tensors(path, _read(path))[0]


def _parse_tensors(path: str | Path, data: bytes) -> tuple[dict[str, Tensor], Any]:
    """(the tensors, the header as JSON)."""
    length = int.from_bytes(data[:8], "little")
    try:
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes, where {_MAX_HEADER_BYTES} are the most")
        header = parse_json(data[8 : 8 + length], at_most=_MAX_HEADER_BYTES)
        return safetensors.torch.load(data), header
    except MALFORMED as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or was cut short or damaged ({error}): {_REMEDY}"
        ) from error


def _load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    tensors, header = _parse_tensors(path, _read(path))
    try:
        text = header["__metadata__"][_ENTRY]
        # a training state may hold NaN and whole numbers of any size
        entry = parse_json(text, strict_numbers=False, at_most=_MAX_HEADER_BYTES)
        found, extra, sha256 = entry["kind"], entry["extra"], entry["sha256"]
    except MALFORMED as error:
        raise CheckpointError(
            f"{path} was not written by depthfuse, or is damaged (no {_ENTRY!r} metadata): {_REMEDY}"
        ) from error
    if sha256 != _digest(found, extra, tensors):
        raise _damaged(path, "its checksum does not match its contents")
    if found != kind:
        raise CheckpointError(f"{path} holds {found!r}, where {kind!r} is expected: give the right file")
    if kind == "tensors":
        try:
            conform(extra, dict[str, str], "the metadata")
        except ValueError as error:
            raise _damaged(path, str(error)) from error
    return tensors, extra


def _digest(kind: str, extra: Any, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything that a load gives back; `tensors` are contiguous and on the CPU."""
    described = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    digest = hashlib.sha256(json.dumps([kind, extra, described]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for `value`: scalars and lists as they are, the rest as an object with one key, its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors)}.{place}"  # the number makes it unique, the place makes it readable
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if not (key is None or isinstance(key, bool | int | float | str)):
                raise TypeError(f"a key of {place} is of type {type(key).__name__}, which cannot be stored")
            pairs.append([key, _encode(item, f"{place}.{key}", tensors)])
        return {"dict": pairs}
    raise TypeError(f"{place} is of type {type(value).__name__}, which cannot be stored")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind != "dict":
        raise ValueError(f"an unknown kind of value {kind!r:.40}")
    return {key: _decode(item, tensors) for key, item in content}


def _read(path: str | Path, at_most: int = -1) -> bytes:
    """The file's bytes, the first `at_most` of them where that is not negative."""
    try:
        with open(path, "rb") as file:
            return file.read(at_most)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: check the path, or run the stage that writes it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise CheckpointError(f"cannot read {path}: it does not fit into this machine's memory") from error


def _replace(path: str | Path, data: bytes) -> None:
    """Put `data` in the place of `path` in one step; on failure the old file stays and nothing else."""
    path = Path(path)
    try:
        with temporary_beside(path) as temporary:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}. What stood there before is untouched; "
            "free some space or choose another folder, and run again"
        ) from error


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A name for a file or folder on its way to `path`, in the same folder, which is made; gone when the block ends.

    What writers of `path` that were killed half-way left there is deleted first. Raises OSError.
    """
    # of its own for every write: threads, too, save to one path at once
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")
    with _own_lock:
        _own_temporaries.add(temporary.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        yield temporary
    finally:
        _remove(temporary)
        with _own_lock:
            _own_temporaries.discard(temporary.name)


def _remove(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        writer = re.fullmatch(r"(\d+)(-\w+)?", leftover.name.split(".")[-2])
        if writer is None:
            continue
        pid = int(writer[1])
        if pid == os.getpid():  # ours, or of a dead process that had our number
            with _own_lock:
                alive = leftover.name in _own_temporaries
        else:
            alive = _is_running(pid)
        if not alive:
            _remove(leftover)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
