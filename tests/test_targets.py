"""Which modules a configuration means, on small trees of modules and on whole models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import veneer
from tiny import SIZES, bert, llama
from veneer import BitFitConfig, BottleneckConfig, LoraConfig, get_peft_model
from veneer.adapted import adapters_of
from veneer.config import ModuleConfig
from veneer.errors import TargetError, VeneerWarning
from veneer.targets import exactly, match, walk


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList(Expert() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](self.norm(self.q_proj(x) + self.v_proj(x)))


class Small(nn.Module):
    """Three blocks, and a `q_proj` outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.q_proj(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def targets(model: nn.Module | None = None, **settings: Any) -> list[str]:
    return match(model or Small(), ModuleConfig(**settings))


def test_walking_lists_every_module_once_and_no_wrappers() -> None:
    model = Small()
    before = [path for path, _ in walk(model)]
    assert before[:6] == ["q_proj", "layers", "layers.0", "layers.0.q_proj", "layers.0.v_proj", "layers.0.norm"]
    assert len(before) == 1 + 1 + 3 * 9 + 1
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]))
    base = adapted.get_base_model()
    assert [path for path, _ in walk(base)] == before
    assert dict(walk(base))["head"] is model.head.base_layer


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["q_proj"], ["q_proj", "layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
        (["1.q_proj", "v_proj"], ["layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj", "layers.2.v_proj"]),
        (["layers.2.norm"], ["layers.2.norm"]),
        ({"head"}, ["head"]),
        (("head", "0.norm"), ["layers.0.norm", "head"]),  # in the order of the model
        (["experts.1.up"], [f"layers.{i}.experts.1.up" for i in range(3)]),
        ("head", ["head"]),
        (r"layers\.[01]\.(q|v)_proj", [f"layers.{i}.{name}_proj" for i in (0, 1) for name in "qv"]),
        (r"layers\.0\.v_proj|layers\.1\.v", ["layers.0.v_proj"]),
        (r".*norm", ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
    ],
)
def test_names_suffixes_and_expressions(target: Any, expected: list[str]) -> None:
    assert targets(target_modules=target) == expected


def test_an_expression_is_for_the_whole_path() -> None:
    with pytest.raises(
        TargetError,
        match=r"target_modules='v_proj' matches no module\. It is a regular expression for the whole path; write a "
        r"list to name modules: \['v_proj'\]\.",
    ):
        targets(target_modules="v_proj")
    with pytest.raises(TargetError, match=r"target_modules='\(v' is not a valid regular expression: missing \)"):
        targets(target_modules="(v")


def test_part_of_a_name_is_not_a_name() -> None:
    with pytest.raises(TargetError, match=r"\['proj'\] matches no module"):
        targets(target_modules=["proj"])
    with pytest.raises(TargetError, match=r"\['ayers.0.q_proj'\] matches no module"):
        targets(target_modules=["ayers.0.q_proj"])


def test_a_function_chooses() -> None:
    seen: list[str] = []

    def chosen(path: str, module: nn.Module) -> bool:
        seen.append(path)
        return isinstance(module, nn.Linear) and module.bias is None

    assert targets(target_modules=chosen) == [f"layers.{i}.v_proj" for i in range(3)]
    assert seen == [path for path, _ in walk(Small())]

    def none_at_all(path: str, module: nn.Module) -> bool:
        return False

    with pytest.raises(TargetError, match=r"=none_at_all matches no module\. The model has q_proj, layers,"):
        targets(target_modules=none_at_all)


def places(model: nn.Module) -> list[str]:
    return [wrapper.path for wrapper, _ in adapters_of(model, "default")]


@pytest.mark.parametrize("method", [LoraConfig, BitFitConfig])
def test_a_function_chooses_exactly_and_can_be_saved(method: Any, tmp_path: Path) -> None:
    """Its choice, `q_proj`, is also how other paths end."""

    def chosen(path: str, module: nn.Module) -> bool:
        return path in ("q_proj", "layers.1.norm") and (path == "q_proj" or method is BitFitConfig)

    model = get_peft_model(Small(), method(target_modules=chosen))
    expected = ["q_proj"] if method is LoraConfig else ["q_proj", "layers.1.norm"]
    assert places(model) == expected
    model.save_pretrained(tmp_path)
    assert places(veneer.PeftModel.from_pretrained(model.unload(), tmp_path)) == expected


