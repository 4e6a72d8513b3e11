"""Scripts written for peft, run as they are and with `veneer` in the place of `peft`."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parity.families import FAMILIES
from parity.oracle import EMBEDDINGS, peft_says

LANGUAGE = """
import torch
from transformers import AutoModelForCausalLM
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

model = AutoModelForCausalLM.from_pretrained(base)
config = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    inference_mode=False,
    r=4,
    lora_alpha=16,
    lora_dropout=0.0,
    bias="none",
    target_modules=["q_proj", "v_proj"],
)
model = get_peft_model(model, config)
model.print_trainable_parameters()
with torch.no_grad():  # a start that does not depend on a library's random numbers
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))

model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for epoch in range(4):
    output = model(input_ids=ids, attention_mask=mask, labels=ids)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(output.loss.item())
model.eval()
assert isinstance(model, PeftModel) and model.active_adapter == "default"
model.save_pretrained(folder + "/adapter")
state = get_peft_model_state_dict(model)

config = PeftConfig.from_pretrained(folder + "/adapter")
assert config.peft_type == "LORA" and config.base_model_name_or_path == base
assert config.task_type == TaskType.CAUSAL_LM and config.r == 4 and config.inference_mode
fresh = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
loaded = PeftModel.from_pretrained(fresh, folder + "/adapter", adapter_name="first")
loaded.load_adapter(folder + "/adapter", adapter_name="second")
loaded.add_adapter("third", LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
set_peft_model_state_dict(loaded, {key: -value for key, value in state.items()}, adapter_name="third")
outputs = {}
with torch.no_grad():
    for name in ("first", "second", "third"):
        loaded.set_adapter(name)
        outputs[name] = loaded(input_ids=ids, attention_mask=mask).logits
    with loaded.disable_adapter():
        outputs["base"] = loaded(input_ids=ids, attention_mask=mask).logits
    loaded.add_weighted_adapter(["first", "third"], [0.5, 0.25], "mix", combination_type="cat")
    loaded.set_adapter("mix")
    outputs["mix"] = loaded(input_ids=ids, attention_mask=mask).logits
    outputs["rows"] = loaded(input_ids=ids, attention_mask=mask, adapter_names=["first", "__base__", "mix"]).logits
    outputs["words"] = loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    loaded.delete_adapter("second")
    assert sorted(loaded.peft_config) == ["first", "mix", "third"]
    loaded.save_pretrained(folder + "/several", selected_adapters=["mix"])

    auto = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter")
    merged = auto.merge_and_unload()
    outputs["merged"] = merged(input_ids=ids, attention_mask=mask).logits
    auto = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter", is_trainable=True)
    trainable, total = auto.get_nb_trainable_parameters()
result = {"losses": torch.tensor(losses), "counts": torch.tensor([trainable, total]), **outputs}
"""

CLASSIFICATION = """
import torch
from transformers import AutoModelForSequenceClassification
import peft
from peft import PeftModelForSequenceClassification, TaskType

base_model = AutoModelForSequenceClassification.from_pretrained(base)
model = peft.get_peft_model(
    base_model,
    peft.LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=16, target_modules=r".*\\.(query|value)"),
)
assert isinstance(model, PeftModelForSequenceClassification)
assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
labels = torch.tensor([0, 2, 1])
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
model.activation_checkpointing_enable()
model.train()
for step in range(4):
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
model.save_pretrained(folder + "/classifier")
frozen = AutoModelForSequenceClassification.from_pretrained(base)
loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder + "/classifier", num_labels=3)
with torch.no_grad():
    result = {
        "trained": model(input_ids=ids, attention_mask=mask).logits,
        "loaded": loaded(input_ids=ids, attention_mask=mask).logits,
        "base": frozen(input_ids=ids, attention_mask=mask).logits,
        "loss": loss,
    }
    model.merge_adapter()
    result["merged"] = model(input_ids=ids, attention_mask=mask).logits
    model.unmerge_adapter()
    result["unmerged"] = model(input_ids=ids, attention_mask=mask).logits
    result["plain"] = model.merge_and_unload()(input_ids=ids, attention_mask=mask).logits
"""


def run(script: str, library: str, base: Path, folder: Path) -> tuple[dict[str, Tensor], str]:
    """What the script gives and prints."""
    script = script.replace("from peft import", f"from {library} import").replace("import peft", f"import {library}")
    script = script.replace("peft.", f"{library}.")
    ids = FAMILIES["llama"].inputs()
    names: dict[str, Any] = {
        "base": str(base),
        "folder": str(folder),
        "ids": ids["input_ids"],
        "mask": ids["attention_mask"],
    }
    said = io.StringIO()
    with peft_says(EMBEDDINGS, "Adapter second was active"), contextlib.redirect_stdout(said):
        exec(compile(script, f"<{library}>", "exec"), names)
    return names["result"], said.getvalue()


@pytest.mark.parametrize(("family", "script"), [("llama", LANGUAGE), ("bert", CLASSIFICATION)])
def test_a_script_gives_the_same(family: str, script: str, tmp_path: Path) -> None:
    model = FAMILIES[family].model(torch.float32)
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(tmp_path / "base")
    theirs, printed = run(script, "peft", tmp_path / "base", tmp_path / "theirs")
    ours, also_printed = run(script, "veneer", tmp_path / "base", tmp_path / "ours")
    assert also_printed == printed
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")

    def listing(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".md"}

    assert listing(tmp_path / "ours") == listing(tmp_path / "theirs")
