"""Sparse deltas: some entries of the weight are trained, all others stay."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, check_positive, own
from veneer.errors import CheckpointError, ConfigError
from veneer.registry import register
from veneer.selection import choice, scores
from veneer.sites import LinearSite, Site

if TYPE_CHECKING:
    from veneer.preparation import Run

_HAS_MKL = torch.backends.mkl.is_available()


class Sparse(WeightAdapter):
    r"""Adds trained values to chosen entries of the weight.

        W'_i = W_i + v_i     for the chosen entries i;   W' = W elsewhere

    Trains: values (k,), zero at the start. Frozen: indices (k,), positions in the flattened (out, in), rising.
    Cost: k parameters and k positions; one (out, in) temporary a call. No dense tensor is kept for the backward pass of
    a linear layer: the adapted weight is formed anew there, and of its gradient only the chosen entries.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    """

    kinds = frozenset({"linear", "conv", "embedding", "norm", "parameter"})

    indices: Tensor

    def __init__(self, site: Site, config: Any, count: int) -> None:
        super().__init__(site, config)
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("indices", torch.empty(count, dtype=index_type(site)), persistent=False)

    def adapt(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.values.dtype)
        flat = weight.to(wide).reshape(-1)
        return flat.index_add(0, self.indices, self.values.to(wide)).view(weight.shape)

    def rising(self) -> tuple[Tensor, Tensor]:
        """Values and indices in the order of the indices."""
        return self.values, self.indices

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.values.numel() == 0:  # nothing was chosen yet
            return base(x)
        plain = isinstance(self.site, LinearSite) and self.site.is_plain
        if base.below or not plain or torch.compiler.is_compiling():  # a compiler chooses itself what it keeps
            return self.site.apply(x, Sparse.adapt(self, base.weight()), base.bias(), base.args, base.kwargs)
        weight = self.site.read()
        y: Tensor = _SparseLinear.apply(x.to(weight.device), weight, *self.rising(), self.site.bias())
        return y


class Chosen(Sparse):
    r"""Adds trained values to the entries of the weight that score best.

        W'_i = W_i + v_i     for the k entries i of the highest score s_i;   W' = W elsewhere

        random:     s_i ~ U(0, 1)               gradient:   s_i = |sum_b g_i|, g the gradient of the loss of batch b
        magnitude:  s_i = |W_i|                 snip:       s_i = |W_i sum_b g_i|
                                                fisher:     s_i = sum_n g_i^2, g that of example n
        movement:      s_i = -sum_b g_i W_i, of W on its way down the gradient, batch by batch
        quantization:  s_i = (W_i - Q(W_i))^2 / 2 sum_n g_i^2, Q rounding to 4 bits in groups of 64

    With `unit="neuron"` a neuron (row of the weight) has the sum of its scores, and all of its entries are trained.
    Scores can also be read from a file (`scores`, written by `veneer select`); `veneer.prepare` then needs no batches.

    Trains: values (k,), zero at the start. Frozen: indices (k,).
    Cost: k parameters and k positions; one (out, in) temporary a call. Before training, where the criterion needs data,
    one forward and backward pass a batch, or an example, and a dense score for each layer in main memory.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if no entry is left.
    Source: SNIP: Lee et al. 2019, arXiv:1810.02340; FISH mask: Sung et al. 2021, arXiv:2111.09839, section 3 (the best
    of all layers together); GPS: Zhang et al. 2024, arXiv:2312.10136, section 3.2 (gradient, the best of every row).
    """

    free = frozenset({"sparse_values", "sparse_indices"})

    def __init__(self, site: Site, config: SparseConfig) -> None:
        super().__init__(site, config, 0)  # how many there are is only known where they are chosen
        self.config = config

    @classmethod
    def needs_data(cls, config: SparseConfig) -> bool:
        return config.scores is not None or scores.needs_data(config.criterion)

    @classmethod
    def prepare(cls, adapters: dict[str, Self], config: SparseConfig, run: Run) -> None:
        sites = {path: adapter.site for path, adapter in adapters.items()}
        if config.scores is None:
            found = scores.from_data(sites, config.criterion, run)
        else:
            from veneer.selection.score_file import Scores

            found = Scores.load(config.scores).of(sites, config.criterion)
        cls.settle(adapters, config, found)

    @classmethod
    def settle(cls, adapters: dict[str, Self], config: SparseConfig, found: Mapping[str, Tensor]) -> None:
        """Takes the best entries by these scores; places that have none of them are taken off."""
        cls.choose(adapters, config, found)
        for path in [path for path, adapter in adapters.items() if adapter.values.numel() == 0]:
            del adapters[path]

    @classmethod
    def choose(cls, adapters: Mapping[str, Self], config: SparseConfig, found: Mapping[str, Tensor]) -> None:
        """Takes the best entries by these scores."""
        for path, positions in chosen(found, config).items():
            adapters[path].take(positions)

    def take(self, positions: Tensor) -> None:
        """Trains these entries, from zero."""
        self.put("indices", positions)
        self.put("values", torch.zeros(positions.shape))

    def reset(self) -> None:
        if self.needs_data(self.config):
            return
        score = scores.without_data(self.site, self.config.criterion)
        self.take(chosen({"": score}, self.config)[""])

    def to_file(self) -> dict[str, Tensor]:
        return {"sparse_values": self.values, "sparse_indices": self.indices}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        check_positions(tensors["sparse_indices"], tensors["sparse_values"], self.site)
        self.put("indices", tensors["sparse_indices"])
        self.put("values", tensors["sparse_values"])


def chosen(found: Mapping[str, Tensor], config: SparseConfig) -> dict[str, Tensor]:
    """The positions of the entries that are trained, by place, rising.

    Args:
        found: The scores of all places, `(out, in)` or `(n, out, in)`.
        config: How many, and out of what.

    Raises:
        ConfigError: None is left, or there are not so many.
    """
    lengths = {path: score.shape[-1] for path, score in found.items()}
    if config.unit == "neuron":
        found = {path: score.sum(-1) for path, score in found.items()}
    if config.threshold is not None:
        best = {path: choice.above(score, config.threshold) for path, score in found.items()}
        _some(sum(positions.numel() for positions in best.values()), config)
    elif config.scope == "model":
        count = _count(config, sum(score.numel() for score in found.values()), "all layers together")
        best = choice.best_of_all(found, count)
    elif config.scope == "neuron":
        best = {}
        for path, score in found.items():
            count = _count(config, score.shape[-1], f"a row of {path or 'a layer'}", least=1)
            best[path] = choice.best_of_rows(score, count)
    else:
        best = {
            path: choice.best_of_layer(score, _count(config, score.numel(), path or "a layer"))
            for path, score in found.items()
        }
    if config.unit == "neuron":
        best = {path: choice.whole_rows(rows, lengths[path]) for path, rows in best.items()}
    return best


def _count(config: SparseConfig, there: int, where: str, least: int = 0) -> int:
    """How many are taken of those that are there.

    Raises:
        ConfigError: None, or more than there are.
    """
    what = "neurons" if config.unit == "neuron" else "entries"
    if config.count is not None and config.count > there:
        raise ConfigError(
            f"SparseConfig: count={config.count}, but {where} has {there} {what}, so that is more than 100%. Lower "
            "it, or leave small layers out."
        )
    return _some(config.count or max(least, int(config.density * there)), config)


def _some(count: int, config: SparseConfig) -> int:
    """Refuses a choice of nothing.

    Raises:
        ConfigError: So.
    """
    if count < 1:
        what = f"density={config.density}" if config.threshold is None else f"threshold={config.threshold}"
        of = "of a layer" if config.threshold is None else "at all"
        fix = "Raise it, or leave small layers out." if config.threshold is None else "Lower it."
        raise ConfigError(f"SparseConfig: {what} leaves no entry {of} to train. {fix}")
    return count


def check_positions(indices: Tensor, values: Tensor, site: Site) -> None:
    """Refuses positions that a weight does not have, or that are not rising.

    Raises:
        CheckpointError: So.
    """
    rising = bool((indices[1:] > indices[:-1]).all())
    inside = indices.numel() == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < size(site))
    if indices.shape != values.shape or not rising or not inside:
        raise CheckpointError(
            f"sparse_indices {tuple(indices.shape)} and sparse_values {tuple(values.shape)} are no rising positions in "
            f"a weight of shape {(*site.batch, *site.shape)} with a value each. Copy or save the adapter again."
        )


class _SparseLinear(torch.autograd.Function):
    """`F.linear` with values added to the weight, of which only what is there anyway is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, values, indices)
        return F.linear(x, _added(weight, values, indices).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ _added(weight, values, indices).to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            rows, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
            of_values = _product_at(indices, rows, tokens).to(values.dtype)
        return of_x, None, of_values, None, None


def _added(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The weight, in its own type, with the values added; rounded once, entry by entry."""
    flat = weight.clone(memory_format=torch.contiguous_format).view(-1)
    if weight.dtype == values.dtype:
        flat.index_add_(0, indices, values)
    else:
        flat.index_copy_(0, indices.long(), (flat.index_select(0, indices).to(values.dtype) + values).to(weight.dtype))
    return flat.view(weight.shape)


def _product_at(indices: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """The chosen entries of rows^T tokens; `rows` is `(tokens, out)` and `tokens` is `(tokens, in)`."""
    shape = rows.shape[1], tokens.shape[1]
    fits = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64)
    if not (_HAS_MKL and fits):
        return (rows.t() @ tokens).view(-1).index_select(0, indices)  # (out, in), given up at once
    starts = torch.arange(shape[0] + 1, dtype=indices.dtype) * shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse")  # once in a process: that the interface may change
        places = torch.sparse_csr_tensor(
            torch.searchsorted(indices, starts, out_int32=indices.dtype == torch.int32),
            indices % shape[1],
            rows.new_zeros(indices.shape),
            shape,
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(places, rows.t(), tokens, beta=0.0).values()


def size(site: Site) -> int:
    """How many entries the weight has, all matrices of a stack counted."""
    return torch.Size((*site.batch, *site.shape)).numel()


def index_type(site: Site) -> torch.dtype:
    """The shortest type that holds every position in the weight."""
    return torch.int32 if size(site) < 2**31 else torch.int64


@register("gps", criterion="gradient", scope="neuron", count=1)
@register("fish_mask", criterion="fisher", scope="model", density=0.005)
@register("snip", criterion="snip", scope="model")
@register("sparse")
@dataclass
class SparseConfig(ModuleConfig):
    """Configuration of `Chosen`; `snip`, `fish_mask` and `gps` are published choices.

    Args:
        criterion: What makes an entry worth training. All but `random` and `magnitude` need data: `veneer.prepare`.
        scope: Whether the best are taken of every neuron (row of the weight), every layer, or all layers together.
        density: Share of the entries that are trained.
        count: How many entries, of every neuron or layer or of all, in place of `density`.
        threshold: Train the entries that have at least this score, however many they are, in place of `density`.
        unit: What is chosen: single entries, or neurons with all of their entries. `density` and `count` then are of
            neurons.
        scores: File with the scores, as `veneer select` writes it; they are made when none is given.

    Raises:
        ConfigError: A density outside (0, 1], a count that is not positive, or layers compared without data.
    """

    adapter = Chosen
    peft_name = "SPARSE"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    default_targets = ("all-linear",)

    criterion: Literal["random", "magnitude", "gradient", "snip", "fisher", "movement", "quantization"] = "magnitude"
    scope: Literal["neuron", "layer", "model"] = "layer"
    density: float = 0.01
    count: int | None = None
    threshold: float | None = own(None)
    unit: Literal["entry", "neuron"] = own("entry")
    scores: str | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "density", "count")
        if self.density > 1:
            raise ConfigError(f"SparseConfig: density={self.density!r}; a share in (0, 1] was expected.")
        if self.threshold is not None and self.count is not None:
            raise ConfigError(
                f"SparseConfig: count={self.count!r} and threshold={self.threshold!r} both say how many entries are "
                "trained. Leave one of them out."
            )
        if self.unit == "neuron" and self.scope == "neuron":
            raise ConfigError(
                "SparseConfig: unit='neuron' with scope='neuron' would choose a neuron out of one. Use scope='layer' "
                "or 'model' to choose neurons, or unit='entry' to choose entries of every neuron."
            )
        if self.scope == "model" and self.criterion in ("random", "magnitude"):
            raise ConfigError(
                f"SparseConfig: scope='model' with criterion={self.criterion!r}: that score says nothing of one layer "
                "against another. Use scope='layer', or a criterion that sees data."
            )
