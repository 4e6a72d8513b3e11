"""`veneer inspect`'s findings on small models of known shape."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from veneer.commands.inspection import AdapterReport, TensorEntry, fold_tensors, inspect
from veneer.commands.model_tree import ModelReport, Node, inspect_model
from veneer.errors import CheckpointError, ConfigError, TargetError
from veneer.functional import get_peft_model_state_dict
from veneer.model import get_peft_model

WIDTH, LAYERS = 16, 3


def tiny_bert(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        architectures=["BertModel"],
        **more,
    )


@pytest.fixture
def bert(tmp_path: Path) -> str:
    folder = tmp_path / "bert"
    tiny_bert().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tmp_path: Path, bert: str) -> Path:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert())
    model.config.name_or_path = bert
    folder = tmp_path / "adapter"
    get_peft_model(model, "lora:r=4,lora_alpha=16,task_type=SEQ_CLS").save_pretrained(folder)
    return folder


def shown(report: Any, width: int = 100) -> str:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(report)
    return file.getvalue()


def find(node: Node, name: str) -> Node:
    """The first node of that name below this one."""
    queue = [node]
    while queue:
        node = queue.pop(0)
        if node.name == name:
            return node
        queue += node.children
    raise AssertionError(name)


def test_a_models_sites_are_found_without_weights(bert: str) -> None:
    report = inspect(bert)
    assert isinstance(report, ModelReport)
    assert report.sites["encoder.layer.2.output.dense"] == ("linear", (WIDTH, 32))
    assert report.sites["embeddings.word_embeddings"] == ("embedding", (WIDTH, 50))
    assert report.sites["encoder.layer.0.output.LayerNorm"][0] == "norm"
    expected = sum(p.numel() for p in BertForSequenceClassification(tiny_bert()).bert.parameters())
    assert report.root.parameters == expected
    assert report.matched is None
    assert report.trained is None


def test_layers_that_are_alike_are_folded(bert: str) -> None:
    report = inspect_model(bert)
    layers = find(report.root, "layer")
    assert [child.name for child in layers.children] == ["0-2"]
    assert layers.children[0].repeats == 3
    assert layers.parameters == 3 * layers.children[0].parameters
    assert "0-2 (3 alike)" in shown(report)


def test_a_target_that_means_some_layers_unfolds_them(bert: str) -> None:
    report = inspect_model(bert, target=r".*layer\.[01]\..*query")
    assert report.matched == [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    layers = find(report.root, "layer").children
    assert [layer.name for layer in layers] == ["0-1", "2"]
    assert [find(layer, "query").matched for layer in layers] == [True, False]
    lines = [line for line in shown(report).splitlines() if line.endswith("*")]
    assert len(lines) == 1
    assert "query" in lines[0]


@pytest.mark.parametrize(
    ("target", "count"), [("query,value", 2), ("all-linear", 6), ("attention.self.key", 1), (".*[.]dense", 3)]
)
def test_every_way_of_writing_a_target(bert: str, target: str, count: int) -> None:
    matched = inspect_model(bert, target=target).matched
    assert matched is not None
    assert len([path for path in matched if path.startswith("encoder")]) == count * LAYERS


def test_a_method_says_what_it_would_train(bert: str) -> None:
    report = inspect_model(bert, method="lora:r=4")
    assert report.trained == LAYERS * 2 * 4 * (WIDTH + WIDTH)
    assert f"lora:r=4 trains {report.trained} parameters" in shown(report)
    wider = inspect_model(bert, method="lora:r=4", target="query")
    assert wider.trained == report.trained // 2


def test_a_task_adds_the_head_that_is_trained_too(bert: str) -> None:
    plain = inspect_model(bert, method="lora")
    headed = inspect_model(bert, method="lora", task="classification")
    assert "classifier" in headed.sites
    assert headed.trained == plain.trained + 2 * WIDTH + 2  # type: ignore[operator]


@pytest.mark.parametrize("method", ["bitfit", "houlsby", "dora", "kasa"])
def test_every_method_can_be_counted(bert: str, method: str) -> None:
    report = inspect_model(bert, method=method, task="classification")
    model = get_peft_model(BertForSequenceClassification(tiny_bert()), f"{method}:task_type=SEQ_CLS")
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_large_model_needs_no_memory(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, vocab_size=128256, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    report = inspect_model(str(tmp_path), method="lora:r=16")
    assert report.root.parameters > 70e9
    assert report.trained == 80 * 16 * (8192 + 8192 + 8192 + 1024)


def test_stacked_experts_are_shown_as_bare_parameters(tmp_path: Path) -> None:
    MixtralConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8,
        num_local_experts=4, vocab_size=20, architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert find(inspect_model(str(tmp_path)).root, "down_proj").place == "4 x 16 x 8"


def test_an_adapter_is_described(adapter: Path, bert: str) -> None:
    (adapter / "run.yaml").write_text("task: classification\ndata: {train: reviews.csv}\n")
    (adapter / "results.json").write_text(json.dumps({"before": {"accuracy": 0.5}, "after": {"accuracy": 0.81}}))
    report = inspect(str(adapter))
    assert isinstance(report, AdapterReport)
    assert report.parameters == LAYERS * 2 * 4 * (WIDTH + WIDTH) + 2 * WIDTH + 2
    assert report.file_bytes == (adapter / "adapter_model.safetensors").stat().st_size
    text = " ".join(shown(report).split())
    for words in ("LORA", bert[-20:], "r=4, lora_alpha=16", "reviews.csv (classification)", "accuracy 0.500 -> 0.810"):
        assert words in text
    assert "encoder.layer.0-2.attention.self.query.lora_A.weight" in text
    assert "4 x 16" in text


def test_an_adapter_needs_no_run_beside_it(adapter: Path) -> None:
    report = inspect(str(adapter))
    assert "trained on" not in shown(report)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["method"] == "LORA"
    assert {"name", "shape", "dtype"} == set(found["tensors"][0])


def test_ranges_are_used_only_where_every_number_is_there() -> None:
    names = ["l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w"]
    folded = [name for name, *_ in fold_tensors([TensorEntry(name, (2,), "F32") for name in names])]
    assert folded == names
    complete = [TensorEntry(name, (2,), "F32") for name in [*names, "l.1.e.1.w"]]
    assert [name for name, *_ in fold_tensors(complete)] == ["l.0-1.e.0-1.w"]


def test_a_truncated_adapter_is_named(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors \(100 bytes\) is truncated"):
        inspect(str(adapter))


def test_an_adapter_without_tensors_is_named(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        inspect(str(adapter))


def test_a_damaged_results_file_is_named(adapter: Path) -> None:
    (adapter / "results.json").write_text('{"before":')
    with pytest.raises(CheckpointError, match=r"results.json cannot be read.*Remove it"):
        inspect(str(adapter))


def test_questions_about_a_model_are_refused_for_an_adapter(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="is an adapter; --method and --target need a model"):
        inspect(str(adapter), method="lora", target="query")


def test_a_name_that_is_nothing_gets_the_nearest_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'minlm' is neither an adapter's folder nor a model.*mean 'minilm'"):
        inspect("minlm")


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        inspect(str(tmp_path / "absent"))


def test_a_target_that_matches_nothing_gets_the_nearest_name(bert: str) -> None:
    with pytest.raises(TargetError, match="Did you mean 'query'"):
        inspect_model(bert, target="qeury")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "lroa"}, "Did you mean .*'lora'"), ({"task": "clasification"}, "Did you mean 'classification'")],
)
def test_an_unknown_method_or_task(bert: str, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inspect_model(bert, **arguments)


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A model's folder with weights, and a tokenizer of whole words."""
    folder = tmp_path / "words"
    torch.manual_seed(0)
    settings = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **settings)).save_pretrained(folder)
    names = ["?", "good", "bad", "film", "song", "dull", "fine", "long"]
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(folder)
    return str(folder)


