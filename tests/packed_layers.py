"""Layers as GPTQ and AWQ checkpoints have them, packed and computed number by number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP, BITS = 32, 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: which of eight neighbours lies in which place of a word


def _word(numbers: list[int]) -> int:
    """Eight 4-bit numbers in one signed 32-bit word, the first one lowest."""
    value = sum(number << (BITS * place) for place, number in enumerate(numbers))
    return value - 2**32 if value >= 2**31 else value


class PackedLinear(nn.Module):
    """A linear layer that keeps W[o, i] = scales[g(i), o] (q[i, o] - z[g(i), o]).

    Args:
        layer: The layer to quantise, to the nearest code between the least and the largest of each group.
        awq: Packs along the output, and in AWQ's order; GPTQ's groups are those of a shuffled input.
    """

    def __init__(self, layer: nn.Linear, awq: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, BITS
        weight = layer.weight.detach().t()  # (in, out)
        inputs = weight.shape[0]
        group = torch.arange(inputs) // GROUP
        if not awq:
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
        low = torch.stack([weight[group == g].amin(0) for g in range(inputs // GROUP)])
        high = torch.stack([weight[group == g].amax(0) for g in range(inputs // GROUP)])
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(1, 15)
        codes = (weight / scales[group] + zeros[group]).round().clamp(0, 15)
        rows, columns = codes.int().tolist(), zeros.int().tolist()
        if awq:
            qweight = [[_word([r[c + k] for k in _ORDER]) for c in range(0, len(r), 8)] for r in rows]
            qzeros = [[_word([r[c + k] for k in _ORDER]) for c in range(0, len(r), 8)] for r in columns]
        else:
            qweight = [
                [_word([rows[r + k][c] for k in range(8)]) for c in range(len(rows[0]))] for r in range(0, len(rows), 8)
            ]
            qzeros = [[_word([r[c + k] - 1 for k in range(8)]) for c in range(0, len(r), 8)] for r in columns]
            self.register_buffer("g_idx", group.int())
        self.register_buffer("qweight", torch.tensor(qweight, dtype=torch.int32))
        self.register_buffer("qzeros", torch.tensor(qzeros, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def weight(self) -> Tensor:
        """The weight, (out, in), one number at a time."""
        awq = "g_idx" not in self._buffers
        words, zero_words, scales = self.qweight.tolist(), self.qzeros.tolist(), self.scales.tolist()
        group = [i // GROUP for i in range(self.in_features)] if awq else self.g_idx.tolist()
        rows = []
        for i, g in enumerate(group):
            row = []
            for o in range(self.out_features):
                place = _ORDER.index(o % 8) if awq else o % 8
                zero = (zero_words[g][o // 8] >> (BITS * place)) & 15
                code = words[i][o // 8] >> (BITS * place) if awq else words[i // 8][o] >> (BITS * (i % 8))
                row.append(scales[g][o] * ((code & 15) - (zero if awq else zero + 1)))
            rows.append(row)
        return torch.tensor(rows).t()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight().to(x.dtype), bias)
