"""Checkpoints: exact round trips, and no file that is half-written or half-read."""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthfuse import checkpoint
from depthfuse.checkpoint import load_json, load_state, load_tensors, save_json, save_state, save_tensors
from depthfuse.errors import CheckpointError

SAVERS = {
    "tensors": (lambda path: save_tensors(path, {"w": torch.arange(3.0)}, {"a": "b"}), load_tensors),
    "state": (lambda path: save_state(path, {"step": 3, "m": torch.ones(2)}), load_state),
    "json": (lambda path: save_json(path, {"blocks": ["layer1.0", "layer2.1"], "share": 0.7}), load_json),
}


def same(a, b) -> bool:
    """Equality in value and type, with NaN equal to itself and -0.0 unlike 0.0."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(k) is type(j) for k, j in zip(a, b, strict=True))
            and all(same(a[key], b[key]) for key in a)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex64,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (4, 3, 2)])
def test_tensors_round_trip_bit_for_bit(tmp_path, dtype, shape):
    bytes_per_item = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * bytes_per_item,))
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    save_tensors(tmp_path / "w", {"x": tensor}, {"net": "résnet"})
    loaded, metadata = load_tensors(tmp_path / "w")
    assert metadata == {"net": "résnet"}
    assert loaded["x"].dtype == dtype and loaded["x"].shape == tensor.shape
    # bytes, because random bits hold NaNs
    assert loaded["x"].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_views_shared_and_strided_tensors_are_stored_apart(tmp_path):
    base = torch.arange(24.0)
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    tensors = {
        "whole": base,
        "again": base,
        "slice": base[5:9],
        "transposed": base.view(4, 6).t(),
        "expanded": base[:1].expand(5),
        "parameter": parameter,
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    save_tensors(tmp_path / "w", tensors)
    loaded, _ = load_tensors(tmp_path / "w")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].equal(tensor.detach()), name
        assert loaded[name].is_contiguous()
    loaded["whole"].zero_()
    assert loaded["again"].equal(base)
    assert tensors["parameter"].requires_grad and parameter.is_contiguous(memory_format=torch.channels_last)


def test_equal_contents_give_equal_bytes(tmp_path):
    tensors = {name: torch.full((2,), ord(name)) for name in "bac"}
    metadata = {name: "v" for name in "klmnop"}
    written = set()
    for run in range(10):
        save_tensors(tmp_path / str(run), tensors, metadata)
        written.add((tmp_path / str(run)).read_bytes())
        tensors = dict(reversed(tensors.items()))
    assert len(written) == 1


scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text()
keys = st.text() | st.integers(-1000, 1000) | st.booleans() | st.none()
states = st.recursive(
    scalars | st.lists(st.integers(-9, 9), max_size=3).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(keys, states, max_size=4))
def test_any_state_round_trips(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state") / "s"
    save_state(path, state)
    assert same(state, load_state(path))


def test_state_of_an_optimizer_continues_it_bit_for_bit(tmp_path):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95))

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    inputs = torch.randn(6, 5, 3)
    model, optimizer = build()
    for x in inputs[:3]:
        step(model, optimizer, x)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save_state(tmp_path / "s", state)
    for x in inputs[3:]:
        step(model, optimizer, x)

    resumed, resumed_optimizer = build()
    loaded = load_state(tmp_path / "s")
    resumed.load_state_dict(loaded["model"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["rng"].equal(state["rng"])
    for x in inputs[3:]:
        step(resumed, resumed_optimizer, x)
    assert all(
        a.equal(b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_mappings_become_dicts(tmp_path):
    save_state(tmp_path / "s", OrderedDict(b=1, a=torch.Size([2, 3])))
    loaded = load_state(tmp_path / "s")
    assert type(loaded) is dict and list(loaded) == ["b", "a"] and loaded["a"] == (2, 3)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1, object()]}}, r"state.a.b\[1\] is of type object"),
        ({"a": torch.nn.Linear(1, 1)}, "state.a is of type Linear"),
        ({(1, 2): 3}, "a key of state is of type tuple"),
        ({"a": b"bytes"}, "state.a is of type bytes"),
        ({"a": torch.eye(2).to_sparse()}, "is no dense tensor"),
    ],
)
def test_state_that_cannot_be_stored_is_named(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save_state(tmp_path / "s", state)
    assert list(tmp_path.iterdir()) == []


def test_contents_that_are_no_json_or_no_strings_are_refused(tmp_path):
    for document in ({"a": float("nan")}, {"a": object()}, {"a": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="not storable as JSON"):
            save_json(tmp_path / "j", document)
    with pytest.raises(CheckpointError, match="metadata must be strings"):
        save_tensors(tmp_path / "w", {}, {"epoch": 3})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", SAVERS)
def test_truncation_at_every_byte_is_found(tmp_path, kind):
    save, load = SAVERS[kind]
    save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    # the newline at the end of JSON is no content
    for length in range(len(data) - (kind == "json")):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=f"{tmp_path / 'cut'}.*delete it and run the stage"):
            load(tmp_path / "cut")
    load(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["tensors", "state"])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, kind):
    save, load = SAVERS[kind]
    save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    expected = load(tmp_path / "whole")
    harmless = []
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            (tmp_path / "bad").write_bytes(damaged)
            try:
                loaded = load(tmp_path / "bad")
            except CheckpointError as error:
                assert str(tmp_path / "bad") in str(error)
            else:
                harmless.append(position)
                assert same(expected, loaded)
    # only the padding after the header may change unnoticed
    assert all(data[position : position + 1] == b" " for position in harmless)


@pytest.mark.parametrize("kind", SAVERS)
def test_garbage_after_the_end_is_found(tmp_path, kind):
    save, load = SAVERS[kind]
    save(tmp_path / "file")
    with open(tmp_path / "file", "ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="file"):
        load(tmp_path / "file")


def test_files_of_another_kind_are_refused(tmp_path):
    import safetensors.torch

    for kind, (save, _) in SAVERS.items():
        save(tmp_path / kind)
    with pytest.raises(CheckpointError, match="state holds 'state', where 'tensors' is expected"):
        load_tensors(tmp_path / "state")
    with pytest.raises(CheckpointError, match="tensors holds 'tensors', where 'state' is expected"):
        load_state(tmp_path / "tensors")
    with pytest.raises(CheckpointError, match="json is no safetensors file"):
        load_tensors(tmp_path / "json")
    with pytest.raises(CheckpointError, match="state is not valid JSON"):
        load_json(tmp_path / "state")
    torch.save({"w": torch.ones(1)}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="pickle is no safetensors file"):
        load_tensors(tmp_path / "pickle")
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="foreign was not written by depthfuse"):
        load_tensors(tmp_path / "foreign")
    for load in (load_tensors, load_state, load_json):
        with pytest.raises(CheckpointError, match="missing does not exist"):
            load(tmp_path / "missing")
        with pytest.raises(CheckpointError, match=f"cannot read {tmp_path}"):
            load(tmp_path)


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file that takes half of what is written to it."""

    def write(self, data):
        super().write(data[: len(data) // 2])
        fail()


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch, kind, failing):
    save, load = SAVERS[kind]
    save(tmp_path / "file")
    before = (tmp_path / "file").read_bytes()

    if failing == "write":
        monkeypatch.setattr(checkpoint, "open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path / 'file'}: No space left on device"):
        save(tmp_path / "file")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == before
    assert leftovers(tmp_path) == []
    load(tmp_path / "file")


def test_a_file_that_the_system_refuses_to_grow_leaves_the_old_one(tmp_path):
    """The kernel itself cuts the write short, at the size limit of the process."""
    code = (
        "import resource, runpy, signal, sys, torch\n"
        "checkpoint = runpy.run_path(sys.argv[2])\n"
        "save_tensors = checkpoint['save_tensors']\n"
        "save_tensors(sys.argv[1], {'w': torch.zeros(10)})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save_tensors(sys.argv[1], {'w': torch.ones(100_000)})\n"
        "except checkpoint['CheckpointError'] as error:\n"
        "    print(error)\n"
    )
    path = tmp_path / "w"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path), checkpoint.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"cannot write {path}: File too large" in result.stdout
    assert load_tensors(path)[0]["w"].equal(torch.zeros(10))
    assert leftovers(tmp_path) == []


