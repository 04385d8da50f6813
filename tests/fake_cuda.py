"""A test double of CUDA: tensors that say they are on a card, computed on the CPU, under the rules of a card.

    with FakeCuda(cards=2):
        model.to("cuda:1")(torch.randn(1, 3, 8, 8, device="cuda:1"))

What it enforces, and a CPU would let pass:

- *Order.* Work on a stream is ordered by that stream alone. Who reads what another stream wrote, or writes what
  another one still reads, without having waited for it, gets a `Race`; so does the host.
- *Captures.* Work on the capturing stream is recorded and not done: its results are NaN until a replay. Work elsewhere
  is not recorded. Calls that a capture does not permit raise: waiting for the card, reading a value, copying from or
  to the host, waiting for work outside; in mode "global" also from other threads. A replay writes where the capture
  wrote.
- *Cards.* Work runs on the current stream of the card where its tensors are; tensors of two cards do not mix; an
  operator of oneDNN does not run on a card.
- *Memory that nobody has written* is NaN.

How: tensors stay ordinary ones on the CPU, and a table says on which card a storage is. One mode answers `x.device`
and takes devices out of calls; another sees every operator. What our code and Triton's timer use of `torch.cuda` is
replaced. What it does not cover: how fast anything is; Triton's compiler and launcher (an op of ours is one piece of
work, computed by its reference); reuse of freed memory by another stream; cuBLAS and cuDNN.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depthfuse.acceleration.planning import build
from depthfuse.acceleration.planning.program import capture

aten = torch.ops.aten
CPU = torch.device("cpu")
# How large their results are depends on values: the host waits for these.
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default}
NOT_PERMITTED = "operation not permitted when stream is capturing"


class Race(AssertionError):
    """Work was not ordered after the work that it depends on."""


class Clock(dict):
    """{stream: how much of its work is known to be done}."""

    def merge(self, other: dict) -> None:
        for stream, tick in other.items():
            self[stream] = max(self.get(stream, 0), tick)


@dataclass
class Memory:
    """What is known of a storage."""

    device: torch.device
    storage: torch.UntypedStorage  # held, so that its number is not given to another
    written: tuple[Any, int] | None = None  # (stream, tick) of the last write
    read: Clock = field(default_factory=Clock)


class Stream:
    """A stream of one card."""

    _numbers = itertools.count()

    def __init__(self, cuda: FakeCuda, device: torch.device, capturable: bool = True) -> None:
        self.cuda, self.device, self.capturable = cuda, device, capturable
        self.tick, self.seen, self.number = 0, Clock(), next(self._numbers)
        self.capture: Graph | None = None

    @property
    def cuda_stream(self) -> int:
        """The driver's name for it."""
        return self.number

    def clock(self) -> Clock:
        clock = Clock(self.seen)
        clock[self] = self.tick
        return clock

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.cuda)
        event.record(other)
        self.wait_event(event)

    def wait_event(self, event: Event) -> None:
        if self.capture is not event.capture:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        self.seen.merge(event.clock)

    def synchronize(self) -> None:
        self.cuda.wait(self.clock())

    def __repr__(self) -> str:
        return f"<stream {self.number} of {self.device}>"


class Event:
    """A moment in a stream's work."""

    def __init__(self, cuda: FakeCuda, enable_timing: bool = False) -> None:
        self.cuda, self.clock, self.capture = cuda, Clock(), None
        self.work = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        self.clock, self.capture, self.work = stream.clock(), stream.capture, self.cuda.work

    def synchronize(self) -> None:
        self.cuda.wait(self.clock)

    def elapsed_time(self, end: Event) -> float:
        """A millisecond for each piece of work in between, wherever."""
        self.cuda.host_knows(self.clock)
        self.cuda.host_knows(end.clock)
        return float(end.work - self.work)


