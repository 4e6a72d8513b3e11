"""The frozen part of a model, computed once for every example.

Where only upper layers are trained, what the blocks below give for an example is the same in every epoch. It is kept at
the boundary (`kept_rows.py`), and the blocks below are passed over from then on. All that a model does beside its
blocks still runs, for blocks above may need it: masks, positions, rotations.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from veneer.attention import RowMask
from veneer.attention import Rows as Layout
from veneer.errors import UnsupportedError
from veneer.model import PeftModel
from veneer.stores import rounds_inputs
from veneer.training import boundary
from veneer.training.kept_rows import Rows
from veneer.training.row_keys import loss_at_padding, row_keys

_ORDER = "the blocks do not run once each and in their order"
_CHECKPOINTED = "gradient_checkpointing"
# Relative to the largest element: what another padding may change by rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Settings that say nothing about what blocks compute.
_NAMES = ("_name_or_path", "transformers_version", "use_cache", "architectures", "id2label", "label2id")


@dataclass
class _Call:
    """One call of the model.

    Attributes:
        keys: One for each row.
        mask: Which positions are real, (rows, longest); none where all are.
        known: Whether all rows are kept.
        graph: Whether the hidden states are to ask for gradients, as segments that are computed again need it.
        done: How many blocks have been passed.
    """

    keys: list[bytes]
    mask: Tensor | None
    known: bool
    graph: bool = False
    done: int = 0


class _Boundary(Exception):  # noqa: N818  # no error: leaves a model where what comes after is of no interest
    def __init__(self, output: Any) -> None:
        self.output = output


class FrozenPart:
    """The blocks below the first one in which something is trained.

    Within `with part(rows):` calls of the model pass over these blocks where all examples of the batch are in `rows`,
    and otherwise compute them and add them. No graph is built below the boundary either way.

    Args:
        model: The model, adapted or not, as it is trained.
        batch: Gives some examples of unequal length, to try on. Asked once it is known that blocks are frozen.
        dropout: Whether the frozen part may have dropout. It then runs without.

    Raises:
        UnsupportedError: There is no frozen part, or what it gives cannot be seen from outside; with the reason.
    """

    keeps_nothing: str | None = None
    """Why rows must not be kept; none where they can be. The graph ends at the boundary even so."""

    def __init__(self, model: nn.Module, batch: Callable[[], Mapping[str, Any]], dropout: bool = False) -> None:
        self.base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._names = list(inspect.signature(self.base.forward).parameters)
        modules = dict(self.base.named_modules())
        paths = boundary.stack(self.base, modules)
        blocks = [modules[path] for path in paths]
        self.total = len(blocks)
        self.frozen = next((i for i, block in enumerate(blocks) if boundary.is_trained(block)), self.total)
        if not self.frozen:
            raise UnsupportedError(f"the first of {self.total} blocks is trained")
        boundary.refuse(self.base)
        self._blocks = blocks[: self.frozen]
        self._call: _Call | None = None
        self._rows: Rows | None = None
        self._from_edge = True
        self.without_dropout = False
        self._quiet = ExitStack()
        training = model.training
        model.train()
        try:
            shown = batch()
            hidden, before = self._trace(shown, blocks)
            boundary.check_trained(model, self.base, before, blocks[self.frozen :])
            # Embeddings and the like, and all of the frozen blocks; not what also holds blocks above.
            holding = {id(modules[path[:end]]) for path in paths for end in _ends(path)} | {id(self.base)}
            self._below = [m for m in before if id(m) not in holding]
            self._below += [inner for block in self._blocks for inner in block.modules()]
            self._look(shown, hidden, dropout)
        finally:
            model.train(training)
        self._state = self._versions()

    @property
    def token_bytes(self) -> int:
        """Bytes of one position."""
        return self.width * self.dtype.itemsize

    @contextmanager
    def __call__(self, rows: Rows | None) -> Iterator[None]:
        """Passes over the frozen blocks where it can.

        Args:
            rows: What is kept; none keeps nothing.
        """
        if rows is not None and self._state != (state := self._versions()):
            rows.clear()  # of other weights
            self._state = state
        self._rows = rows
        own = ("forward", _CHECKPOINTED)
        before = [{name: vars(block)[name] for name in own if name in vars(block)} for block in self._blocks]
        hooks = [
            self.base.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            self.base.register_forward_hook(self._end, always_call=True),
        ]
        try:
            for i, block in enumerate(self._blocks):
                block.forward = self._passing(i, block.forward)
                if getattr(block, _CHECKPOINTED, False):  # without a graph there is nothing to compute again
                    setattr(block, _CHECKPOINTED, False)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._call = self._rows = None
            for block, attributes in zip(self._blocks, before, strict=True):
                for name in own:
                    if name in attributes:
                        setattr(block, name, attributes[name])
                    elif name in vars(block):
                        delattr(block, name)

    def identity(self) -> dict[str, Any]:
        """What rows depend on beside their key; reads all frozen weights.

        Raises:
            UnsupportedError: A weight is of a kind whose bytes are not known, or is not in memory.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self._tensors().items():
            if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_meta:
                raise UnsupportedError(
                    f"a file could not tell whose it is: the bytes of {name} ({type(tensor).__name__} on "
                    f"{tensor.device}) are not known. Keep it in memory"
                )
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        config = getattr(self.base, "config", None)
        settings = {k: v for k, v in (config.to_dict() if config is not None else {}).items() if k not in _NAMES}
        return {
            "model": type(self.base).__name__,
            "attention": str(getattr(config, "_attn_implementation", "")),
            "blocks": f"{self.frozen} of {self.total}",
            "dropout": not self.without_dropout,
            "weights": digest.hexdigest(),
            "settings": hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=16).hexdigest(),
            "from edge": self._from_edge,
            "width": self.width,
            "dtype": str(self.dtype),
            "torch": torch.__version__,
        }

    # ---- In the model ----

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._call = None
        self._quiet.enter_context(self._dropout_as_asked())
        if torch.is_inference_mode_enabled():
            return None  # its tensors cannot be used where gradients are wanted
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        rows = self._rows
        if rows is None:
            if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values()):
                self._call = _Call([], None, False)
        elif not loss_at_padding(inputs) and (told := row_keys(inputs, self._from_edge)) is not None:
            self._call = _Call(*told, all(key in rows for key in told[0]))
            if "use_cache" in self._names:  # a cache would lack what the frozen blocks put into it
                return args, {**kwargs, "use_cache": False}
        return None

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._quiet.close()

    def _passing(self, i: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Stands in for the forward function of the i-th block."""
        last = i == self.frozen - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is None:
                return original(*args, **kwargs)
            if i != call.done:
                raise UnsupportedError(_ORDER)
            call.done += 1
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            packed = _layout(args, kwargs) if last else None
            if i == 0:
                call.graph = x.requires_grad and torch.is_grad_enabled()
            if call.known:
                y = self._kept(call, x, packed) if last else x
            else:
                with torch.no_grad():
                    y = _hidden_states(original(*args, **kwargs))
                if last:
                    self._keep(call, y, packed)
            y = y.detach().requires_grad_() if last and call.graph else y
            return y if self._rest is None else (y, *self._rest)

        return forward

    def _kept(self, call: _Call, like: Tensor, packed: Layout | None) -> Tensor:
        """The kept rows, padded as the mask says, or packed."""
        assert self._rows is not None
        flat = self._rows.get(call.keys).to(like.device, non_blocking=True)  # (total, width)
        if call.mask is None:
            return flat.view(*like.shape[:2], -1)
        y = flat.new_zeros(*call.mask.shape, flat.shape[-1])
        y[call.mask.to(y.device)] = flat
        return y if packed is None else packed.pack(y)

    def _keep(self, call: _Call, y: Tensor, packed: Layout | None) -> None:
        if self._rows is None:
            return
        if packed is not None:
            y = packed.unpack(y)
        if call.mask is None:
            parts: Sequence[Tensor] = y.reshape(len(call.keys), -1, y.shape[-1]).unbind()
        else:
            parts = y[call.mask.to(y.device)].split(call.mask.sum(1).tolist())
        self._rows.put(call.keys, parts)

    # ---- What is looked at before ----

    def _trace(self, batch: Mapping[str, Any], blocks: Sequence[nn.Module]) -> tuple[Tensor, list[nn.Module]]:
        """Hidden states at the boundary, and the modules that run before it."""
        order: list[nn.Module] = []
        hooks = [m.register_forward_pre_hook(lambda m, args: order.append(m)) for m in self.base.modules()]
        try:
            output = self._until_boundary(batch)
        finally:
            for hook in hooks:
                hook.remove()
        ids = {id(block) for block in blocks}
        if [id(m) for m in order if id(m) in ids] != [id(block) for block in self._blocks]:
            raise UnsupportedError(_ORDER)
        self._rest = output[1:] if isinstance(output, tuple) else None
        if self._rest is not None and any(value is not None for value in self._rest):
            raise UnsupportedError("the frozen blocks give more than hidden states")
        hidden = _hidden_states(output)
        tokens = batch.get("input_ids", batch.get("inputs_embeds"))
        if hidden.dim() != 3 or (tokens is not None and hidden.shape[:2] != tokens.shape[:2]):
            raise UnsupportedError(f"hidden states of shape {tuple(hidden.shape)} are not (rows, length, width)")
        self.width, self.dtype = hidden.shape[-1], hidden.dtype
        return hidden, list(dict.fromkeys(order))

    def _until_boundary(self, batch: Mapping[str, Any]) -> Any:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Boundary(output)

        hook = self._blocks[-1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                self.base(**{**batch, **({"use_cache": False} if "use_cache" in self._names else {})})
        except _Boundary as reached:
            return reached.output
        finally:
            hook.remove()
        raise UnsupportedError("the frozen blocks did not run")

    def _hidden(self, batch: Mapping[str, Any]) -> Tensor:
        with self._dropout_as_asked():
            return _hidden_states(self._until_boundary(batch))

    def _look(self, batch: Mapping[str, Any], hidden: Tensor, dropout: bool) -> None:
        """Finds out whether the frozen part gives the same each time, whatever stands beside an example."""
        if loss_at_padding(batch):
            raise UnsupportedError("rows are padded on the left and begin with a label: the loss looks at padding")
        told = row_keys(batch, True)
        if told is None:
            raise UnsupportedError("the model is called with something by which examples cannot be told apart")
        _, mask = told
        real: Any = ... if mask is None else mask.to(hidden.device)
        if not _alike(self._hidden(batch)[real], hidden[real], 1e-6):
            self.without_dropout = dropout
            hidden = self._hidden(batch)
            if not _alike(self._hidden(batch)[real], hidden[real], 1e-6):
                has_dropout = any(isinstance(m, nn.Dropout) and m.p for m in self._below)
                self.keeps_nothing = (
                    "the frozen blocks use dropout and give something else each time. With training.frozen_part=memory "
                    "or =disk they run without it"
                    if has_dropout and not dropout
                    else "the frozen blocks compute something at random"
                )
                return
        if mask is None or bool(mask.all()):
            return  # no padding to see the effect of: columns count from the edge
        # The shortest row without its padding: all that is beside it is away, and it begins at the edge.
        row = int(mask.sum(1).argmin())
        columns = mask[row].nonzero()[:, 0].to(hidden.device)
        alone = {name: _row(value, row, columns, mask) for name, value in batch.items()}
        coarse = 5e-2 if rounds_inputs(self.base) else None
        alike = _alike(self._hidden(alone)[0], hidden[row, columns], coarse)
        at_edge = int(columns[-1]) + 1 == len(columns)
        self._from_edge = at_edge or not alike
        if at_edge and not alike:
            self.keeps_nothing = "the frozen blocks look at padding"

    @contextmanager
    def _dropout_as_asked(self) -> Iterator[None]:
        training = [m for m in self._below if m.training] if self.without_dropout else []
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _tensors(self) -> dict[str, Tensor]:
        """The frozen tensors, each once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for i, module in enumerate(self._below):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    found.setdefault(id(tensor), (f"{i}.{name}", tensor))
        return dict(found.values())

    def _versions(self) -> list[tuple[Any, ...]]:
        """Something else after every change of a frozen tensor."""
        return [(id(tensor), tensor._version, tensor.dtype) for tensor in self._tensors().values()]


def _ends(path: str) -> list[int]:
    """Lengths of the paths of all modules above."""
    return [i for i, letter in enumerate(path) if letter == "."]


def _hidden_states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _layout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Layout | None:
    """How rows are packed that come without their padding (`packing.py`); none where they are padded."""
    return next((leaf.rows for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, RowMask)), None)


def _row(value: Any, row: int, columns: Tensor, mask: Tensor) -> Any:
    """One row of an argument, and of that the given columns."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    value = value[row : row + 1] if value.shape[0] == len(mask) else value
    return value[:, columns.to(value.device)] if value.shape[1:2] == mask.shape[1:] else value


def _alike(one: Tensor, other: Tensor, tolerance: float | None = None) -> bool:
    """Whether they are equal up to a difference relative to the largest element."""
    if one.shape != other.shape:
        return False
    allowed = (_TOLERANCE[one.dtype] if tolerance is None else tolerance) * float(other.abs().max().clamp_min(1e-12))
    return bool((one - other).abs().max() <= allowed)
