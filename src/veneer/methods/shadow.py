"""Shadow: a small network beside the model, whose state corrects what every block is given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from veneer.adapter import Adapter, Base, Shared, put
from veneer.config import ModuleConfig, TaskType, check_positive, check_shares
from veneer.data.batches import IGNORED
from veneer.errors import ConfigError, TargetError
from veneer.experts import freeze
from veneer.registry import register
from veneer.side_networks import beside, cache_of, stack_of
from veneer.sites import Site
from veneer.targets import match

# Settings of the small network, and the names that configurations of models have for them.
_SIZES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
}
_HEADS = {TaskType.CAUSAL_LM: ("lm_head", "embed_out"), TaskType.SEQ_CLS: ("score", "classifier")}
_FILES = ("backbone", "projection", "head")  # each stands in files as shadow_<name>.default


class ShadowNetwork(Shared):
    """A model of the same class with few layers, or a pretrained one, and a map to the model's width."""

    def __init__(self, sites: Mapping[str, Site], config: ShadowConfig) -> None:
        super().__init__(sites, config)
        self.config = config
        self.blocks: list[Any] = []  # adapters, in a list, so that they are no submodules
        self.state: Tensor | None = None
        self.loss: Tensor | None = None

    def make(self, owner: nn.Module) -> None:
        """Makes it for a stack of blocks."""
        config, given = self.config, getattr(owner, "config", None)
        if given is None or "inputs_embeds" not in inspect.signature(type(owner).forward).parameters:
            raise TargetError(
                f"{type(owner).__name__} is no decoder that takes token ids, beside which a shadow network could run. "
                "Choose another method for encoders."
            )
        if config.shadow_model == "mirror":
            backbone: Any = type(owner)(smaller(given, config))
        else:
            backbone = AutoModel.from_pretrained(config.shadow_model)
        width = int(backbone.config.hidden_size)
        self.shares = config.share_embeddings and config.shadow_model == "mirror" and width == given.hidden_size
        if self.shares and hasattr(backbone, "embed_tokens"):
            del backbone.embed_tokens
        elif self.shares or config.shadow_model != "mirror":
            freeze(backbone.get_input_embeddings())  # without use, or not to be trained
        self.layers, self.model_blocks = int(backbone.config.num_hidden_layers), int(given.num_hidden_layers)
        self.backbone = backbone
        alike = width == given.hidden_size
        self.projection = nn.Identity() if alike else nn.Linear(width, given.hidden_size, bias=False)
        head = config.head
        self.head = copy.deepcopy(head) if head is not None and config.task_type == TaskType.SEQ_CLS else None
        if self.head is not None:
            self.head.requires_grad_(True)
        self.model_head = [head]  # the model's own, which is not trained

    def seed(self, x: Tensor | None, base: Base) -> Tensor:
        """The state before the first block, `(batch, tokens, width)`."""
        kwargs = {k: v for k, v in base.kwargs.items() if k in ("attention_mask", "position_ids")}
        embedded = base.kwargs.get("inputs_embeds")
        if self.shares and embedded is None:
            layer: Any = base.layer
            embedded = layer.get_input_embeddings()(x)
        cache = beside(cache_of(base), self, self.model_blocks, layers=self.layers)
        inputs = {"input_ids": x} if embedded is None else {"inputs_embeds": embedded.to(self.dtype)}
        out = self.backbone(**inputs, **kwargs, past_key_values=cache, use_cache=cache is not None)
        return self.projection(out[0])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def own_loss(self, state: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor | None:
        """What the small network alone would lose on the task; none where there is no head for it."""
        head = self.head if self.head is not None else self.model_head[0]
        if head is None:
            return None
        like = next(head.parameters()).dtype
        if self.config.task_type == TaskType.CAUSAL_LM:
            labelled = labels[:, 1:] != IGNORED
            logits = head(state[:, :-1][labelled].to(like))
            return F.cross_entropy(logits, labels[:, 1:][labelled]) if labelled.any() else logits.sum()
        last = torch.full(state.shape[:1], state.shape[1] - 1, device=state.device)
        if mask is not None:
            last = (mask.ne(0) * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        logits = head(state[torch.arange(state.shape[0], device=state.device), last].to(like))
        if logits.shape[-1] == 1:
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
        if not labels.is_floating_point():
            return F.cross_entropy(logits, labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels)

    def to_file(self) -> dict[str, Tensor]:
        parts = {name: part for name in _FILES if (part := getattr(self, name)) is not None}
        return {
            f"shadow_{name}.default.{key}": tensor
            for name, part in parts.items()
            for key, tensor in part.state_dict(keep_vars=True).items()
        }

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            put(self, name.removeprefix("shadow_").replace(".default.", ".", 1), tensor)


class Shadow(Adapter):
    r"""Corrects what every block is given by how it differs from the state of a small network beside the model.

        h = x + alpha up down(x - s),     s' = (1 - g) s + g T(Block(h)),     g = sigmoid(G(Block(h)))

    s before the first block is what a small network (a model of the same class with one layer, over the model's own
    embeddings) makes of the tokens; T and G are networks with one hidden layer. The loss has the term w L, L the loss
    of the small network alone on the task: of its state through the model's head, or for classification through a copy
    of the head. In evaluation the loss is the model's own.

    The small network has keys and values of its own, in the model's cache behind its own: cached decoding gives the
    same logits. In a mixed batch it runs for all rows and is added to its own.

    Trains: the small network; down (r, d), up (d, r), zero at the start, T, G (d to `update_hidden_size` to d).
    Start: equals the base model exactly. Merge: impossible. Decoders only.
    Raises: TargetError for models that are no decoders, or blocks that are not next to each other.
    Source: as in `peft` (ShadowPEFT, eq. 1 to 9).
    """

    kinds = frozenset({"module"})
    shares = ShadowNetwork
    shared: ShadowNetwork
    splits_rows = False
    reads_inputs = True

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        return cls(module, config)

    def __init__(self, module: nn.Module, config: ShadowConfig) -> None:
        super().__init__(None, config)
        self.config = config
        self.owner: list[nn.Module] = [module] if hasattr(module, "get_input_embeddings") else []
        if self.owner:
            return
        width, hidden = config.width, config.update_hidden_size or config.r
        self.down = nn.Linear(width, config.r, bias=False)
        self.up = nn.Linear(config.r, width, bias=False)
        self.update_transform = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.update_gate = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        if self.owner:
            with torch.device("cpu"):  # with memory even before a file is read: rotations and such are in no file
                self.shared.make(self.owner[0])

    def reset(self) -> None:
        if not self.owner and self.config.init_weights:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        shared = self.shared
        if self.owner:
            shared.state = shared.seed(x, base)
            labels: Any = base.inputs.get("labels")
            weight = self.config.auxiliary_loss_weight
            wanted = self.training and labels is not None and weight > 0
            shared.loss = shared.own_loss(shared.state, labels, base.inputs.get("attention_mask")) if wanted else None
            return base(x)
        assert shared.state is not None
        like = self.down.weight.dtype
        delta = F.dropout((x - shared.state).to(like), self.config.shadow_dropout, self.training)
        delta = self.config.shadow_alpha * self.up(self.down(delta))
        if base.rows is not None:
            delta = delta * base.rows[:, None, None]
        y = base(x + delta.to(x.dtype))
        h = y.to(like)
        gate = torch.sigmoid(self.update_gate(h))
        shared.state = (1 - gate) * shared.state.to(like) + gate * self.update_transform(h)
        return y

    @classmethod
    def penalty(cls, adapters: Sequence[Self], config: ShadowConfig) -> Tensor | None:
        loss = adapters[0].shared.loss
        return None if loss is None else config.auxiliary_loss_weight * loss

    # Layout of peft: "default" stands in the names, whatever the adapter's own name is.

    def to_file(self) -> dict[str, Tensor]:
        return {f"shadow_{name.replace('.', '.default.', 1)}": tensor for name, tensor in super().to_file().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        names = {name: name.removeprefix("shadow_").replace(".default.", ".", 1) for name in tensors}
        super().from_file({names[name]: tensor for name, tensor in tensors.items()})


def smaller(given: Any, config: ShadowConfig) -> Any:
    """The model's configuration with the sizes that are set for the small network."""
    made = copy.deepcopy(given)
    for setting, names in _SIZES.items():
        value = getattr(config, setting)
        if setting == "shadow_num_hidden_layers":
            value = value or 1
        if value is not None:
            name = next((name for name in names if hasattr(made, name)), None)
            if name is None:
                raise ConfigError(f"ShadowConfig: {setting}={value}; the model's configuration has none of {names}.")
            setattr(made, name, value)
    layers = made.num_hidden_layers
    if getattr(made, "layer_types", None):
        made.layer_types = (list(made.layer_types) + [made.layer_types[-1]] * layers)[:layers]
    if getattr(made, "max_window_layers", None) is not None:
        made.max_window_layers = min(made.max_window_layers, layers)
    return made


@register("shadow")
@dataclass
class ShadowConfig(ModuleConfig):
    """Configuration of `Shadow`, field by field that of `peft`.

    Args:
        r: Width of the layer that corrections pass through.
        shadow_alpha: Factor of the corrections.
        shadow_dropout: Share of the difference that is dropped in training.
        init_weights: True starts without corrections, False with random ones (for tests).
        shadow_model: `"mirror"` for a small model of the same class, or the folder or hub id of a pretrained one.
        shadow_num_hidden_layers: Layers of the small network; 1 if none.
        shadow_hidden_size: Its width; that of the model if none.
        shadow_num_attention_heads: Its heads; those of the model if none.
        shadow_intermediate_size: Its feed-forward width; that of the model if none.
        share_embeddings: Let it read the model's embeddings.
        update_hidden_size: Hidden width of the networks that move the state; r if none.
        auxiliary_loss_weight: Weight of the small network's own loss.

    Raises:
        ConfigError: A size that is not positive, a share outside [0, 1), or sizes for a pretrained network.
    """

    adapter = Shadow
    peft_name = "SHADOW"
    head: ClassVar[Any] = None
    width: ClassVar[int] = 0

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "update_hidden_size", *_SIZES)
        check_shares(self, "shadow_dropout")
        if self.auxiliary_loss_weight < 0:
            raise ConfigError(
                f"ShadowConfig: auxiliary_loss_weight={self.auxiliary_loss_weight}; it cannot be negative."
            )
        if self.shadow_model != "mirror" and (given := [name for name in _SIZES if getattr(self, name) is not None]):
            raise ConfigError(
                f"ShadowConfig: {given[0]} is for shadow_model='mirror'; a pretrained network has its own."
            )

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        owner, blocks = stack_of(modules, "A shadow network")
        chosen, layers = blocks, self.layers_to_transform
        if self.target_modules is not None:
            given = replace(self, layers_to_transform=None, layers_pattern=None)
            chosen = [path for path in match(root, given, strict=False, modules=modules) if path != owner]
        if layers is not None:
            wanted = [layers] if isinstance(layers, int) else layers
            chosen = [path for path in chosen if path in blocks and blocks.index(path) in wanted]
        numbers = [blocks.index(path) for path in chosen if path in blocks]
        if len(numbers) != len(chosen) or not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise TargetError(
                f"ShadowConfig: the targets are {chosen[:4] or 'none'}; whole transformer blocks that follow each "
                f"other were expected, of {blocks[0]} ... {blocks[-1]}. Leave target_modules out to have all."
            )
        return replace(self, target_modules=[*chosen, owner], layers_to_transform=None, layers_pattern=None)

    def resolved(self, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Self:
        config = copy.copy(self)
        owner: Any = next(modules[path] for path in paths if hasattr(modules[path], "get_input_embeddings"))
        names = _HEADS.get(self.task_type, ())  # type: ignore[call-overload]
        vars(config)["head"] = next((modules[name] for name in names if name in modules), None)
        vars(config)["width"] = int(owner.config.hidden_size)
        return config

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        targets = values["target_modules"]
        if isinstance(targets, list):  # the stack itself is found again
            values["target_modules"] = [path for path in targets if path.rpartition(".")[2].isdigit()]
        return values
