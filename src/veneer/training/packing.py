"""Padded batches, computed without their padding.

The model is called with padded batches, as always. Where its first block begins, the real tokens of all rows are put
one after the other, (rows, longest, width) -> (1, total, width), and where its last block ends they go back to their
places. Embeddings, positions, heads and losses are therefore those of the padded run; in between, everything works on
single tokens but attention, which `veneer.attention` keeps within each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from veneer import attention
from veneer.adapted import wrappers
from veneer.attach import switch_of
from veneer.attention import Packing, RowMask, Rows
from veneer.errors import UnsupportedError
from veneer.model import PeftModel
from veneer.stores import rounds_inputs
from veneer.structure import blocks, is_encoder_decoder
from veneer.targets import walk
from veneer.training.row_keys import LOOKING_IN, loss_at_padding

_LAYER_DROPS = ("layerdrop", "encoder_layerdrop")


def packed_rows(model: nn.Module) -> AbstractContextManager[None]:
    """Within `with packed_rows(model):` nothing is computed for padding between the model's first and last block.

    Outputs, losses and gradients are those of the padded run, to rounding; outputs at padding are others, and dropout
    draws other numbers. Of an encoder-decoder, the encoder's rows are packed. A call that fills or reads a cache, asks
    for hidden states or attention weights, mixes adapters, or has no padding is computed as usual. With gradient
    checkpointing, `backward` belongs inside too. Not thread-safe.

    Args:
        model: A transformers model, adapted or not.

    Raises:
        UnsupportedError: The results would be others; with the reason.

    >>> import torch, transformers, veneer
    >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    >>> model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 0]]), "attention_mask": mask}
    >>> with veneer.packed_rows(model):
    ...     packed = model(**batch).pooler_output
    >>> torch.allclose(packed, model(**batch).pooler_output, atol=1e-6)
    True
    """
    return PackedRows(model)()


class PackedRows:
    """`packed_rows`, examined once and entered any number of times.

    Args:
        model: A transformers model, adapted or not.

    Raises:
        UnsupportedError: The results would be others; with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._root = _root(self.model)
        self._blocks = _stack(self._root)
        self._configs = attention.configs_of(self._root)
        self._packing = Packing(self._admits)
        self._calls: list[bool] = []
        self._packed = 0
        self._sides = {"left", "right"}
        _check_adapters(self.model)
        with attention.hooks(self._configs):
            pass  # raises where it cannot be wrapped
        # Heads may read what stands at padding: the first position of a row that is padded on the left, say.
        failed = {side: reason for side in sorted(self._sides) if (reason := self._check(side))}
        if len(failed) == 2:
            raise UnsupportedError(f"{type(self.model).__name__} {failed['right']}")
        self._sides -= failed.keys()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(attention.hooks(self._configs))
            handles = [
                self._root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
                self._root.register_forward_hook(self._end, always_call=True),
                *(block.register_forward_pre_hook(self._pack, with_kwargs=True) for block in self._blocks),
                self._blocks[-1].register_forward_hook(self._unpack, with_kwargs=True, prepend=True),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            yield

    # Hooks

    def _begin(self, root: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        config, switch = root.config, switch_of(self.model)
        asked = any(kwargs.get(name, getattr(config, name, False)) for name in LOOKING_IN)
        cached = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        mixed = switch is not None and switch.rows is not None
        packs = not (asked or cached or mixed or loss_at_padding(kwargs))
        self._calls.append(packs)
        if packs:
            self._packing.__enter__()
            if getattr(config, "use_cache", False):  # would be filled for nobody, in the order of packed rows
                kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    def _end(self, root: nn.Module, args: Any, output: Any) -> None:
        if self._calls.pop():
            self._packing.__exit__()

    def _pack(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = _rows(args, kwargs)
        if rows is None:
            return None
        if any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value", "layer_past")):
            raise UnsupportedError("fills a cache that it was not asked for")
        name = None if args else next(iter(kwargs))
        hidden = args[0] if args else kwargs[name]  # type: ignore[index]
        if hidden.shape[:2] == rows.real.shape:
            hidden = rows.pack(hidden)
            self._packed += 1
        alike = (rows.real.shape, (1, rows.real.shape[1]))

        def pack(x: Any) -> Any:
            each = isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[:2] in alike
            return rows.pack_once(x) if each else x

        if args:
            return (hidden, *tree_map(pack, args[1:])), tree_map(pack, kwargs)
        others = {key: value for key, value in kwargs.items() if key != name}
        return (), {name: hidden, **tree_map(pack, others)}

    def _unpack(self, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        rows = _rows(args, kwargs)
        if rows is None:
            return None
        return (rows.unpack(output[0]), *output[1:]) if isinstance(output, tuple) else rows.unpack(output)

    def _admits(self, real: Tensor) -> bool:
        some = real.any(1)
        padded = {"left": bool((some & ~real[:, 0]).any()), "right": bool((some & ~real[:, -1]).any())}
        return all(side in self._sides for side, is_so in padded.items() if is_so)

    @torch.no_grad()
    def _check(self, side: str) -> str | None:
        """Compares both ways on a few tokens: models may do more with their rows than is known here.

        Returns:
            What keeps rows that are padded on this side from being packed; none if nothing does.
        """
        runs = self._root if is_encoder_decoder(self.model) else self.model
        batch, packed_before = _few_tokens(runs, side), self._packed
        modes = {module: module.training for module in runs.modules()}
        runs.eval()
        try:
            usual = _answer(runs(**batch))
            with self():
                packed = _answer(runs(**batch))
        except UnsupportedError as error:
            return str(error)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"cannot be run on packed rows: {error}"
        finally:
            for module, training in modes.items():
                module.training = training
        if self._packed == packed_before:
            return "does not make its attention masks where they can be seen"
        real = batch["attention_mask"].bool()
        if usual.shape[:2] == real.shape:
            usual, packed = usual[real], packed[real]
        coarse = usual.dtype.itemsize < 4 or rounds_inputs(runs)
        rtol = 5e-2 if coarse else 1e-4
        close = (usual - packed).abs() <= rtol * usual.abs().max()  # false where either is not a number
        return None if bool(close.all()) else "gives other results when rows are packed"


def _root(model: Any) -> Any:
    """The module whose call goes through all blocks once: the encoder of an encoder-decoder.

    Raises:
        UnsupportedError: It is not a model of text.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", None) != "input_ids":
        raise UnsupportedError(f"{type(model).__name__} is no transformers model of text")
    return model.get_encoder() if is_encoder_decoder(model) else model


def _stack(root: nn.Module) -> list[nn.Module]:
    """The transformer blocks, which must be one list.

    Raises:
        UnsupportedError: They are not found, or something in them works across positions.
    """
    name = type(root).__name__
    modules = dict(walk(root))
    paths = blocks(modules)
    lists = {path.rpartition(".")[0] for path in paths}
    if len(lists) != 1:
        raise UnsupportedError(f"{name} has {len(lists)} stacks of transformer blocks, where one is needed")
    (stack,) = lists
    found = list(modules[stack].children())
    if len(found) != len(paths):
        raise UnsupportedError(f"{name} has blocks without attention, which may work across positions otherwise")
    if any(isinstance(module, _ConvNd) for path in paths for module in modules[path].modules()):
        raise UnsupportedError(f"{name} has convolutions in its blocks, which work across positions")
    dropped = [name for name in _LAYER_DROPS if getattr(root.config, name, 0)]
    if dropped:
        raise UnsupportedError(f"{name} leaves out blocks at random ({dropped[0]} is above 0)")
    return found


def _check_adapters(model: nn.Module) -> None:
    """Refuses adapters to which rows are more than tokens.

    Raises:
        UnsupportedError: So.
    """
    for wrapper in wrappers(model):
        for name, adapter in wrapper.adapters.items():
            for flag, what in (("reads_inputs", "looks at"), ("mixes_rows", "mixes")):
                if getattr(adapter, flag, False):
                    kind = type(adapter).__name__
                    raise UnsupportedError(f"adapter {name!r} ({kind}) {what} the rows of the batch")


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rows | None:
    """The layout that a block was given in place of its mask."""
    return next((leaf.rows for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, RowMask)), None)


def _few_tokens(model: Any, side: str) -> dict[str, Tensor]:
    """Rows of unequal length, padded on one side."""
    embeddings = model.get_input_embeddings()
    count, device = embeddings.weight.shape[0], embeddings.weight.device
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], device=device)
    mask = mask if side == "right" else mask.flip(1)
    padding = model.config.get_text_config().pad_token_id or 0
    tokens = torch.arange(mask.numel(), device=device).view_as(mask) % max(1, count - 3) + 2
    return {"input_ids": tokens.where(mask.bool(), padding), "attention_mask": mask}


def _answer(output: Any) -> Tensor:
    """Logits, or what stands first."""
    found = output.get("logits") if isinstance(output, Mapping) else None
    return found if found is not None else output[0]