def test_a_killed_writer_leaves_the_old_file_and_its_rest_is_cleared(tmp_path):
    code = (
        "import os, runpy, signal, sys, torch\n"
        "save_tensors = runpy.run_path(sys.argv[2])['save_tensors']\n"
        "save_tensors(sys.argv[1], {'w': torch.zeros(10)})\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_tensors(sys.argv[1], {'w': torch.ones(10)})\n"
    )
    path = tmp_path / "w"
    result = subprocess.run([sys.executable, "-c", code, str(path), checkpoint.__file__])
    assert result.returncode == -signal.SIGKILL
    assert load_tensors(path)[0]["w"].equal(torch.zeros(10))
    assert len(leftovers(tmp_path)) == 1
    save_tensors(path, {"w": torch.full((10,), 2.0)})
    assert leftovers(tmp_path) == []
    assert load_tensors(path)[0]["w"].equal(torch.full((10,), 2.0))


def test_a_folder_on_its_way_is_cleared_too(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    left = tmp_path / f".net.pte.{dead.stdout.strip()}-0123456789ab.tmp"
    left.mkdir()
    (left / "net.pte").write_text("half of it")
    with checkpoint.temporary_beside(tmp_path / "net.pte") as place:
        place.mkdir()
        (place / "net.pte").write_text("whole")
        assert list(tmp_path.iterdir()) == [place]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path / 'file' / 'w'}"):
        save_tensors(tmp_path / "file" / "w", {})


