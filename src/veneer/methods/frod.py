"""FRoD: the weights of one kind in all layers are decomposed together, and the cores are trained, sparsely."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, Shared, WeightAdapter, onto
from veneer.config import WeightConfig, check_shares, planned
from veneer.errors import CheckpointError, ConfigError
from veneer.products import allowed_by_hand
from veneer.registry import register
from veneer.sites import Site


class Directions(Shared):
    """For each category of places, such as all q_proj: V (in, in), and the (2, nnz) places off the core's diagonal."""

    def __init__(self, sites: Mapping[str, Site], config: FrodConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        self.sites = dict(sites)  # until the decomposition, or its tensors from a file
        self.category = {path: category_of(path) for path in sites}
        self.sides = {self.category[path]: site.shape[1] for path, site in sites.items()}
        for path, site in sites.items():
            if site.shape[1] != self.sides[self.category[path]]:
                raise ConfigError(
                    f"FRoD decomposes {self.category[path]} of all layers together, but {path} has {site.shape[1]} "
                    f"inputs and others {self.sides[self.category[path]]}. Adapt one of them, or give each an adapter."
                )
        generator = torch.Generator("cpu").manual_seed(config.projection_prng_key)
        for name, side in sorted(self.sides.items()):
            self.register_buffer(f"v_{name}", torch.empty(side, side))
            self.register_buffer(f"s_{name}", off_diagonal(side, config.sparse_rate, generator))
        if not config.save_projection:
            self.derived = frozenset(self.to_file())

    def v(self, path: str) -> Tensor:
        return self.get_buffer(f"v_{self.category[path]}")

    def s(self, path: str) -> Tensor:
        return self.get_buffer(f"s_{self.category[path]}")

    def reset(self) -> None:
        self.decompose(list(self.sides))

    def decompose(self, names: Sequence[str]) -> None:
        for name in names:
            matrices = [
                matrix
                for path, site in self.sites.items()
                if self.category[path] == name
                for matrix in site.read().float().cpu().reshape(-1, *site.shape)
            ]
            super().from_file({f"v_{name}": common_directions(matrices, self.config.regularization_alpha)})
        self.sites = {}

    def to_file(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, side in self.sides.items():
            tensors[f"frod_V.{name}"] = self.get_buffer(f"v_{name}")
            tensors[f"frod_s_indices.{name}"] = self.get_buffer(f"s_{name}")
            tensors[f"frod_s_size.{name}"] = torch.tensor([side, side], device="cpu")
        return tensors

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        own = {"frod_V": "v_", "frod_s_indices": "s_"}
        named = {key.partition("."): tensor for key, tensor in tensors.items()}
        for (what, _, name), tensor in named.items():
            # Sparse products do not look: they would read and write elsewhere.
            if what == "frod_s_indices" and bool(((tensor < 0) | (tensor >= self.sides[name])).any()):
                raise CheckpointError(
                    f"frod_s_indices.{name}: a place outside of {self.sides[name]} x {self.sides[name]}. The file is "
                    "damaged, or belongs to another model."
                )
        super().from_file({own[what] + name: tensor for (what, _, name), tensor in named.items() if what in own})
        self.decompose([name for name in self.sides if f"frod_V.{name}" not in tensors])


def category_of(path: str) -> str:
    """What layers call the module at `path`, as `peft` names it: its name, with that of the module around it."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def off_diagonal(side: int, rate: float, generator: torch.Generator) -> Tensor:
    """Rows and columns, `(2, nnz)`, of random places off the diagonal of a square matrix."""
    total = side * (side - 1)
    count = max(1, min(int(side * side * rate), total)) if rate > 0 and total else 0
    chosen = torch.randperm(total, generator=generator, device="cpu")[:count]
    row, column = chosen // max(1, side - 1), chosen % max(1, side - 1)
    return torch.stack([row, column + (column >= row)])  # the diagonal is passed over


def common_directions(matrices: Sequence[Tensor], alpha: float) -> Tensor:
    """V (in, in) of the higher-order generalised decomposition W_i = U_i diag(l_i) V^T of all matrices.

    With W_i = Q_i R from one QR of all of them, V = R^T E, where E are the eigenvectors of the mean of
    (Q_i^T Q_i + alpha I)^-1.
    """
    stacked = torch.cat(list(matrices))
    side = stacked.shape[1]
    if stacked.shape[0] < side:
        return torch.linalg.svd(stacked, full_matrices=True)[2].t()
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(side, device="cpu")
    mean = torch.zeros(side, side, device="cpu")
    for part in q.split([len(matrix) for matrix in matrices]):
        mean += torch.linalg.inv(part.t() @ part + alpha * eye)
    return r.t() @ torch.linalg.eigh(mean / len(matrices))[1]


class Frod(WeightAdapter):
    r"""Trains the core of a decomposition of the weight: its diagonal, and some places off it.

        W' = W + U (diag(l - l0) + S) V^T,     W = U diag(l0) V^T

    V is common to all layers of one category (all q_proj, say), and so are the places of S.

    Trains: l (in,), l0 at the start; S (nnz,), zero at the start.
    Cost: in + sparse_rate in^2 parameters a layer; in memory U, as large as W, and V (in, in) for each category. With
    many tokens the adapted weight is formed once a call, in out in^2 multiply-adds; with few the factors are applied
    one by one. Products with the core, and its gradient, are made where it has elements only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own l and S.
    Raises: ConfigError where layers of one category have different widths, and for dropout on a bare parameter.
    Source: FRoD, as in `peft`; decomposition: Ponnapalli et al. 2011, doi:10.1371/journal.pone.0028072.
    """

    kinds = frozenset({"linear", "conv", "parameter"})  # V of an embedding would be (vocabulary, vocabulary)
    shares = Directions
    shared: Directions

    u: Tensor
    start: Tensor

    def __init__(self, site: Site, config: FrodConfig) -> None:
        super().__init__(site, config)
        self.starts_as_base = config.init_weights
        self.dropout = self.input_dropout(config.frod_dropout, "frod_dropout")
        self.register_buffer("u", torch.empty(*site.batch, *site.shape), persistent=False)
        self.register_buffer("start", torch.empty(*site.batch, site.shape[1]), persistent=False)
        self.diagonal = nn.Parameter(torch.empty(*site.batch, site.shape[1]))

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.path = path
        self.values = nn.Parameter(torch.empty(*self.site.batch, self.shared.s(path).shape[1]))

    def reset(self) -> None:
        self.decompose()
        with torch.no_grad():
            self.diagonal.copy_(self.start)
            nn.init.zeros_(self.values)
            if not self.starts_as_base:
                self.diagonal.add_(torch.randn_like(self.diagonal), alpha=0.1)
                nn.init.normal_(self.values, std=0.1)

    def decompose(self) -> None:
        """U and l0 from the weight and V: the columns of W V^-T, and their lengths."""
        weight, v = self.site.read().double().cpu(), self.shared.v(self.path).double().cpu()
        try:
            columns = torch.linalg.solve(v, weight.mT).mT
        except RuntimeError:  # V is singular where the weights are
            columns = weight @ torch.linalg.pinv(v, rtol=1e-6).mT
        lengths = torch.linalg.vector_norm(columns, dim=-2)
        self.put("start", lengths)
        self.put("u", torch.where(lengths.unsqueeze(-2) > 1e-12, columns / lengths.unsqueeze(-2), 0.0))

    def places(self) -> Tensor:
        """Rows and columns of the core's elements, `(2, nnz + in)`; those of its diagonal come last."""
        diagonal = torch.arange(self.site.shape[1], device=self.values.device).expand(2, -1)
        return torch.cat([self.shared.s(self.path).to(diagonal.device), diagonal], dim=-1)

    def elements(self) -> Tensor:
        """Values of the core at its places."""
        return torch.cat([self.values, self.diagonal - self.start], dim=-1)

    def core(self) -> Tensor:
        """diag(l - l0) + S, `(in, in)`."""
        side = self.site.shape[1]
        row, column = self.places()
        values = self.elements()
        core = values.new_zeros(*self.site.batch, side * side).index_add(-1, row * side + column, values)
        return core.unflatten(-1, (side, side))

    def adapt(self, weight: Tensor) -> Tensor:
        return onto(self.u @ self.core() @ self.shared.v(self.path).to(self.values).t(), weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        dropped = self.training and self.dropout > 0
        rows, columns = self.site.shape
        v = self.shared.v(self.path).to(self.values)
        # Multiply-adds of both passes: of U C V^T and its product with x, and of the factors one by one.
        few = 2 * rows * columns > x.numel() // columns * (2 * columns + rows)
        if self.site.kind == "linear" and (dropped or few):
            y = base(x)
            hidden = F.dropout(x.to(self.values), self.dropout, self.training) @ v
            return y + F.linear(self._through_core(hidden, transposed=True), self.u).to(y.dtype)
        if self.site.kind == "linear":
            weight = onto(self._through_core(self.u) @ v.t(), base.weight())
            return self.site.apply(x, weight, base.bias(), base.args, base.kwargs)
        if not dropped:
            return super().forward(x, base)
        y, weight = base(x), base.weight()
        x = F.dropout(x.to(self.values), self.dropout)
        return y + self.site.apply(x, self.adapt(torch.zeros_like(weight)), None).to(y.dtype)

    def _through_core(self, x: Tensor, transposed: bool = False) -> Tensor:
        """x C, or x C^T, for x (..., in)."""
        if not allowed_by_hand(x) or x.dtype not in (torch.float32, torch.float64):  # sparse products know these
            core = self.core()
            return x @ (core.t() if transposed else core)
        places = self.places().flip(0) if transposed else self.places()
        return _AtPlaces.apply(x.reshape(-1, x.shape[-1]), self.elements(), places).view(x.shape)

    def to_file(self) -> dict[str, Tensor]:
        return {"frod_lambda_l": self.diagonal, "frod_lambda_s_values": self.values}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("diagonal", tensors["frod_lambda_l"])
        self.put("values", tensors["frod_lambda_s_values"])
        self.decompose()


class _AtPlaces(torch.autograd.Function):
    """X C, where C (in, in) has elements at some places only; each place stands once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, places)
        return _times(x, values, places)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, places = ctx.saved_tensors
        rows, columns = places
        needs_x, needs_values, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # of the gradient too
            core = values.new_zeros(x.shape[1], x.shape[1]).index_put((rows, columns), values)
            return g @ core.t(), (x.t() @ g)[rows, columns], None
        return (
            _times(g, values, places.flip(0)) if needs_x else None,
            _sampled(x.t(), g, places) if needs_values else None,
            None,
        )


def _times(x: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """X C, `(n, in)`."""
    side = x.shape[1]
    transposed = torch.sparse_coo_tensor(places.flip(0), values, (side, side), check_invariants=False)
    return torch.sparse.mm(transposed, x.t().contiguous()).t()


def _sampled(a: Tensor, b: Tensor, places: Tensor) -> Tensor:
    """Elements of A B, `(side, side)`, at the places."""
    side = a.shape[0]
    order = (places[0] * side + places[1]).argsort()
    rows, columns = places[:, order]
    starts = F.pad(torch.bincount(rows, minlength=side).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            starts, columns, a.new_zeros(len(order)), (side, side), check_invariants=False
        )
    found = torch.sparse.sampled_addmm(pattern, a.contiguous(), b, beta=0.0).values()
    return torch.empty_like(found).index_copy_(0, order, found)


@register("frod")
@dataclass
class FrodConfig(WeightConfig):
    """Configuration of `Frod`, field by field that of `peft`.

    Args:
        sparse_rate: Share of the core's elements that are trained beside its diagonal.
        projection_prng_key: Seed of their places.
        save_projection: Write V and the places into the file. False computes them again from the base model.
        frod_dropout: Share of the input that is dropped in training.
        regularization_alpha: What keeps the inverses of the decomposition finite.
        init_weights: False for a random start that changes the outputs (for tests).
        progressbar: Kept for `peft`'s files; nothing is shown.

    Raises:
        ConfigError: A rate outside [0, 1], or a dropout outside [0, 1).
    """

    adapter = Frod
    peft_name = "FROD"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    own_fields = frozenset({"exclude_modules"})

    sparse_rate: float = 0.01
    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    regularization_alpha: float = 0.001
    init_weights: bool = True
    progressbar: bool = True
    runtime_offload_base_weight: bool = planned(False, "moving base weights to the CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "frod_dropout")
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"FrodConfig: sparse_rate={self.sparse_rate}; a share from 0 to 1 was expected.")
