"""Mix-and-Match: prefixes in every attention, and bottlenecks beside every feed-forward part."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.composites import CompositeConfig, Part
from veneer.config import ModuleConfig, check_positive
from veneer.methods.parallel import ParallelConfig
from veneer.methods.prefix_tuning import PrefixTuningConfig
from veneer.registry import register


class MixAndMatch(Part):
    r"""Prefix tuning with few tokens, and a scaled parallel adapter of much width beside the feed-forward part.

        attention(Q, [P_K; K], [P_V; V]),     h = FFN(x) + s (up relu(down x + b_down) + b_up),     s = 4

    Unlike with prefix tuning by itself, the text begins at position 0.

    Trains: what `prefix_tuning` and `parallel` train.
    Start: not the base model, since prefixes start at random. Merge: impossible.
    Source: He et al. 2022, arXiv:2110.04366, section 4.6.
    """


@register("mam")
@dataclass
class MamConfig(CompositeConfig):
    """Configuration of `MixAndMatch`.

    Args:
        num_virtual_tokens: Length of the prefixes.
        prefix_projection: Whether a network projects embeddings to prefixes while they are trained.
        bottleneck_size: Width of the parallel adapters.
        scaling: Factor s.

    Raises:
        ConfigError: A size that is not positive.
    """

    adapter = MixAndMatch
    peft_name = "MAM"
    learning_rates = {"classification": 3e-3, "causal-lm": 1e-3}  # noqa: RUF012  # read only

    num_virtual_tokens: int = 30
    prefix_projection: bool = False
    bottleneck_size: int = 512
    scaling: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_virtual_tokens", "bottleneck_size")

    def parts(self) -> dict[str, ModuleConfig]:
        prefix = PrefixTuningConfig(
            num_virtual_tokens=self.num_virtual_tokens, prefix_projection=self.prefix_projection
        )
        beside = ParallelConfig(bottleneck_size=self.bottleneck_size, non_linearity="relu", scaling=self.scaling)
        return {"prefix": prefix, "parallel": beside}