def test_folders_are_created_and_files_follow_the_umask(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    old = os.umask(0o022)
    try:
        save_json(path, [1, 2])
    finally:
        os.umask(old)
    assert json.loads(path.read_text())["content"] == load_json(path) == [1, 2]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", SAVERS)
def test_threads_may_save_to_one_path_at_once(tmp_path, kind):
    save, load = SAVERS[kind]
    path = tmp_path / "file"
    save(path)
    expected = load(path)

    def work(index):
        if index % 3:
            save(path)
        assert same(load(path), expected)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(120)))
    assert leftovers(tmp_path) == []


def test_a_leftover_of_a_dead_process_with_our_number_is_cleared(tmp_path):
    others = [
        f".w.{os.getpid()}.tmp",
        f".w.{os.getpid()}-0a1b.tmp",
        ".w.99999999999999-0a1b.tmp",
        ".w.abc.tmp",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    save_tensors(tmp_path / "w", {})
    assert leftovers(tmp_path) == [".w.abc.tmp"]  # not ours


STRUCTURES = (
    "3",
    "[]",
    '"x"',
    '{"dict": 3}',
    '{"dict": [[1]]}',
    '{"dict": [[[], 1]]}',
    '{"tensor": "x"}',
    "{}",
)
STRUCTURES += (
    '{"dict": [["a", {"tensor": [1]}]]}',
    '{"set": []}',
    '{"tuple": 3}',
    '{"dict": [["a", {"b": 1, "c": 2}]]}',
)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_state_of_a_malformed_structure_is_refused(tmp_path, structure):
    checkpoint._save(tmp_path / "s", "state", {"w": torch.ones(2)}, json.loads(structure))
    with pytest.raises(CheckpointError, match="s is damaged"):
        load_state(tmp_path / "s")


def test_states_and_documents_nest_as_deep_as_they_can_be_read(tmp_path):
    deep = [1]
    for _ in range(120):
        deep = [deep]
    for save, value in ((save_json, deep), (save_state, {"a": deep})):
        with pytest.raises(CheckpointError, match="cannot write .*nested deeper"):
            save(tmp_path / "x", value)
    for _ in range(100_000):
        deep = [deep]
    for save, value in ((save_json, deep), (save_state, {"a": deep})):
        with pytest.raises(CheckpointError, match="cannot write"):
            save(tmp_path / "x", value)


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HUGE = {"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}
FILES = {
    "huge shape": safetensors_file(HUGE),
    "overflowing shape": safetensors_file(
        {"w": {"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [0, 0]}}
    ),
    "negative shape": safetensors_file({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}),
    "deep header": safetensors_file(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "deep list": safetensors_file(b'{"__metadata__":' + b"[" * 900 + b"]" * 900 + b"}"),
    "deep metadata": safetensors_file({"__metadata__": {"depthfuse": "[" * 100_000}}),
    "no string": safetensors_file({"__metadata__": {"depthfuse": 3}}),
    "no object": safetensors_file({"__metadata__": {"depthfuse": "[]"}}),
    "null": safetensors_file({"__metadata__": {"depthfuse": "null"}}),
    "null header": safetensors_file(b"null"),
    "list header": safetensors_file(b"[]"),
    "latin-1": safetensors_file('{"é": 1}'.encode("latin-1")),
    "endless header": (2**63).to_bytes(8, "little") + b"{}",
    "large header": (2**30).to_bytes(8, "little") + b"{}",
    "short": b"\0" * 7,
    "empty": b"",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("load", [load_tensors, load_state, checkpoint.load_foreign_tensors])
def test_crafted_files_are_refused(tmp_path, name, load):
    (tmp_path / "crafted").write_bytes(FILES[name])
    try:
        loaded = load(tmp_path / "crafted")
    except CheckpointError as error:
        assert "crafted" in str(error)
    else:  # somebody's tensors, of nothing
        assert load is checkpoint.load_foreign_tensors
        assert all(tensor.numel() == 0 for tensor in loaded.values())


def test_a_document_without_a_checksum_is_named(tmp_path):
    path = tmp_path / "old.json"
    for document in ({"whole": 3.0}, [], None, {"format": "depthfuse.json/0", "content": 1}):
        path.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match="old.json carries no checksum"):
            load_json(path)
    for document in ({"format": checkpoint.JSON_FORMAT}, {"format": checkpoint.JSON_FORMAT, "content": 1}):
        path.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match="checksum does not match"):
            load_json(path)
    save_json(path, {"whole": 3.0})
    path.write_text(path.read_text().replace("3.0", "8.0"))
    with pytest.raises(CheckpointError, match="checksum does not match"):
        load_json(path)


def test_a_document_of_another_shape_is_named(tmp_path):
    save_json(tmp_path / "j", {"whole": "3"})
    with pytest.raises(CheckpointError, match="j is of another kind .*the document.whole is str '3'"):
        load_json(tmp_path / "j", {"whole": float})


def test_a_document_larger_than_any_of_ours_is_refused(tmp_path):
    with open(tmp_path / "j", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match="j is larger than"):
        load_json(tmp_path / "j")
