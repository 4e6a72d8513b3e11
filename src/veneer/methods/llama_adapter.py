"""LLaMA-Adapter: a trained prompt in the upper layers, let in by a gate that is closed at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base
from veneer.config import ModuleConfig, check_positive
from veneer.errors import TargetError
from veneer.prompting.key_values import hookable, key_shape
from veneer.registry import register
from veneer.sites import Site
from veneer.structure import fused_projection, input_width, key_and_value_projections
from veneer.targets import frozen

LENGTH = 10
"""Tokens of the prompt where none are asked for, as in the paper."""

# What models do to keys before they turn them by their position.
_NORMS = ("k_norm", "k_layernorm")


class LlamaAdapter(Adapter):
    r"""Lets queries attend to a prompt beside the text, by a softmax of its own and through a gate.

        attention(Q, K, V) + g * attention(Q, k(P), v(P))

    P (n, d) takes the way of hidden states through the layer's own key and value projections, which stay as they are
    whatever other adapters do to them; positions do not turn it. The sum goes through the output projection. In GPT-2
    the second term is added behind that, as in `peft`, whose files mean it so.

    Trains: P and g, n d + 1 numbers a layer.
    Start: g = 0, so the model is the base model; P random normal.
    Merge: impossible, since no weight can add keys.
    Source: Zhang et al. 2023, arXiv:2303.16199, section 3.2; g is one number a layer, as in `peft`.
    """

    kinds = frozenset({"module"})
    splits_rows = False

    def __init__(self, site: Site | None, config: Any, attention: Any) -> None:
        super().__init__(site, config)
        self.attention: list[Any] = [attention]  # in a list, so that it is no submodule
        settings = attention.config
        text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
        self.heads, self.width = key_shape(attention, text.num_attention_heads, text.hidden_size)
        projection = fused_projection(attention) or key_and_value_projections(attention)[0]
        self.prompt = nn.Parameter(torch.empty(1, config.adapter_len, input_width(frozen(projection))))
        self.gate = nn.Parameter(torch.empty(1))

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Self:
        return cls(site, config, module)

    @property
    def device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.attention[0].parameters()), None)

    def reset(self) -> None:
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        from veneer.attention import hooks
        from veneer.prompting.prefixes import PREFIXES, Prefix

        layer: Any = base.layer
        apart: list[Tensor] | None = [] if layer.config.model_type == "gpt2" else None
        prefix = Prefix(*self.projected(self.prompt, layer, x.dtype), base.rows, self.gate, apart=apart)
        base.kwargs = {**base.kwargs, PREFIXES: [*base.kwargs.get(PREFIXES, ()), prefix]}
        with hooks([layer.config]):
            y = base(x)
        return y if apart is None else y + apart[0].flatten(2)

    def projected(self, x: Tensor, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a layer makes of hidden states (1, n, d): keys and values, (heads, n, width)."""
        fused, size = fused_projection(layer), self.heads * self.width
        x = x.to(dtype)
        if fused is None:
            key, value = (frozen(projection)(x) for projection in key_and_value_projections(layer))
        else:
            whole = frozen(fused)(x)
            if fused is getattr(layer, "query_key_value", None) or getattr(layer, "multi_query", None) is False:
                # Query, key and value of each head side by side.
                _, key, value = whole.unflatten(-1, (self.heads, 3, self.width)).unbind(-2)
                key, value = key.flatten(-2), value.flatten(-2)
            else:
                key, value = whole[..., -2 * size : -size], whole[..., -size:]
        norm: Any = next((getattr(layer, name) for name in _NORMS if hasattr(layer, name)), None)
        if norm is not None and norm.weight.shape[-1] != self.width:
            key, norm = norm(key), None
        key, value = (part.unflatten(-1, (self.heads, self.width)) for part in (key, value))  # (1, n, heads, width)
        key = key if norm is None else norm(key)
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    def to_file(self) -> dict[str, Tensor]:
        return {"adaption_prompt": self.prompt, "adaption_gate": self.gate}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({name.removeprefix("adaption_"): tensor for name, tensor in tensors.items()})


@register("llama_adapter")
@dataclass
class AdaptionPromptConfig(ModuleConfig):
    """Configuration of `LlamaAdapter`.

    Args:
        adapter_len: Tokens of the prompt; 10 if none.
        adapter_layers: How many layers have one, from the top; all if none.

    Raises:
        ConfigError: A number is not positive.
        TargetError: The model's attention does not look its function up, its projections are not found, or there are
            fewer layers.
    """

    adapter = LlamaAdapter
    peft_name = "ADAPTION_PROMPT"
    own_fields = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})

    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "adapter_len", "adapter_layers")

    @property
    def is_adaption_prompt(self) -> bool:
        return True

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        found = hookable(root, modules)
        paths = found["self"]
        if isinstance(self.target_modules, str):  # one name, as in `peft`
            paths = _of_name(self.target_modules, [path for place in found.values() for path in place])
        elif self.target_modules is not None:
            return self._with(self.adapter_layers or len(self.target_modules), self.target_modules)
        if not paths:
            raise TargetError(
                f"target_modules={self.target_modules!r} is the name of no attention module of this "
                f"{type(root).__name__}; it has {', '.join(sorted({_leaf(path) for path in found['self']}))}."
            )
        count = self.adapter_layers or len(paths)
        if count > len(paths):
            raise TargetError(f"adapter_layers={count}, but {type(root).__name__} has {len(paths)} such layers.")
        return self._with(count, paths[-count:])

    def _with(self, layers: int, targets: Any) -> Self:
        length = LENGTH if self.adapter_len is None else self.adapter_len
        return replace(self, adapter_len=length, adapter_layers=layers, target_modules=targets)

    def resolved(self, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Self:
        """With the one name that all have, where the upper layers of that name are what is adapted."""
        name = _leaf(paths[0])
        same = _of_name(name, modules)[-len(paths) :] == list(paths)
        return replace(self, target_modules=name if same else list(paths), adapter_layers=len(paths))


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _of_name(name: str, paths: Any) -> list[str]:
    return [path for path in paths if path.endswith(f".{name}")]
