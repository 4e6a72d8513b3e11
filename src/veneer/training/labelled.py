"""The language-model loss where labels are, and nowhere else.

A model computes logits for every position, over a vocabulary that is often wider than all its layers together, and then
ignores those of positions without a label. Here the output head runs on labelled positions only, some at a time, and
with a frozen head the gradient is made in the same pass, so that no more than one piece of logits is ever there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from veneer.data.batches import IGNORED
from veneer.errors import UnsupportedError
from veneer.products import is_hooked
from veneer.targets import frozen

LOGITS_AT_ONCE = 2**23
"""Elements of logits that are there at a time: 32 MB in float32."""

_SOFT_CAP = "final_logit_softcapping"


class LabelledLoss:
    """Makes a causal language model compute its loss at labelled positions only.

    Within `with loss():` the model's `forward(..., labels=...)` gives the same loss with the same gradients, to
    rounding. Its `logits` are none there: leave the context where they are asked for.

    Args:
        model: A transformers model with an output head, adapted or not.

    Raises:
        UnsupportedError: The model's loss is another one, or is computed in a way that cannot be seen from outside;
            with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        find = getattr(model, "get_output_embeddings", None)
        head = find() if find is not None else None
        if head is None or getattr(model, "loss_function", None) is not ForCausalLMLoss:
            raise UnsupportedError(f"{type(model).__name__} does not compute the usual loss of causal language models")
        path = next(name for name, module in model.named_modules() if module is head)
        self._parent = model.get_submodule(path.rpartition(".")[0])
        self._name = path.rpartition(".")[2]
        self._check()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        config = self.model.config.get_text_config()
        head: nn.Module = self._parent._modules[self._name]  # type: ignore[assignment]
        cap = getattr(config, _SOFT_CAP, None)

        def loss(logits: Tensor, labels: Tensor, vocab_size: int, **how: Any) -> Tensor:
            return _loss(head, cap, logits, labels, **how)

        self._parent._modules[self._name] = _Through(head)
        self.model.loss_function = loss
        if cap is not None:
            setattr(config, _SOFT_CAP, None)
        try:
            yield
        finally:
            self._parent._modules[self._name] = head
            del self.model._loss_function
            if cap is not None:
                setattr(config, _SOFT_CAP, cap)

    def _check(self) -> None:
        """Compares both ways on a few tokens: models may do more with their logits than is known here."""
        device = self.model.get_input_embeddings().weight.device
        x = torch.arange(1, 5, device=device)[None]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                usual = self.model(input_ids=x, labels=x).loss
                with self():
                    labelled = self.model(input_ids=x, labels=x).loss
        finally:
            self.model.train(training)
        rtol = 1e-2 if self.model.dtype.itemsize < 4 else 1e-4
        if not torch.allclose(usual.float(), labelled.float(), rtol=rtol):
            raise UnsupportedError(
                f"{type(self.model).__name__} changes its logits after the output head in a way that is not known"
            )


class _Through(nn.Module):
    """Stands in for the output head and hands its input on."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    @property
    def weight(self) -> Tensor:  # models ask for its type
        return frozen(self.head).weight  # type: ignore[return-value]

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def _loss(
    head: nn.Module,
    cap: float | None,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Mean cross-entropy over the labels, or their sum over `num_items_in_batch`.

    Args:
        head: The output head.
        cap: c in c tanh(logits / c), where the model has it.
        hidden: What the head would be called with, (rows, length, width).
        labels: (rows, length); position t is told what stands at t + 1.
        num_items_in_batch: Number of labels that the sum is divided by.
        ignore_index: No label.
        shift_labels: Labels in their final place, instead of `labels`.
        others: Of no use here.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden.device)
    chosen = shift_labels != ignore_index
    x, y = hidden[chosen], shift_labels[chosen]  # (n, width), (n,)
    total = total_loss(head, cap, x, y)
    count = y.numel() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def total_loss(head: nn.Module, cap: float | None, x: Tensor, y: Tensor) -> Tensor:
    """Summed cross-entropy of labelled positions.

    Args:
        head: The output head.
        cap: c in c tanh(logits / c), where the model has it.
        x: What the head is called with, (n, width).
        y: Labels, (n,).
    """
    # Hooks may change what the head gives, or fetch its weights from elsewhere first.
    plain = type(head) is nn.Linear and not head.weight.requires_grad
    plain = plain and not is_hooked(head)
    return _FrozenHead.apply(x, head.weight, head.bias, y, cap) if plain else _by_pieces(head, cap, x, y)


def _pieces(vocabulary: int) -> int:
    """How many positions have their logits computed at once."""
    return max(16, LOGITS_AT_ONCE // vocabulary)


def _by_pieces(head: nn.Module, cap: float | None, x: Tensor, y: Tensor) -> Tensor:
    """Any head, also one that is trained; logits are computed again for the gradient."""

    def total(x: Tensor, y: Tensor) -> Tensor:
        logits = head(x).float()
        return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), y, reduction="sum")

    rows = _pieces(frozen(head).get_parameter("weight").shape[0])
    pairs = zip(x.split(rows), y.split(rows), strict=True)
    parts: list[Tensor] = [checkpoint(total, a, b, use_reentrant=False) for a, b in pairs]
    return torch.stack(parts).sum()


class _FrozenHead(torch.autograd.Function):
    """Summed cross-entropy of a frozen linear head. The gradient by its input is made while the logits are there.

    dL/dx = (softmax(l) - onehot(y)) (1 - tanh^2(z / c)) W,    l = c tanh(z / c),    z = W x + b
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, cap: float | None) -> Tensor:
        grad = torch.empty_like(x) if x.requires_grad or torch.is_grad_enabled() else None
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        rows = _pieces(weight.shape[0])
        for start in range(0, x.shape[0], rows):
            piece = slice(start, start + rows)
            logits = F.linear(x[piece], weight, bias).to(total.dtype)  # (rows, vocabulary)
            tanh = None
            if cap is not None:
                tanh = logits.div_(cap).tanh_()
                logits = tanh * cap
            index = y[piece, None]
            largest = logits.amax(1, keepdim=True)
            at_label = logits.gather(1, index) - largest
            odds = logits.sub_(largest).exp_()
            norm = odds.sum(1, keepdim=True)
            total += (norm.log() - at_label).sum()
            if grad is not None:
                odds.div_(norm).scatter_add_(1, index, odds.new_full(index.shape, -1.0))
                if tanh is not None:
                    odds.mul_(tanh.square_().neg_().add_(1))
                torch.mm(odds.to(weight.dtype), weight, out=grad[piece])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * upstream.to(grad.dtype)), None, None, None, None