def test_targets_that_match_these_paths_and_no_others() -> None:
    model = Small()
    paths = [path for path, _ in walk(model)]
    for wanted in (["q_proj"], ["layers.0.q_proj", "head"], ["q_proj", "head"], ["layers.1.experts.0.up"]):
        assert targets(model, target_modules=exactly(wanted, paths)) == wanted


# Shorthands


def test_all_linear() -> None:
    linear = [path for path, module in walk(Small()) if isinstance(module, nn.Linear)]
    assert targets(target_modules="all-linear") == linear
    assert targets(target_modules="ALL-linear") == linear
    assert targets(target_modules=["all-linear", "1.norm"]) == [
        path for path, module in walk(Small()) if isinstance(module, nn.Linear) or path == "layers.1.norm"
    ]


def test_all_linear_leaves_out_output_heads() -> None:
    def last(model: nn.Module, **settings: Any) -> str:
        return targets(model, target_modules="all-linear", **settings)[-1]

    assert "lm_head" not in last(llama())
    assert last(llama()) == "model.layers.1.mlp.down_proj"
    assert last(llama(tie_word_embeddings=True)) == "model.layers.1.mlp.down_proj"
    assert last(bert()) == "classifier"  # without a task it is a layer like others, as in peft
    assert last(bert(), task_type="SEQ_CLS") == "bert.pooler.dense"
    score = T.LlamaForSequenceClassification(T.LlamaConfig(**SIZES))
    assert last(score, task_type="SEQ_CLS") == "model.layers.1.mlp.down_proj"
    roberta = T.RobertaForSequenceClassification(T.RobertaConfig(**SIZES))
    assert last(roberta, task_type="SEQ_CLS") == "roberta.encoder.layer.1.output.dense"
    t5 = T.T5ForConditionalGeneration(T.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2))
    assert "lm_head" not in targets(t5, target_modules="all-linear")
    gpt2 = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    assert [path.rpartition("h.0.")[2] for path in targets(gpt2, target_modules="all-linear")] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


def test_the_head_of_a_task_is_trained_whole_and_takes_no_adapter() -> None:
    model = get_peft_model(bert(), "lora:target_modules=all-linear,task_type=TOKEN_CLS")
    wrapped = {wrapper.path: type(adapter).__name__ for wrapper, adapter in adapters_of(model, "default")}
    assert wrapped.pop("classifier") == "TrainedCopy"
    assert set(wrapped.values()) == {"Lora"}


def test_places_of_a_transformer() -> None:
    assert targets(llama(), target_modules="ffn-output") == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    both = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert targets(llama(), target_modules=["attention-output", "ffn-output"]) == both
    mixed = targets(llama(), target_modules=["ffn-output", "0.self_attn.q_proj"])
    assert mixed == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    with pytest.raises(TargetError, match=r"The place 'ffn-output' was not found"):
        targets(target_modules="ffn-output")


# Narrowing


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": 1}, ["layers.1.q_proj"]),
        ({"layers_to_transform": [0, 2]}, ["layers.0.q_proj", "layers.2.q_proj"]),
        ({"layers_to_transform": range(2)}, ["layers.0.q_proj", "layers.1.q_proj"]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ["layers.0.q_proj"]),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, ["layers.0.q_proj"]),
        ({"exclude_modules": ["layers.0.q_proj", "2.q_proj"]}, ["q_proj", "layers.1.q_proj"]),
        ({"exclude_modules": r"layers\.[12].*"}, ["q_proj", "layers.0.q_proj"]),
        ({"exclude_modules": ["0.q_proj"], "layers_to_transform": [0, 1]}, None),
    ],
)
def test_layers_and_exclusions(settings: dict[str, Any], expected: list[str] | None) -> None:
    if expected is None:
        with pytest.warns(VeneerWarning, match=r"layers_to_transform: there is nothing to adapt in the layers \[0\]"):
            assert targets(target_modules=["q_proj"], **settings) == ["layers.1.q_proj"]
    else:
        assert targets(target_modules=["q_proj"], **settings) == expected


def test_the_outermost_number_is_the_layer() -> None:
    assert targets(target_modules=["up"], layers_to_transform=[1]) == [f"layers.1.experts.{i}.up" for i in range(2)]
    found = targets(target_modules=["up"], layers_to_transform=[1], layers_pattern="experts")
    assert found == [f"layers.{i}.experts.1.up" for i in range(3)]
    with pytest.raises(
        TargetError, match=r"matches no module \(with layers_to_transform=1, layers_pattern='experts'\)"
    ):
        targets(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="experts")


