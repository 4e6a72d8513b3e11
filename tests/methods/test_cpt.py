"""CPT: bounds, gradients and loss by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
import veneer
from tiny import randomise
from veneer.errors import ConfigError, UnsupportedError

SETTINGS: list[dict[str, Any]] = []  # needs a model that reads text: see tests/prompting/test_prompts.py
TOKENS = [7, 8, 9, 10, 11, 12, 13, 14, 15]
TYPES = [1, 2, 3, 4, 5, 6, 7, 8, 8]  # two examples; the label of the second has two tokens


def adapted(**settings: Any) -> veneer.PeftModel:
    values = {"cpt_token_ids": TOKENS, "cpt_tokens_type_mask": TYPES, "task_type": "CAUSAL_LM", **settings}
    return veneer.get_peft_model(tiny.llama().double(), veneer.CPTConfig(**values))


def prompt_of(model: veneer.PeftModel) -> torch.Tensor:
    return veneer.get_peft_model_state_dict(model)["prompt_embeddings"]


def test_it_starts_as_the_model_that_has_read_the_context() -> None:
    model, ids = adapted(), tiny.tokens()
    with model.disable_adapter():
        expected = model(torch.cat([torch.tensor(TOKENS).expand(3, 9), ids], 1)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)


def test_changes_are_brought_back_into_their_bounds() -> None:
    bounds = {"opt_projection_epsilon": 0.2, "opt_projection_format_epsilon": 0.4}
    model = adapted(**bounds)
    context = prompt_of(model)
    randomise(model, scale=2.0)
    formats, inputs = (eps * (32 / 2048) ** 0.5 for eps in (0.4, 0.2))
    wanted = torch.tensor([formats, inputs, formats, 0, formats, inputs, formats, 0, 0], dtype=torch.float64)
    torch.testing.assert_close((prompt_of(model) - context).norm(dim=1), wanted)
    model.train()
    model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    (delta,) = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(delta.norm(dim=1), wanted)  # what the next step starts from
    assert delta.grad is not None
    assert ((delta.grad.norm(dim=1) > 0) == (wanted > 0)).all()  # labels are not trained


@pytest.mark.parametrize("decay", [None, 0.5])
def test_labels_of_the_context_count_less_the_older_they_are(decay: float | None) -> None:
    how = {} if decay is None else {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    model, ids, mask = adapted(**how), tiny.tokens(), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 4] = -100
    got = model(input_ids=ids, attention_mask=mask, labels=labels)
    terms = []
    for row in range(3):
        text, own = ids[row][mask[row].bool()], labels[row][mask[row].bool()]
        logits = model(text[None]).logits[0]
        whole = torch.cat([torch.tensor(TOKENS), text])
        for place in range(1, len(whole)):
            if place < 9:
                counts, age = TYPES[place] % 4 == 0, {4: 2, 8: 1}.get(TYPES[place], 0)
            else:
                counts, age = int(own[place - 9]) != -100, 0
            if counts:
                loss = F.cross_entropy(logits[place - 1], whole[place])
                terms.append(loss * (1 if decay is None else decay**age))
    assert got.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)


def test_types_of_the_text_say_what_is_a_label() -> None:
    model, ids = adapted(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5), tiny.tokens(1)
    types = torch.tensor([[1, 2, 3, 4, 5, 7, 8]])  # two examples of its own
    given = types.clone()
    got = model(input_ids=ids, labels=ids, input_type_mask=given).loss
    logits, whole = model(ids).logits[0], torch.cat([torch.tensor(TOKENS), ids[0]])
    ages = {3: 3, 7: 2, 8: 2, 12: 1, 15: 0}
    terms = [F.cross_entropy(logits[place - 1], whole[place]) * 0.5**age for place, age in ages.items()]
    assert got.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    assert torch.equal(given, types)


def test_without_labels_of_its_own_the_text_counts_as_it_does_without_it() -> None:
    model, ids = adapted(cpt_tokens_type_mask=None), tiny.tokens()
    logits = model(ids).logits[:, 8:-1]
    loss = model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids.flatten()).item())


def test_the_trainer_trains_its_loss(tmp_path: Path) -> None:
    from veneer.training.arguments import TrainingArguments

    model, ids = adapted(opt_weighted_loss_type="decay", opt_loss_decay_factor=0.5), tiny.tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True)
    found = veneer.Trainer(model, args).loss_as_in_training(inputs)
    assert found.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-9)


def test_files_of_peft_and_ours(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = adapted()
    randomise(model, scale=2.0)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)
    again = veneer.PeftModel.from_pretrained(tiny.llama().double(), tmp_path, is_trainable=True)
    assert torch.equal(prompt_of(again), prompt_of(model))
    (delta,) = [p for p in again.parameters() if p.requires_grad]
    assert not delta.any()  # new bounds, around what was learnt


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="one for each token"):
        adapted(cpt_tokens_type_mask=[1, 2])
    with pytest.raises(ConfigError, match="cpt_mask hides 1 tokens"):
        adapted(cpt_mask=[1, 1, 0, 1, 1, 1, 1, 1, 1])
    with pytest.raises(ConfigError, match="task_type=None"):
        adapted(task_type=None)
    model = adapted(opt_weighted_loss_type="decay")
    model.add_adapter("other", "prompt_tuning:num_virtual_tokens=2")
    with pytest.raises(UnsupportedError, match="loss of its own"):
        model(tiny.tokens(2), labels=tiny.tokens(2), adapter_names=["default", "other"])