def test_a_prompt_is_shown_in_words(words: str, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(words), "prompt_tuning:num_virtual_tokens=2")
    table = model.get_input_embeddings().base_layer.weight
    (prompt,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        prompt.copy_(torch.stack([2 * table[3], table[6] + 0.9 * table[2]]))
    model.save_pretrained(tmp_path / "prompt")
    report = inspect(str(tmp_path / "prompt"))
    assert isinstance(report, AdapterReport)
    first, second = report.to_dict()["nearest"]["prompt"]
    assert first[0] == ("film", 1.0)
    assert [word for word, _ in second[:2]] == ["fine", "bad"]
    cosines = torch.nn.functional.cosine_similarity(prompt[1], table)
    assert second[1][1] == pytest.approx(cosines[2].item(), abs=1e-3)
    assert "film 1.00" in shown(report)
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "prompt" / "adapter_config.json").write_text(json.dumps(config))
    assert "gone cannot be read on this machine" in " ".join(shown(inspect(str(tmp_path / "prompt"))).split())


def test_of_a_multitask_prompt_every_task_is_shown(words: str, tmp_path: Path) -> None:
    method = "multitask_prompt_tuning:num_virtual_tokens=2,num_tasks=2"
    model = get_peft_model(LlamaForCausalLM.from_pretrained(words), method)
    model.save_pretrained(tmp_path / "prompt")
    given = get_peft_model_state_dict(model)
    columns, rows = given["prefix_task_cols"], given["prefix_task_rows"]
    effective = given["prompt_embeddings"] * (columns[1] @ rows[1])
    cosines = torch.nn.functional.cosine_similarity(effective[0], model.get_input_embeddings().base_layer.weight)
    report = inspect(str(tmp_path / "prompt"))
    assert isinstance(report, AdapterReport)
    assert report.nearest["task 1"][0][0][1] == pytest.approx(cosines.max().item(), abs=1e-3)
    assert list(report.nearest) == ["task 0", "task 1"]