@pytest.mark.parametrize("target", ["all-linear", lambda path, module: isinstance(module, nn.Linear)])
def test_layers_of_words_and_functions(target: Any, tmp_path: Path) -> None:
    class Named(nn.Module):
        """A linear layer has the name of a module in the blocks that is none."""

        def __init__(self) -> None:
            super().__init__()
            self.v_proj = nn.Linear(4, 4)
            self.layers = nn.ModuleList(nn.ModuleDict({"v_proj": nn.ReLU(), "k": nn.Linear(4, 4)}) for _ in range(2))

    model = get_peft_model(Named(), LoraConfig(target_modules=target, layers_to_transform=1))
    assert places(model) == ["layers.1.k"]
    model.save_pretrained(tmp_path)
    assert places(veneer.PeftModel.from_pretrained(model.unload(), tmp_path)) == ["layers.1.k"]


def test_modules_trained_whole_take_no_adapter() -> None:
    assert targets(target_modules="all-linear", modules_to_save=["head", "layers"]) == ["q_proj"]
    assert "layers.1.q_proj" not in targets(target_modules=["q_proj"], modules_to_save=["layers.1"])
    model = get_peft_model(Small(), LoraConfig(target_modules=["head", "v_proj"], modules_to_save=["head"]))
    kinds = {wrapper.path: type(adapter).__name__ for wrapper, adapter in adapters_of(model, "default")}
    assert kinds == {"head": "TrainedCopy", **{f"layers.{i}.v_proj": "Lora" for i in range(3)}}


# What matches nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_porj"]},
            r"\['q_porj'\] matches no module\. Did you mean 'q_proj'.*The model has q_proj, ",
        ),
        (
            {"target_modules": ["zzz"]},
            r"\['zzz'\] matches no module\. The model has q_proj, layers, v_proj, norm, experts",
        ),
        ({"target_modules": "q_porj"}, r"'q_porj' matches no module\. Did you mean 'q_proj'"),
        ({"target_modules": []}, r"target_modules=\[\] matches no module"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, r"\(with exclude_modules=\['head'\]\)"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, r"\(with modules_to_save=\['head'\]\)"),
        ({"target_modules": ["head"], "layers_to_transform": 1}, r"\(with layers_to_transform=1\)"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 7}, r"\(with layers_to_transform=7\)"),
    ],
)
def test_targets_that_match_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        targets(**settings)
    model = Small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, LoraConfig(**settings))
    assert model.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, r"Small: .*\['v_porj'\] match no module\. Did you mean 'v_proj'"),
        ({"exclude_modules": ["haed"]}, r"exclude_modules: \['haed'\] match no module\. Did you mean 'head'"),
        ({"exclude_modules": ["proj"]}, r"exclude_modules: \['proj'\] match no module\."),
        ({"exclude_modules": "norm"}, r"exclude_modules='norm' matches no module\. It is a regular expression"),
        ({"layers_to_transform": [1, 3, 5]}, r"layers_to_transform: .* in the layers \[3, 5\]"),
    ],
)  # fmt: skip
def test_parts_that_match_nothing_are_pointed_out(settings: dict[str, Any], message: str) -> None:
    settings = {"target_modules": ["q_proj"], **settings}
    with pytest.warns(VeneerWarning, match=message):
        found = targets(**settings)
    assert "layers.1.q_proj" in found
    with warnings.catch_warnings():  # a file's targets were settled when it was trained
        warnings.simplefilter("error")
        assert match(Small(), ModuleConfig(**settings), strict=False) == found


def test_patterns_that_match_nothing_are_pointed_out() -> None:
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"q_porj": 4, "1.q_proj": 2}, alpha_pattern={"head": 4})
    with pytest.warns(VeneerWarning) as caught:
        get_peft_model(Small(), config)
    assert [str(warning.message) for warning in caught] == [
        "Small: rank_pattern: ['q_porj'] match none of the adapted modules.",
        "Small: alpha_pattern: ['head'] match none of the adapted modules.",
    ]


