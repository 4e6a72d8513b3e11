"""A training step without numbers: the model's own code runs on tensors that have shapes and no memory.

Every operation of forward and backward pass is seen as torch dispatches it, on whatever method, attention or
checkpointing the model has. What is alive at the worst moment is the step's peak memory, and the operations, each
measured once on this machine, are its time.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from veneer import machine

# They ask for memory or look at a tensor, and compute nothing.
_IDLE = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "device",
    "lift_fresh",
    "_unsafe_view",
)
# Known to torch's counter of operations under the name of what they do elsewhere.
_SAME_WORK = {"addmm_": torch.ops.aten.addmm, "baddbmm_": torch.ops.aten.baddbmm}


@dataclass(frozen=True)
class Shape:
    """What an operation was given for a tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def make(self, device: torch.device) -> Tensor:
        """A tensor of this shape: ones, or zeros where they are indices."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        kind = torch.ones if self.dtype.is_floating_point else torch.zeros
        flat = kind(extent if 0 not in self.size else 0, dtype=self.dtype, device=device)
        return flat.as_strided(self.size, self.stride)


@dataclass
class Call:
    """An operation with what it was given, and how often.

    Args:
        run: The operation.
        args: Its arguments, shapes in place of tensors.
        kwargs: Named ones likewise.
        count: How often it was called so.
        flops: Floating-point operations of all these calls.
        bytes: Read and written by one call.
    """

    run: Any
    args: Any
    kwargs: Any
    count: int = 0
    flops: int = 0
    bytes: int = 0


@dataclass
class Recorder:
    """What a step allocates and does.

    Args:
        phase: What memory that is allocated from now on is for.
        live: Bytes that are alive, by what they are for.
        peak: The same at the worst moment.
        calls: Operations that compute something.
    """

    phase: str = "activations"
    live: collections.Counter[str] = field(default_factory=collections.Counter)
    peak: collections.Counter[str] = field(default_factory=collections.Counter)
    calls: dict[Any, Call] = field(default_factory=dict)
    _known: dict[int, list[Any]] = field(default_factory=dict)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with _Watch(self):
            yield

    def allocated(self, tensor: Tensor) -> None:
        """Counts a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        entry = self._known[key] = [self.phase, storage.nbytes()]
        weakref.finalize(storage, self._freed, key)
        self.live[entry[0]] += entry[1]
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def known(self, tensor: Tensor) -> None:
        """Leaves out memory that was there before."""
        storage = tensor.untyped_storage()
        self._known[id(storage)] = [self.phase, 0]
        weakref.finalize(storage, self._freed, id(storage))

    def move(self, tensor: Tensor, phase: str) -> None:
        """Says what memory turned out to be for."""
        entry = self._known.get(id(tensor.untyped_storage()), [phase, 0])
        self.live[entry[0]] -= entry[1]
        entry[0] = phase
        self.live[phase] += entry[1]

    def _freed(self, key: int) -> None:
        phase, size = self._known.pop(key)
        self.live[phase] -= size

    @property
    def flops(self) -> int:
        return sum(call.flops for call in self.calls.values())

    def seconds(self, device: torch.device) -> float:
        """Time of all operations: each different one is run here, on ones."""
        return sum(call.count * _measure(call, device) for call in self.calls.values())


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if _has_memory(t)]
        made = [t for t in tree_leaves(result) if _has_memory(t)]
        ours = {id(t.untyped_storage()) for t in given}
        for tensor in made:
            if id(tensor.untyped_storage()) not in ours:
                self.recorder.allocated(tensor)
        if func._opname not in _IDLE and not _is_view(func):
            self._count(func, args, kwargs, result, [*given, *made])
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]) -> None:
        shapes, named = tree_map_only(Tensor, Shape.of, (args, kwargs))
        key = (func, str(shapes), str(named))
        call = self.recorder.calls.setdefault(key, Call(func, shapes, named))
        call.count += 1
        call.bytes = sum(t.numel() * t.element_size() for t in tensors)
        counted = flop_registry.get(_SAME_WORK.get(func._opname, func._overloadpacket))
        if counted is not None:
            plain = {k: v for k, v in kwargs.items() if k not in ("out", "beta", "alpha")}
            call.flops += counted(*args, **plain, out_val=result)


def _has_memory(value: Any) -> bool:
    """Whether it is a tensor whose memory is its own and can be seen: not a wrapper of others, not a packed weight."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not is_traceable_wrapper_subclass(value)


def _is_view(func: Any) -> bool:
    """Whether the result is what was given, seen otherwise."""
    returned = func._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def _measure(call: Call, device: torch.device) -> float:
    """Seconds of one call; where it cannot be repeated on other numbers, those of moving its bytes."""
    with torch.no_grad():
        args, kwargs = tree_map_only(Shape, lambda shape: shape.make(device), (call.args, call.kwargs))
        try:
            return machine.best_seconds(lambda: call.run(*args, **kwargs), device)
        except (RuntimeError, IndexError, NotImplementedError):
            return call.bytes / machine.memory_limit(device)


@contextmanager
def shadows(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Gives a model on the meta device tensors that claim to lie on `device`, and makes all that is made there such."""
    made: dict[int, Tensor] = {}

    def shadow(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # what is shared stays so
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
        return made[id(tensor)]

    with FakeTensorMode():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = shadow(tensor)  # type: ignore[assignment]
        yield


def step(model: nn.Module, loss: Callable[[Recorder], Tensor], passes: int = 1) -> Recorder:
    """Records forward and backward passes of a model within `shadows`.

    Args:
        model: The model.
        loss: Computes the loss; may set the recorder's phase.
        passes: How many are added up before an optimiser's step.
    """
    recorder = Recorder()
    for tensor in (*model.parameters(), *model.buffers()):
        recorder.known(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: recorder.move(p.grad, "gradients"))
        for parameter in trained
    ]
    with recorder():
        for _ in range(passes):
            recorder.phase = "activations"
            value = loss(recorder)
            recorder.phase = "temporaries"
            value.backward()
            del value
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return recorder