class Graph:
    """What was captured, as a list of work that a replay does again."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.recorded, self.stream = cuda, [], None
        self.mode, self.thread, self.broken = "", 0, ""

    def capture_begin(self, pool=None, capture_error_mode: str = "global", **_: Any) -> None:
        stream = self.cuda.current_stream()
        if not stream.capturable:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self.stream, self.mode, self.thread = stream, capture_error_mode, threading.get_ident()
        stream.capture = self.cuda.capturing = self

    def capture_end(self) -> None:
        self.stream.capture = self.cuda.capturing = None
        if self.broken:
            raise RuntimeError(f"operation failed due to a previous error during capture ({self.broken})")

    def replay(self) -> None:
        stream = self.cuda.current_stream(self.stream.device)
        for work in self.recorded:
            self.cuda.run(stream, *work)

    def reset(self) -> None:
        self.recorded = []


class FakeCuda:
    """A context in which there are `cards` cards of one kind.

    capability: of the cards, as torch.cuda gives it.
    """

    def __init__(self, cards: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
        self.devices = [torch.device("cuda", index) for index in range(cards)]
        self.capability = capability
        self.current = 0
        self.default = {device: Stream(self, device, capturable=False) for device in self.devices}
        self.streams = dict(self.default)
        self.host = Clock()  # what the host has waited for
        self.memory: dict[int, Memory] = {}  # by storage
        self.capturing: Graph | None = None
        self.work = 0  # pieces done, replayed ones included
        self.replaced: Tensor | None = None
        self._modes = (_Faces(self), _Launches(self))
        self._contexts = contextlib.ExitStack()

    # What torch.cuda offers.

    def patches(self) -> dict[str, Any]:
        properties = SimpleNamespace(
            name="Test Double", major=self.capability[0], minor=self.capability[1], multi_processor_count=4,
            shared_memory_per_block_optin=232448, total_memory=2**33, warp_size=32, L2_cache_size=2**22,
        )  # fmt: skip
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: len(self.devices),
            "current_device": lambda: self.current,
            "set_device": lambda device: setattr(self, "current", self.card(device).index),
            "device": functools.partial(_OnCard, self),
            "device_of": lambda x: _OnCard(self, x.device if x.is_cuda else None),
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda *_, **__: True,
            "Stream": lambda device=None, **_: Stream(self, self.card(device)),
            "Event": functools.partial(Event, self),
            "CUDAGraph": lambda *_, **__: Graph(self),
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self.default[self.card(device)],
            "stream": functools.partial(_OnStream, self),
            "synchronize": lambda device=None: self.synchronize(self.card(device)),
            "empty_cache": lambda: None,
            "is_current_stream_capturing": lambda: self.current_stream().capture is not None,
            "memory_allocated": lambda device=None: 0,
        }

    def __enter__(self) -> FakeCuda:
        for name, value in self.patches().items():
            self._contexts.enter_context(mock.patch.object(torch.cuda, name, value))
        self._contexts.enter_context(mock.patch.object(torch.cuda.graph, "default_capture_stream", None))
        self._contexts.enter_context(
            mock.patch.object(torch._C, "_host_emptyCache", lambda: None, create=True)
        )
        self._contexts.enter_context(mock.patch.object(build, "capture", self._capture))
        for mode in self._modes:
            mode.__enter__()
        return self

    def _capture(self, model: torch.nn.Module, call: Any, dynamic: bool = True) -> Any:
        """Export looks through all modes: it sees a model on the CPU, whose program is then put on the card."""
        device = self.device_of(call.tensors[0])
        with self.away():
            program = capture(model, call, dynamic)
        for node in program.graph.graph.nodes:
            node.args, node.kwargs = (
                map_aggregate(part, lambda v: device if isinstance(v, torch.device) else v)
                for part in (node.args, node.kwargs)
            )
            for value in tree_leaves(node.meta.get("val")):
                if isinstance(value, FakeTensor):
                    value.fake_device = device
        program.graph.recompile()
        for x in [*program.graph.parameters(), *program.graph.buffers()]:
            if self.device_of(x) != device:  # a constant
                self.place(x, device)
        return program

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._contexts.close()

    @contextlib.contextmanager
    def away(self):
        """Within it tensors are what they are, on the CPU: for export, which looks through all modes."""
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        try:
            yield
        finally:
            for mode in self._modes:
                mode.__enter__()

    def card(self, device: Any = None) -> torch.device:
        """The card that is meant; the current one by default."""
        if device is None:
            return self.devices[self.current]
        if isinstance(device, int):
            return self.devices[device]
        device = torch.device(device)
        return self.devices[self.current if device.index is None else device.index]

    def current_stream(self, device: Any = None) -> Stream:
        return self.streams[self.card(device)]

    def synchronize(self, device: torch.device) -> None:
        clock = Clock({stream: stream.tick for stream in self.all_streams() if stream.device == device})
        self.wait(clock)

    def all_streams(self):
        known = {*self.streams.values(), *self.default.values()}
        for memory in self.memory.values():
            known |= set(memory.read) | ({memory.written[0]} if memory.written else set())
        return known

    # The host and the card.

    def wait(self, clock: Clock) -> None:
        """Let the host wait for work."""
        self.permitted("waiting for the card")
        self.host.merge(clock)

    def host_knows(self, clock: Clock) -> None:
        for stream, tick in clock.items():
            if self.host.get(stream, 0) < tick:
                raise Race(f"the host has not waited for {stream}")

    def permitted(self, what: str) -> None:
        """Raise where a capture does not permit what waits for a card, or is unsafe beside one."""
        graph = self.capturing
        own = graph is not None and graph.thread == threading.get_ident()
        if graph is not None and (own or graph.mode == "global"):
            graph.broken = what
            raise RuntimeError(f"{NOT_PERMITTED}: {what}")

    def device_of(self, x: Tensor) -> torch.device:
        if x.layout != torch.strided or x.device.type != "cpu":
            return x.device
        memory = self.memory.get(_key(x))
        return memory.device if memory else CPU

    def place(self, x: Tensor, device: torch.device) -> None:
        """Note on which card a tensor's storage is; one that was freed may have left its number behind."""
        if x.layout != torch.strided or x.device.type != "cpu":
            return
        if device.type == "cuda":
            self.memory[_key(x)] = Memory(device, x.untyped_storage())
        else:
            self.memory.pop(_key(x), None)

    def move(self, x: Tensor, device: torch.device, stream_waits: bool = True) -> Tensor:
        """A copy of a tensor's values on another device."""
        source = self.device_of(x)
        if source.type == "cuda" and device.type == "cpu":
            self.permitted("copying to the host")
            self.read_by_host([x])
        elif source.type == "cpu" and device.type == "cuda":
            self.permitted("copying from pageable memory")
        y = x.detach().clone(memory_format=torch.preserve_format)
        self.place(y, device)
        if device.type == "cuda":
            stream = self.current_stream(device)
            self._wait_across(stream, source)
            self._order(stream, [x] if source.type == "cuda" else [], [y])
        return y

    def _wait_across(self, stream: Stream, source: torch.device) -> None:
        """A copy between cards is ordered after the current streams of both."""
        if source.type == "cuda" and source != stream.device:
            stream.seen.merge(self.current_stream(source).clock())

    def read_by_host(self, tensors: list[Tensor]) -> None:
        """What a blocking copy does: it waits for the current stream, and for no other."""
        for x in tensors:
            device = self.device_of(x)
            if device.type == "cuda":
                self.host.merge(self.current_stream(device).clock())
                written = self.memory[_key(x)].written
                if written is not None:
                    self.host_knows(Clock([written]))

    def launch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operator, on the card where its tensors are."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        places = {self.device_of(x) for x in tensors}
        cards = {device for device in places if device.type == "cuda"}
        if not cards:
            outputs = func(*args, **kwargs)
            for y in _fresh(outputs, tensors):
                self.place(y, CPU)
            return outputs
        if len(cards) > 1 and func is not aten.copy_.default:
            raise RuntimeError(f"tensors on {' and '.join(sorted(map(str, cards)))}: {func}")
        if func is aten.copy_.default and len(places) > 1:
            return self._copy(*args)
        if any(self.device_of(x).type == "cpu" and x.dim() for x in tensors) and "index" not in str(func):
            raise RuntimeError(f"tensors on the CPU and on a card: {func}")
        if func.namespace in ("mkldnn", "mkldnn_prepacked"):
            raise RuntimeError(f"{func} does not run on a card")
        card = cards.pop()
        stream, written = self.current_stream(card), _written(func, args, kwargs)
        before = [x.clone() for x in written] if stream.capture is not None else []
        outputs = func(*args, **kwargs)
        fresh = _fresh(outputs, tensors)
        for y in fresh:
            self.place(y, card)
        if func in SIZED_BY_VALUES or not any(isinstance(y, Tensor) for y in tree_leaves(outputs)):
            self.permitted(f"reading a value ({func})")
            self.read_by_host(tensors)
        elif not fresh and not written:
            pass  # a view
        elif stream.capture is None:
            if _gives_garbage(func):
                _spoil(fresh)
            self._order(stream, tensors, [*fresh, *written])
        else:  # not done: the outputs are there, and hold nothing
            for x, old in zip(written, before, strict=True):
                x.copy_(old)
            _spoil(fresh)
            stream.capture.recorded.append((func, args, kwargs, outputs, fresh, tensors))
        return outputs

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        to, come = self.device_of(target), self.device_of(source)
        if source.dim() or come.type == "cuda":
            self.permitted("copying from or to the host, or another card")
        if to.type == "cpu":
            self.read_by_host([source])
        else:
            self._wait_across(self.current_stream(to), come)
            self._order(self.current_stream(to), [source] if come.type == "cuda" else [], [target])
        return aten.copy_.default(target, source, non_blocking)

    def run(
        self, stream: Stream, func: Any, args: tuple, kwargs: dict, outputs: Any, fresh: list, tensors: list
    ) -> None:
        """What was recorded, into the memory of the capture."""
        self._order(stream, tensors, [*fresh, *_written(func, args, kwargs)])
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            again = [y for y in tree_leaves(func(*args, **kwargs)) if isinstance(y, Tensor)]
            kept = [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]
            for old, new in zip(kept, again, strict=True):
                if any(old is y for y in fresh):
                    old.copy_(new)

    def _order(self, stream: Stream, read: list[Tensor], written: list[Tensor]) -> None:
        stream.tick += 1
        self.work += 1
        stream.seen.merge(self.host)  # what the host has waited for is done
        known = stream.clock()

        def after(other: Any, tick: int, what: str) -> None:
            if known.get(other, 0) < tick:
                raise Race(f"{stream} {what} {other} without having waited for it")

        for x in read:
            memory = self.memory.get(_key(x))
            if memory is None:
                continue
            if memory.written is not None:
                after(*memory.written, "reads what was written on")
            memory.read[stream] = stream.tick
        for x in written:
            memory = self.memory.setdefault(_key(x), Memory(stream.device, x.untyped_storage()))
            if memory.written is not None:
                after(*memory.written, "writes over what was written on")
            for other, tick in memory.read.items():
                after(other, tick, "writes over what is read on")
            memory.written, memory.read = (stream, stream.tick), Clock()


