"""LoRA: low-rank adaptation, with rsLoRA's scaling and a bias."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import inits
from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, WeightConfig, check_positive, check_shares, nested, planned
from veneer.errors import CheckpointError, ConfigError, VeneerWarning
from veneer.products import LowRank
from veneer.registry import register
from veneer.sites import Site

if TYPE_CHECKING:
    from veneer.preparation import Run


class Lora(WeightAdapter):
    r"""Adds a product of two thin matrices to the weight.

        W' = W + s up down,     b' = b + s bias,     s = alpha / r,  or alpha / sqrt(r) with rsLoRA

    Where the factors start as part of the weight (PiSSA, OLoRA, CorDA, LoRA-GA), W stays as it is all the same, and
    what they started from is kept and subtracted: W' = W + s (up down - start_up start_down).

    Trains: down (r, in); up (out, r), zero at the start; with `lora_bias` also bias (out,), zero at the start.
    Cost: r (in + out) parameters, and 2 r (in + out) multiply-adds a token; the product up down is never formed.
    Dropout acts on the input of down, in training only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own down and up.
    Raises: ConfigError for dropout or a bias on places that cannot have them.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
    """

    moving_starts: ClassVar[bool] = True
    """Whether the method makes good what a start moves out of the weight; variants have to say so for themselves."""

    only_adds: ClassVar[bool] = True
    """Whether all that the method does is to add up down, with `factors` as they are; variants say so likewise."""

    start_down: Tensor | None
    start_up: Tensor | None

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        if site.kind in ("embedding", "parameter"):
            if config.lora_bias:
                raise ConfigError(f"lora_bias=True: {site.kind} places have no bias to add to. Leave it out of them.")
            if config.lora_dropout and site.kind == "parameter":
                raise ConfigError("lora_dropout: a bare parameter has no input of its own to drop from; set it to 0.")
        self.scaling = scaling_of(config)
        self.config = config
        self.down = nn.Parameter(torch.empty(*site.batch, config.r, in_features))
        self.up = nn.Parameter(torch.empty(*site.batch, out_features, config.r))
        self.bias = nn.Parameter(torch.empty(out_features)) if config.lora_bias else None
        moves = inits.find(config.init_lora_weights).moves
        self.register_buffer("start_down", torch.empty_like(self.down) if moves else None)
        self.register_buffer("start_up", torch.empty_like(self.up) if moves else None)
        # An embedding's input is an index, of which nothing can be dropped (peft does the same).
        self.dropout = config.lora_dropout if site.kind != "embedding" else 0.0

    def reset(self) -> None:
        seen = inits.foreseen(self.site.module, self.config.init_lora_weights)
        self.begin(seen)
        self.prepared = self.prepared or bool(seen)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def begin(self, seen: Mapping[str, Tensor]) -> None:
        """Writes the starting values of both factors; `seen` is what an initialiser that needs data has seen."""
        inits.find(self.config.init_lora_weights).fill(self._start(self.down, self.up, seen))
        if self.start_down is not None and self.start_up is not None:
            with torch.no_grad():
                self.start_down.copy_(self.down)
                self.start_up.copy_(self.up)

    def _start(self, down: Tensor, up: Tensor, seen: Mapping[str, Tensor]) -> inits.Start:
        name = self.config.init_lora_weights
        settings = inits.find(name).settings
        own = None if settings is None else getattr(self.config, settings[0])
        return inits.Start(down, up, self.site.kind, self.scaling, self.site.read, own, seen)

    @classmethod
    def needs_data(cls, config: LoraConfig) -> bool:
        return inits.find(config.init_lora_weights).prepare is not None

    @classmethod
    def prepare(cls, adapters: dict[str, Self], config: LoraConfig, run: Run) -> LoraConfig | None:
        prepare = inits.find(config.init_lora_weights).prepare
        assert prepare is not None
        return prepare(adapters, config, run)

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.start_down is None else frozenset({"start_A", "start_B"})

    def resize(self, config: LoraConfig) -> None:
        """Gives the adapter another rank and scaling; its factors start as by default."""
        self.config, self.scaling = config, scaling_of(config)
        down, up = self.down, self.up
        self.down = nn.Parameter(down.new_empty(*self.site.batch, config.r, down.shape[-1]), down.requires_grad)
        self.up = nn.Parameter(up.new_empty(*up.shape[:-1], config.r), up.requires_grad)
        self.begin({})

    def factors(self) -> tuple[Tensor, Tensor]:
        """down and up as they act on the weight; variants make others of what they train."""
        if self.start_down is None or self.start_up is None:
            return self.down, self.up
        # One product of twice the rank: up down - start_up start_down.
        return torch.cat([self.down, self.start_down], -2), torch.cat([self.up, -self.start_up], -1)

    def adapt(self, weight: Tensor) -> Tensor:
        down, up = self.factors()
        return weight + self.scaling * (up @ down)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.bias is None:
            return bias
        return self.scaling * self.bias if bias is None else bias + self.scaling * self.bias

    def product(self) -> LowRank | None:
        if not self.only_adds or self.bias is not None:
            return None
        return LowRank(*self.factors(), self.scaling)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter" or self.product() is not None:
            return super().forward(x, base)
        return self.add(x, base(x))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s (up down x + bias), y the layer's output without it."""
        if x.is_floating_point():
            x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        down, up = self.factors()
        return self.add_product(x.to(down.device), y, down, up, self.scaling, self.bias)

    def add_product(
        self, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scaling: float, bias: Tensor | None = None
    ) -> Tensor:
        """y + scaling (up down x + bias)."""
        if bias is None:
            return self.site.add_factored(x, y, down, up, scaling)
        delta = self.site.apply_factored(x, down, up)
        if bias is not None:
            delta = self.site.add_bias(delta, bias)
        return y + (scaling * delta).to(y.dtype)

    # Layout of peft: lora_A is down, lora_B is up; convolutions keep their kernel's shape in A; embeddings are bare
    # tensors; a stack of n matrices is unrolled, with the index of the matrix slow in A's rows and fast in B's columns.

    def to_file(self) -> dict[str, Tensor]:
        bias = {} if self.bias is None else {"lora_B.bias": self.bias}
        return {**self.layout(self.down, self.up), **bias, **self._start_to_file()}

    def layout(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """A pair of factors as files name and shape it."""
        if self.site.kind == "embedding":
            return {"lora_embedding_A": down, "lora_embedding_B": up}
        if self.site.kind == "conv":
            kernel = self.site.module.get_parameter("weight").shape[1:]
            down, up = down.reshape(-1, *kernel), up.reshape(*up.shape, *[1] * (len(kernel) - 1))
        elif self.site.batch:
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        return {"lora_A.weight": down, "lora_B.weight": up}

    def _start_to_file(self) -> dict[str, Tensor]:
        # Names of ours: peft makes the starting factors again from the weight where it can.
        if self.start_down is None or self.start_up is None:
            return {}
        return {"start_A": self.start_down, "start_B": self.start_up}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        down = tensors.get("lora_A.weight", tensors.get("lora_embedding_A"))
        up = tensors.get("lora_B.weight", tensors.get("lora_embedding_B"))
        assert down is not None
        assert up is not None
        if self.site.batch:
            up = up.unflatten(1, (-1, *self.site.batch)).permute(2, 0, 1).contiguous()
        self.put("down", down.reshape(self.down.shape))
        self.put("up", up.reshape(self.up.shape))
        if self.bias is not None:
            self.put("bias", tensors["lora_B.bias"])
        if self.start_down is not None:
            self._start_from_file(tensors)

    def _start_from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the starting factors, or makes them again."""
        assert self.start_down is not None
        assert self.start_up is not None
        if "start_A" in tensors:
            self.put("start_down", tensors["start_A"])
            self.put("start_up", tensors["start_B"])
            return
        name = self.config.init_lora_weights
        if not inits.find(name).repeats:
            raise CheckpointError(
                f"The file says init_lora_weights={name!r} and lacks what the factors started from (start_A, start_B), "
                "which cannot be made again without the data. If peft wrote it, save it there once more with "
                "path_initial_model_for_weight_conversion, as a LoRA adapter for the original base model."
            )
        if inits.find(name).drawn:
            warnings.warn(
                f"The file says init_lora_weights={name!r}, whose start is drawn at random, and lacks what the factors "
                "started from (start_A, start_B). It was made again, which comes close. If peft wrote the file, save "
                "it there once more with path_initial_model_for_weight_conversion for the exact weights.",
                VeneerWarning,
                stacklevel=2,
            )
        start = self._start(torch.empty_like(self.down), torch.empty_like(self.up), {})
        inits.find(name).fill(start)
        self.put("start_down", start.down)
        self.put("start_up", start.up)


def scaling_of(config: LoraConfig) -> float:
    """What the product of the factors is multiplied by."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


VARIANTS: dict[str, type[Lora]] = {}
"""Methods that are LoRA with a twist, and that files of `peft` tell by a setting of LoRA's; by name."""


def variant(name: str, **preset: Any) -> Callable[[type[Lora]], type[Lora]]:
    """Class decorator that enters a variant of LoRA, in the module of that name, under the method name.

    Args:
        name: Name of the method and of its module.
        preset: The settings of `LoraConfig` that ask for it.
    """

    def enter(cls: type[Lora]) -> type[Lora]:
        cls.moving_starts = vars(cls).get("moving_starts", False)
        cls.only_adds = vars(cls).get("only_adds", False)
        VARIANTS[name] = cls
        register(name, **preset)(LoraConfig)
        return cls

    return enter


def variant_field(default: Any, module: str, settings: str | None = None) -> Any:
    """A setting of `LoraConfig` that, unless it has its default, asks for a variant.

    Args:
        default: The default.
        module: Name of the variant's module.
        settings: Name of the class of nested settings in that module, where the setting holds such.
    """
    return field(default=default, metadata={"variant": module, "settings": settings})


@register("lora")
@dataclass
class LoraConfig(WeightConfig):
    """Configuration of `Lora`, field by field that of `peft`.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Share of the input that is dropped in training.
        use_rslora: Scale by alpha / sqrt(r).
        lora_bias: Train a bias beside `up`.
        init_lora_weights: Starting values, an initialiser of `veneer.inits`: True (Kaiming-uniform down, zero up),
            `"gaussian"`, `"orthogonal"`; from the weight `"pissa"`, `"pissa_niter_<k>"`, `"olora"`, `"mica"`,
            `"loftq"`; from data (see `veneer.prepare`) `"eva"`, `"corda"`, `"lora_ga"`; or False for a random, non-zero
            up (for tests).
        loftq_config: Settings of `"loftq"`: a `LoftQConfig` or a dict.
        eva_config: Settings of `"eva"`: an `EvaConfig` or a dict.
        corda_config: Settings of `"corda"`: a `CordaConfig` or a dict.
        lora_ga_config: Settings of `"lora_ga"`: a `LoraGAConfig` or a dict.
        rank_pattern: Rank by module name or regular expression, where it differs from `r`.
        alpha_pattern: The same for `lora_alpha`.
        use_dora: Split the weight into lengths and directions (method `dora`).
        kasa_config: Drop the weight's smallest singular values, train others (method `kasa`): a `KasaConfig` or a dict.
        alora_invocation_tokens: Act from the last occurrence of these tokens on (method `alora`).
        use_bdlora: Make one factor block-diagonal (method `bdlora`): a `BdLoraConfig` or a dict.
        velora_config: Keep the input compressed for the backward pass (method `velora`): a `VeloraConfig` or a dict.
        monteclora_config: Draw `down` at random in training (method `monteclora`): a `MontecloraConfig` or a dict.
        use_qalora: Sum the input over groups before `down` (method `qalora`).
        qalora_group_size: Size of these groups; without `use_qalora` of no effect.
        target_parameters: Bare parameters to adapt, such as `"experts.gate_up_proj"`.
        arrow_config: Choose among the other LoRA adapters for every token (method `arrow`): an `ArrowConfig` or a dict.
        layer_replication: Starts and ends of runs of layers, such as `[[0, 4], [2, 6]]`: the model gets these layers in
            this order, repeated ones with the same weights and with adapters of their own.
        ensure_weight_tying: Train one copy for all modules that share a weight with one in `modules_to_save`.
        trainable_token_indices: Tokens of the input embedding that are trained beside (method `trainable_tokens`), or
            of other modules by their name.

    Raises:
        ConfigError: A rank that is not positive, a dropout outside [0, 1), or a setting not in this version.
    """

    adapter = Lora
    peft_name = "LORA"
    patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}  # noqa: RUF012  # read only

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False
    megatron_config: dict[str, Any] | None = planned(None, "Megatron's parallel layers")
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = variant_field(False, "dora")
    velora_config: Any = variant_field(None, "velora", "VeloraConfig")
    alora_invocation_tokens: list[int] | None = variant_field(None, "alora")
    use_qalora: bool = variant_field(False, "qalora")
    qalora_group_size: int = 16
    monteclora_config: Any = variant_field(None, "monteclora", "MontecloraConfig")
    layer_replication: Any = None
    use_bdlora: Any = variant_field(None, "bdlora", "BdLoraConfig")
    arrow_config: Any = variant_field(None, "arrow", "ArrowConfig")
    kasa_config: Any = variant_field(None, "kasa", "KasaConfig")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "rank_pattern")
        check_shares(self, "lora_dropout")
        for name, (module, settings) in _nested(self).items():
            if (value := getattr(self, name)) is not None:
                cls = getattr(importlib.import_module(f"veneer.methods.{module}"), settings)
                setattr(self, name, nested(cls, value, f"LoraConfig: {name}"))
        inits.settle(self)
        self.layer_replication = _ranges(self.layer_replication)

    def companions(self) -> list[ModuleConfig]:
        if self.trainable_token_indices is None:
            return []
        from veneer.methods.trainable_tokens import beside

        return beside(self.trainable_token_indices, self)

    def method(self) -> type[Lora]:
        """`Lora`, or the variant that a setting such as `use_dora` asks for.

        Raises:
            ConfigError: Two variants are asked for at once.
        """
        asked = [
            (entry.name, entry.metadata["variant"])
            for entry in fields(self)
            if "variant" in entry.metadata and getattr(self, entry.name) not in (entry.default, None)
        ]
        if self.init_lora_weights in ("loftq", "mica"):  # starts that come with a method of their own
            asked.append(("init_lora_weights", str(self.init_lora_weights)))
        if not asked:
            return Lora
        if len(asked) > 1:
            raise ConfigError(f"LoraConfig: {' and '.join(name for name, _ in asked)} cannot be combined. Choose one.")
        module = asked[0][1]
        importlib.import_module(f"veneer.methods.{module}")
        if inits.find(self.init_lora_weights).moves and not VARIANTS[module].moving_starts:
            raise ConfigError(
                f"LoraConfig: {asked[0][0]} cannot be combined with init_lora_weights={self.init_lora_weights!r}, "
                "which takes part of the weight into the factors. Leave one of them out."
            )
        return VARIANTS[module]

    def at(self, path: str) -> Self:
        config = super().at(path)
        given = {name: value for name in _nested(config) if (value := getattr(config, name)) is not None}
        changes = {name: at for name, value in given.items() if (at := value.at(path)) is not value}
        return replace(config, **changes) if changes else config

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        yield from super().unused(paths)
        for name in _nested(self):
            if (value := getattr(self, name)) is not None:
                yield from value.unused(paths)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter configuration") -> LoraConfig:
        # peft writes settings of its run, which the adapter does not depend on.
        return super().from_dict({k: v for k, v in values.items() if k != "runtime_config"}, where)  # type: ignore[return-value]


def _ranges(given: Any) -> list[list[int]] | None:
    """The setting as a list of starts and ends.

    Raises:
        ConfigError: It is something else.
    """
    if given is None:
        return None
    pairs: Any = given if isinstance(given, list | tuple) else [None]
    for pair in pairs:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not whole or not 0 <= pair[0] < pair[1]:
            raise ConfigError(
                f"LoraConfig: layer_replication={given!r}; a list of [start, end] was expected, with 0 <= start < end, "
                "such as [[0, 4], [2, 6]]."
            )
    return [list(pair) for pair in pairs] or None


def _nested(config: LoraConfig) -> dict[str, tuple[str, str]]:
    """Fields that hold nested settings of a variant: its module, and the name of their class there."""
    return {
        entry.name: (entry.metadata["variant"], entry.metadata["settings"])
        for entry in fields(config)
        if entry.metadata.get("settings")
    }