def test_numbers_are_named_where_modules_have_no_names() -> None:
    with pytest.raises(TargetError, match=r"\['1'\] matches no module\. The model has 0\."):
        targets(nn.Sequential(nn.Linear(2, 2)), target_modules=["1"])
    with pytest.raises(
        TargetError, match=r"LoraConfig has no default targets for Sequential\. .*'all-linear' .*\['0'\]"
    ):
        match(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_targets_of_the_wrong_kind() -> None:
    with pytest.raises(
        TargetError, match=r"layers\.0 is a Block, no layer with a weight that is known; Lora adapts .*linear"
    ):
        get_peft_model(Small(), LoraConfig(target_modules=["layers.0"]))
    with pytest.raises(TargetError, match=r"layers\.0\.norm is a LayerNorm, a norm layer; .*Narrow `target_modules`"):
        get_peft_model(Small(), LoraConfig(target_modules=["norm"]))
    with pytest.raises(TargetError, match=r"modules_to_save: 'haed' matches no module\. Did you mean 'head'"):
        get_peft_model(Small(), LoraConfig(target_modules=["q_proj"], modules_to_save=["haed"]))


# On models that already have adapters


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "norm"], "layers_to_transform": [1]},
        {"target_modules": lambda path, module: isinstance(module, nn.Linear)},
        {"target_modules": ["0.up"], "exclude_modules": ["layers.1.experts.0.up"]},
    ],
)
def test_adapters_do_not_change_what_is_meant(settings: dict[str, Any]) -> None:
    expected = targets(**settings)
    model = get_peft_model(Small(), LoraConfig(target_modules=["q_proj", "0.up"], modules_to_save=["head"]))
    model.add_adapter("second", BitFitConfig(target_modules=["norm", "q_proj"]))
    assert targets(model.get_base_model(), **settings) == expected
    model.merge_adapter()
    assert targets(model.get_base_model(), **settings) == expected


def test_the_root_is_not_a_target() -> None:
    seen: list[str] = []

    def chosen(path: str, module: nn.Module) -> bool:
        seen.append(path)
        return isinstance(module, nn.Linear)

    get_peft_model(Small(), LoraConfig(target_modules=chosen))
    assert "" not in seen
    with pytest.raises(TargetError, match=r"all-linear' matches no module"):
        get_peft_model(nn.Linear(2, 2), LoraConfig(target_modules="all-linear"))


# Defaults


def names(model: nn.Module, config: ModuleConfig | None = None) -> set[str]:
    return {path.rpartition(".")[2] for path in match(model, config or LoraConfig())}


WIDE = {**SIZES, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 16}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: llama(), {"q_proj", "v_proj"}),
        (lambda: bert(), {"query", "value"}),
        (lambda: T.GPT2Model(T.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)), {"c_attn"}),
        (lambda: T.GPTNeoXModel(T.GPTNeoXConfig(**WIDE)), {"query_key_value"}),
        (lambda: T.DebertaV2Model(T.DebertaV2Config(**WIDE)), {"query_proj", "value_proj"}),
        (
            lambda: T.DistilBertModel(T.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24)),
            {"q_lin", "v_lin"},
        ),
        (lambda: T.T5Model(T.T5Config(vocab_size=50, d_model=16, d_kv=4, num_layers=1, num_heads=2)), {"q", "v"}),
        (lambda: T.ViTModel(T.ViTConfig(image_size=8, patch_size=4, **VISION)), {"q_proj", "v_proj"}),
        (lambda: T.Phi3Model(T.Phi3Config(num_key_value_heads=1, pad_token_id=0, **WIDE)), {"qkv_proj"}),
    ],
)  # fmt: skip
def test_lora_goes_on_queries_and_values(model: Any, expected: set[str]) -> None:
    assert names(model()) == expected


def test_bitfit_goes_where_there_are_biases() -> None:
    found = match(bert(), BitFitConfig())
    assert found == [path for path, module in walk(bert()) if getattr(module, "bias", None) is not None]
    assert "bert.embeddings.LayerNorm" in found
    assert match(llama(), BitFitConfig()) == targets(llama(), target_modules="all-linear")


def test_bottlenecks_go_after_attention_and_feed_forward() -> None:
    assert match(llama(), BottleneckConfig()) == targets(llama(), target_modules=["attention-output", "ffn-output"])


def test_no_default_is_an_error_with_the_way_on() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 2)

    with pytest.raises(TargetError, match=r"LoraConfig has no default targets for Conv\. Set target_modules, .*'conv'"):
        match(Conv(), LoraConfig())