def _key(x: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata


def _fresh(outputs: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs that have memory of their own."""
    known = {_key(x) for x in inputs if x.layout == torch.strided}
    found = [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.layout == torch.strided]
    return [y for y in found if _key(y) not in known]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    schema = func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    names = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in names for x in tree_leaves(given.get(name)) if isinstance(x, Tensor)]


def _gives_garbage(func: Any) -> bool:
    return func._schema.name.split("::")[1].split(".")[0] in (
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
    )


def _spoil(tensors: list[Tensor]) -> None:
    for y in tensors:
        y.fill_(float("nan") if y.is_floating_point() or y.is_complex() else 0)


class _OnCard:
    """torch.cuda.device."""

    def __init__(self, cuda: FakeCuda, device: Any) -> None:
        self.cuda, self.device = cuda, None if device is None else cuda.card(device)

    def __enter__(self) -> None:
        self.before = self.cuda.current
        if self.device is not None:
            self.cuda.current = self.device.index

    def __exit__(self, *_: object) -> None:
        self.cuda.current = self.before


class _OnStream:
    """torch.cuda.stream: makes a stream, and its card, the current ones."""

    def __init__(self, cuda: FakeCuda, stream: Stream | None) -> None:
        self.cuda, self.stream = cuda, stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.before = self.cuda.current, self.cuda.streams[self.stream.device]
            self.cuda.current = self.stream.device.index
            self.cuda.streams[self.stream.device] = self.stream

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.cuda.current, self.cuda.streams[self.stream.device] = self.before


class _Launches(TorchDispatchMode):
    """Sees every operator."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # an op of ours sees what it is given: tensors on the CPU
            return self.cuda.launch(func, args, kwargs or {})


class _Faces(TorchFunctionMode):
    """Answers what a tensor says of its device, and takes devices out of calls."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        answer = _FACES.get(func)
        if answer is not None:
            return answer(self.cuda, *args, **kwargs)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.__deepcopy__:
            twin, device = func(*args, **kwargs), self.cuda.device_of(args[0])
            if device.type == "cuda" and self.cuda.device_of(twin).type == "cpu":
                self.cuda.place(twin, device)
            return twin
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return func(*args, **kwargs)
        card = self.cuda.card(device)
        made = func(*args, **{**kwargs, "device": "cpu"})
        if isinstance(made, Tensor):
            self.cuda.place(made, card)
            if getattr(func, "__name__", "") in ("empty", "empty_like", "empty_strided", "new_empty"):
                with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                    _spoil([made])
            stream = self.cuda.current_stream(card)
            if stream.capture is None:
                self.cuda._order(stream, [], [made])
        return made

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (self.cuda.device_of(args[0]), args[0].dtype, *args[1:])
        if isinstance(kwargs.get("device"), int) or (args and isinstance(args[0], int)):
            raise TypeError("give a device by its name")
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        own = self.cuda.device_of(x)
        if device is not None:
            device = self.cuda.card(device) if device.type == "cuda" else device
        y = x
        if device is not None and device != own:
            y = self.cuda.move(x, device)
        rest = {"dtype": dtype or y.dtype, "copy": kwargs.get("copy", False) and y is x}
        if layout is not None:
            rest["memory_format"] = layout
        return Tensor.to(y, **rest)


def _cpu(cuda: FakeCuda, x: Tensor, **_: Any) -> Tensor:
    return cuda.move(x, CPU) if cuda.device_of(x).type == "cuda" else x


def _on_card(cuda: FakeCuda, x: Tensor, device: Any = None, **_: Any) -> Tensor:
    card = cuda.card(device)
    return x if cuda.device_of(x) == card else cuda.move(x, card)


def _numpy(cuda: FakeCuda, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if cuda.device_of(x).type == "cuda":
        raise TypeError("can't convert cuda tensor to numpy: use Tensor.cpu() first")
    return Tensor.numpy(x, *args, **kwargs)


_FACES = {
    Tensor.device.__get__: lambda cuda, x: cuda.device_of(x),
    Tensor.is_cuda.__get__: lambda cuda, x: cuda.device_of(x).type == "cuda",
    Tensor.is_cpu.__get__: lambda cuda, x: cuda.device_of(x).type == "cpu",
    Tensor.get_device: lambda cuda, x: getattr(cuda.device_of(x), "index", None) or 0,
    Tensor.cpu: _cpu,
    Tensor.cuda: _on_card,
    Tensor.numpy: _numpy,
}
