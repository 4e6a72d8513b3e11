"""Checkpointing, compiled blocks and offloading: the same losses and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from veneer import Trainer, get_peft_model, parse_method
from veneer.errors import UnsupportedError
from veneer.training.arguments import TrainingArguments
from veneer.training.compiled import compile_blocks
from veneer.training.offload import Offload


def adapted() -> Any:
    model = get_peft_model(tiny.llama().train(), parse_method("lora:target_modules=all-linear")).double()
    tiny.randomise(model)
    return model


def gradients(model: Any, passes: int = 2) -> list[Tensor]:
    """Losses and gradients of some batches; layers of one input find each other in the first."""
    found = []
    for number in range(passes):
        model.zero_grad()
        x = tiny.tokens(3, 7, seed=number)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same(reentrant: bool) -> None:
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model), gradients(adapted()))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it compiles
def test_compiled_blocks_give_the_same_and_keep_their_names() -> None:
    model = adapted()
    names = list(model.state_dict())
    assert compile_blocks(model, backend="aot_eager") == 2  # what the compiler is given, without waiting for it
    assert list(model.state_dict()) == names
    torch.testing.assert_close(gradients(model, passes=1), gradients(adapted(), passes=1))


def test_a_model_without_blocks_cannot_be_compiled_by_blocks() -> None:
    with pytest.raises(UnsupportedError, match=r"training\.compile_blocks: Linear has no list of like blocks"):
        compile_blocks(nn.Linear(2, 2))


def test_offloading_is_for_accelerators(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), offload_activations=True, use_cpu=True, report_to="none")
    with pytest.raises(UnsupportedError, match=r"the model is on cpu\. Use training\.activation_checkpointing"):
        Trainer(adapted(), args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_activations_give_the_same_gradients_in_less_memory() -> None:
    model = get_peft_model(tiny.llama(hidden_size=256).train(), parse_method("lora")).cuda()
    x = tiny.tokens(16, 64).cuda()

    def run(context: Any) -> tuple[list[Tensor], int]:
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        with context():
            model(input_ids=x, labels=x).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad], torch.cuda.max_memory_allocated()

    plain, more = run(nullcontext)
    offloaded, less = run(Offload(model))
    torch.testing.assert_close(offloaded, plain, rtol=0, atol=0)
    assert less < more
