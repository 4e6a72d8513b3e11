"""The attention hook: one function around the attention that a model has already.

transformers models look their attention function up by name, and the function that makes their masks by the same name.
`hooked("sdpa")` registers a pair of our own that wraps the present one, and gives its name. Where nothing is to be
added it only passes on. What it adds:

- Attention over packed rows: the real tokens of all rows of a batch stand one after the other, and each row attends to
  itself alone, by the model's own rule (causal, within a window ...).
- Prefixes: keys and values that every query may attend to, beside its own. They are no part of any cache, so caches of
  every kind work with them.

The layout of packed rows travels as the attention mask (`RowMask`), so that blocks which are computed again in the
backward pass find it where they found it before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.errors import UnsupportedError
from veneer.prompting.prefixes import FLASH, PREFIXES, Prefix, with_prefixes

_PREFIX = "veneer_"
CAUSAL = "causal"
"""In place of a mask: each token attends to itself and those before it."""
SEES = "veneer_sees"
"""Name of the argument of attention modules that holds a function to be shown the keys and values."""


def hooked(present: str) -> str:
    """Name of the attention implementation that wraps `present`, registered with transformers.

    Args:
        present: `eager`, `sdpa`, one of the `flash_attention` family, or a name that this function gave.

    Raises:
        UnsupportedError: Another one.
    """
    if present.startswith(_PREFIX):
        return present
    if present not in ("eager", "sdpa") and not present.startswith(FLASH):
        raise UnsupportedError(f"attention implementation {present!r} cannot be wrapped (eager, sdpa and flash can)")
    name = _PREFIX + present
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attend, present))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, functools.partial(_mask, present))
    return name


class Rows:
    """Where the real tokens of a padded batch are, packed and unpacked.

    Packed, rows stand in order of their length, so that rows of equal length are one contiguous piece.

    Args:
        real: (rows, longest), true where a token is.
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real
        lengths = real.sum(1).tolist()
        order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: lengths[row])
        columns = [real[row].nonzero()[:, 0] for row in order]
        self.lengths = [lengths[row] for row in order]
        self.index = torch.cat([row * real.shape[1] + at for row, at in zip(order, columns, strict=True)])  # (total,)
        self.groups: list[tuple[Tensor, Tensor]] = []
        """Rows of equal length: their numbers (n,), and where in the row their tokens stand (n, length)."""
        for length in sorted(set(self.lengths)):
            members = [i for i, other in enumerate(self.lengths) if other == length]
            numbers = torch.tensor([order[i] for i in members], device=real.device)
            self.groups.append((numbers, torch.stack([columns[i] for i in members])))
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}

    def pack(self, x: Tensor) -> Tensor:
        """(rows or 1, longest, ...) -> (1, total, ...)."""
        wide = x.expand(len(self.real), *x.shape[1:])
        return wide.flatten(0, 1).index_select(0, self.index)[None]

    def pack_once(self, x: Tensor) -> Tensor:
        """As `pack`, for what all blocks are given alike."""
        if id(x) not in self._packed:
            self._packed[id(x)] = (x, self.pack(x))  # kept alive, so that no other tensor gets its number
        return self._packed[id(x)][1]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, total, ...) -> (rows, longest, ...), zero where no token is."""
        flat = x.new_zeros(self.real.numel(), *x.shape[2:]).index_copy(0, self.index, x[0])
        return flat.unflatten(0, self.real.shape)

    @functools.cached_property
    def bounds(self) -> Tensor:
        """Where each row begins and the last one ends, int32 (rows + 1,), as kernels of variable length want it."""
        ends = torch.tensor([0, *self.lengths], device=self.real.device).cumsum(0)
        return ends.to(torch.int32)

    @functools.cached_property
    def slots(self) -> Tensor:
        """Inverse of `index`: which packed token stands at each place, (rows * longest,); the first where none does."""
        slots = self.index.new_zeros(self.real.numel())
        return slots.index_copy(0, self.index, torch.arange(len(self.index), device=slots.device))


class RowMask:
    """The attention mask of packed rows: the model's own, restricted to each row.

    Args:
        rows: The layout.
        given: What the model would have its mask made from.
    """

    def __init__(self, rows: Rows, given: dict[str, Any]) -> None:
        self.rows = rows
        self._given = given

    @functools.cached_property
    def within(self) -> list[Tensor | str | None]:
        """What may attend to what in each group of rows, (n, 1, length, length); `CAUSAL`; or none for everything."""
        rule = self._given["mask_function"]
        if rule is bidirectional_mask_function:
            return [None] * len(self.rows.groups)
        if rule is causal_mask_function:
            return [CAUSAL] * len(self.rows.groups)
        return [_plain(self._part(rule, numbers, at)) for numbers, at in self.rows.groups]

    def _part(self, rule: Callable[..., Tensor], numbers: Tensor, at: Tensor) -> Tensor:
        if self._given.get("use_vmap"):  # a rule that cannot be asked for chosen places
            return self.whole[numbers[:, None, None], 0, at[:, :, None], at[:, None, :]][:, None]
        places = (numbers[:, None, None, None], numbers.new_zeros(1, 1, 1, 1), at[:, None, :, None], at[:, None, None])
        return rule(*places).expand(len(at), 1, at.shape[1], at.shape[1])

    @functools.cached_property
    def whole(self) -> Tensor:
        """The mask of the padded batch, (rows, 1, longest, longest)."""
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = sdpa_mask(**{**self._given, **skips})  # type: ignore[assignment]  # none where it is skipped
        return mask

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UnsupportedError("computes with its attention mask itself")


def _plain(allowed: Tensor) -> Tensor | str | None:
    """A mask in its simplest form."""
    if allowed.all():
        return None
    return CAUSAL if (allowed == torch.ones_like(allowed[0, 0]).tril()).all() else allowed


class Packing:
    """Lets the masks that are made within `with Packing():` be those of packed rows.

    Args:
        admits: Told where tokens are, (rows, longest), says whether that batch is to be packed.
    """

    current: ContextVar[Packing | None] = ContextVar("packing", default=None)

    def __init__(self, admits: Callable[[Tensor], bool]) -> None:
        self._admits = admits
        self._rows: list[Rows] = []
        self._tokens: list[Any] = []

    def __enter__(self) -> Self:
        self._tokens.append(self.current.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        self.current.reset(self._tokens.pop())
        self._rows.clear()

    def layout(self, real: Tensor) -> Rows | None:
        """The same object for the same mask, of which models make several; none where the batch is not packed."""
        for rows in self._rows:
            if torch.equal(rows.real, real):
                return rows
        if not real.any() or real.all() or not self._admits(real):
            return None
        self._rows.append(Rows(real))
        return self._rows[-1]


def _mask(present: str, **given: Any) -> Any:
    """What a model gets as its mask: that of packed rows, or the one that goes with its present attention."""
    packing, real = Packing.current.get(), given.get("attention_mask")
    square = given["q_length"] == given["kv_length"] and not given.get("q_offset") and not given.get("kv_offset")
    if packing is not None and real is not None and square and real.shape == (given["batch_size"], given["q_length"]):
        rows = packing.layout(real.bool())
        if rows is not None:
            return RowMask(rows, given)
    return ALL_MASK_ATTENTION_FUNCTIONS[present](**given)


def _attend(
    present: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **how: Any
) -> tuple[Tensor, Any]:
    """Attention as the model has it; of packed rows, each row by itself.

    Args:
        present: The implementation that does the work.
        module: The attention module.
        query: (1, heads, total, width); not packed: (rows, heads, length, width).
        key: The same, of maybe fewer heads.
        value: The same.
        attention_mask: `RowMask`, or what goes with the present implementation.
        how: Scale, dropout, window, soft cap, sinks: for the present implementation.

    Returns:
        (1, total, heads, width), and no weights.

    Raises:
        UnsupportedError: The model adds a bias for each pair of positions.
    """
    prefixes: list[Prefix] = how.pop(PREFIXES, [])
    if SEES in how:
        how.pop(SEES)(key, value)
    with _named(module, present):
        attend = _implementation(present, module)
        if not isinstance(attention_mask, RowMask):
            if prefixes:
                return with_prefixes(present, attend, prefixes, module, query, key, value, attention_mask, **how)
            return attend(module, query, key, value, attention_mask, **how)
        if prefixes and (present.startswith(FLASH) or any(prefix.rows is not None for prefix in prefixes)):
            raise UnsupportedError("has prefixes, which packed rows cannot have here")
        if how.get("position_bias") is not None:
            raise UnsupportedError("adds a bias for each pair of positions to its attention")
        rows = attention_mask.rows
        if present.startswith(FLASH):
            longest = rows.lengths[-1]
            bounds = {"cu_seq_lens_q": rows.bounds, "cu_seq_lens_k": rows.bounds}
            how |= {**bounds, "max_length_q": longest, "max_length_k": longest}
            return attend(module, query, key, value, None, **how)

        def run(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | str | None) -> Tensor:
            mask = _for_present(present, allowed, query)
            causal = {"is_causal": allowed is CAUSAL} if present == "sdpa" else {}
            if prefixes:
                given = (prefixes, module, query, key, value, mask)
                return with_prefixes(present, attend, *given, **{**how, **causal})[0]
            return attend(module, query, key, value, mask, **{**how, **causal})[0]

        whole = _padded if query.device.type != "cpu" else _by_length
        return whole(run, attention_mask, query, key, value), None


Run = Callable[..., Tensor]  # of queries, keys, values and the mask


def _by_length(run: Run, mask: RowMask, *states: Tensor) -> Tensor:
    """Rows of equal length in one call: nothing is computed for padding."""
    shapes = [at.shape for _, at in mask.rows.groups]
    sizes = [shape.numel() for shape in shapes]
    # Split, not sliced: the gradient of all pieces is one concatenation.
    pieces = zip(*(x.squeeze(0).split(sizes, 1) for x in states), strict=True)  # (heads, n * length, width)
    parts = [
        run(*(x.unflatten(1, shape).transpose(0, 1) for x in piece), allowed).flatten(0, 1)
        for shape, piece, allowed in zip(shapes, pieces, mask.within, strict=True)
    ]
    return torch.cat(parts)[None]


def _padded(run: Run, mask: RowMask, *states: Tensor) -> Tensor:
    """All rows in one call, padded for it alone: on an accelerator, starting many small kernels takes longer."""
    rows = mask.rows
    wide = (x[0].index_select(1, rows.slots).unflatten(1, rows.real.shape).transpose(0, 1) for x in states)
    return run(*wide, mask.whole).flatten(0, 1).index_select(0, rows.index)[None]


def _for_present(present: str, allowed: Tensor | str | None, query: Tensor) -> Tensor | None:
    """A mask as the implementation takes it: `sdpa` knows the causal one by a flag, the eager ones add numbers."""
    if present == "sdpa" or allowed is None:
        return allowed if isinstance(allowed, Tensor) else None
    if isinstance(allowed, str):
        size = query.shape[2]
        allowed = torch.ones(1, 1, size, size, dtype=torch.bool, device=query.device).tril()
    return torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)


def _implementation(present: str, module: nn.Module) -> Callable[..., Any]:
    """The function of that name: files of models may have their own, and have the eager one."""
    for kind in type(module).__mro__:
        file = sys.modules[kind.__module__]
        if present == "eager" and hasattr(file, "eager_attention_forward"):
            return file.eager_attention_forward
        if present != "eager" and hasattr(file, "ALL_ATTENTION_FUNCTIONS"):
            return file.ALL_ATTENTION_FUNCTIONS[present]
    raise UnsupportedError(f"{type(module).__name__} has no {present} attention that can be found")


@contextmanager
def _named(module: nn.Module, present: str) -> Iterator[None]:
    """The flash implementations read their own name from the configuration."""
    config: Any = getattr(module, "config", None)
    if config is None or not present.startswith(FLASH):
        yield
        return
    name = config._attn_implementation_internal
    config._attn_implementation_internal = present
    try:
        yield
    finally:
        config._attn_implementation_internal = name


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations in which a model's modules look their attention up, each once."""
    found = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation_internal")]


@contextmanager
def hooks(configs: Sequence[Any]) -> Iterator[None]:
    """Puts the hook around the attention that configurations name, and takes it off again.

    Raises:
        UnsupportedError: An implementation cannot be wrapped; nothing was changed.
    """
    before = [config._attn_implementation_internal for config in configs]
    names = [hooked(present or "eager") for present in before]
    for config, name in zip(configs, names, strict=True):
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, present in zip(configs, before, strict=True):
            config._attn_implementation_internal = present
