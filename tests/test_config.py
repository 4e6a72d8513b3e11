"""Methods as strings, mappings and files; the registry; what is refused and how."""

from __future__ import annotations

import importlib.metadata
import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml
from torch import nn

import veneer
from veneer import BitFitConfig, BottleneckConfig, LoraConfig, PeftConfig, PeftType, TaskType, parse_method, registry
from veneer.adapter import Adapter
from veneer.config import CONFIG_NAME, ModuleConfig
from veneer.errors import CheckpointError, ConfigError, TargetError, VeneerWarning
from veneer.registry import register

# Methods as strings


@pytest.mark.parametrize(
    ("spec", "field_name", "value"),
    [
        ("lora", "r", 8),
        ("lora:", "r", 8),
        ("lora:r=4", "r", 4),
        ("lora: r = 4 , lora_alpha = 32", "lora_alpha", 32),
        ("lora:lora_alpha=3.5", "lora_alpha", 3.5),
        ("lora:lora_dropout=1e-1", "lora_dropout", 0.1),
        ("lora:lora_dropout=.5e-1", "lora_dropout", 0.05),
        ("lora:lora_alpha=1.5E+2", "lora_alpha", 150.0),
        ("lora:use_rslora=true", "use_rslora", True),
        ("lora:init_lora_weights=false", "init_lora_weights", False),
        ("lora:init_lora_weights=gaussian", "init_lora_weights", "gaussian"),
        ("lora:target_modules=all-linear,r=2", "target_modules", "all-linear"),
        ("lora:target_modules=[q_proj,v_proj],r=2", "target_modules", ["q_proj", "v_proj"]),
        ("lora:target_modules=['a,b', \"c\"],r=2", "target_modules", ["a,b", "c"]),
        ("lora:target_modules='[qv]_proj'", "target_modules", "[qv]_proj"),
        ("lora:target_modules='a,b=c'", "target_modules", "a,b=c"),
        (r"lora:target_modules=.*\.(q|v){1,2},r=2", "target_modules", r".*\.(q|v){1,2}"),
        ("lora:target_modules=null", "target_modules", None),
        ("lora:layers_to_transform=[0, 2]", "layers_to_transform", [0, 2]),
        ("lora:layers_to_transform=3", "layers_to_transform", 3),
        ("lora:rank_pattern={q_proj: 4, 'layers.0.*': 2},r=3", "rank_pattern", {"q_proj": 4, "layers.0.*": 2}),
        ("lora:alpha_pattern={q: 1e1}", "alpha_pattern", {"q": 10.0}),
        ("lora:revision='1e5'", "revision", "1e5"),
        ("lora:base_model_name_or_path=org/model=1", "base_model_name_or_path", "org/model=1"),
        ("lora:task_type=SEQ_CLS", "task_type", TaskType.SEQ_CLS),
        ("pfeiffer", "target_modules", "ffn-output"),
        ("pfeiffer:target_modules=[x]", "target_modules", ["x"]),
        ("bottleneck:non_linearity=tanh,scaling=2", "non_linearity", "tanh"),
    ],
)
def test_values_in_a_method_string(spec: str, field_name: str, value: Any) -> None:
    found = getattr(parse_method(spec), field_name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lroa:r=4", r"Unknown method 'lroa'\. Did you mean .*'lora'.*\? Known: .*bitfit.*lora"),
        ("", r"Unknown method ''\. Known: .*lora"),
        ("lora:rnak=4,r=2", r"method 'lora' has no setting 'rnak'"),
        ("lora:lora_alhpa=4", r"no setting 'lora_alhpa'\. Did you mean 'lora_alpha'"),
        ("lora:r", r"'lora:r': 'r' is not of the form setting=value"),
        ("lora:r=4,lora_alpha 8", r"'lora_alpha 8' is not of the form setting=value"),
        ("lora:r=4,lora_alpha=8,r=2", r"'r' is set twice"),
        ("lora:r=four", r"LoraConfig: r='four'; int was expected"),
        ("lora:r=4.5", r"r=4\.5; int was expected"),
        ("lora:r=", r"r=None; int was expected"),
        ("lora:r=null", r"r=None; int was expected"),
        ("lora:r=true", r"r=True; int was expected"),
        ("lora:r=0", r"r=0; a positive whole number was expected"),
        ("lora:r=-2", r"r=-2; a positive whole number"),
        ("lora:lora_alpha=null", r"lora_alpha=None; float was expected"),
        ("lora:lora_alpha=much", r"lora_alpha='much'; float was expected"),
        ("lora:lora_dropout=1.0", r"lora_dropout=1\.0; a share in \[0, 1\)"),
        ("lora:lora_dropout=-0.1", r"lora_dropout=-0\.1; a share in \[0, 1\)"),
        ("lora:use_rslora=2", r"use_rslora=2; bool was expected"),
        ("lora:revision=123", r"revision=123; str \| None was expected"),
        ("lora:modules_to_save=head", r"modules_to_save='head'; list\[str\] \| None was expected\. .*list: \[head\]"),
        ("lora:layers_to_transform=[0, x]", r"layers_to_transform=\[0, 'x'\]; list\[int\] \| int \| None"),
        ("lora:rank_pattern={q: x}", r"rank_pattern=\{'q': 'x'\}; dict\[str, int\] was expected"),
        ("lora:rank_pattern={q: 0}", r"rank_pattern\['q'\]=0; a positive whole number"),
        ("lora:rank_pattern={'(q': 2}", r"rank_pattern.*'\(q' is not a valid regular expression"),
        ("lora:alpha_pattern={'*q': 2}", r"alpha_pattern: '\*q' is not a valid regular expression: nothing to repeat"),
        ("lora:exclude_modules='(q'", r"exclude_modules: '\(q' is not a valid regular expression"),
        (
            "lora:layers_to_transform=0,layers_pattern=['h(']",
            r"layers_pattern: 'h\(' is not a valid regular expression",
        ),
        ("lora:layers_pattern=h", r"layers_pattern was given without layers_to_transform"),
        ("lora:target_modules='.*q',layers_to_transform=1", r"layers_to_transform .* regular expression .*'\.\*q'"),
        ("lora:target_modules=[qv]_proj", r"value of 'target_modules' is not readable: '\[qv\]_proj'.*in quotes"),
        ("lora:target_modules=[q,v", r"value of 'target_modules' is not readable: '\[q,v'.*Close its brackets"),
        ("lora:task_type=SEQCLS", r"task_type='SEQCLS' is not one of SEQ_CLS, .*Did you mean 'SEQ_CLS'\?"),
        ("lora:init_lora_weights=gausian", r"init_lora_weights='gausian' .*Did you mean 'gaussian'"),
        (
            "lora:init_lora_weights=pisa",
            r"init_lora_weights='pisa' is not in this version .*orthogonal.*Did you mean 'pissa'",
        ),
        ("lora:peft_type=BITFIT", r"peft_type='BITFIT'.*'LORA'"),
        (
            "bottleneck:non_linearity=rleu",
            r"non_linearity='rleu'; one of 'relu', .* was expected\. Did you mean 'relu'",
        ),
        ("bottleneck:reduction=0", r"reduction=0; a positive whole number"),
        ("bottleneck:bottleneck_size=-1", r"bottleneck_size=-1; a positive whole number"),
        ("bottleneck:dropout=2", r"dropout=2; a share in \[0, 1\)"),
    ],
)
def test_method_strings_that_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_method(spec)


def test_mappings() -> None:
    found = parse_method({"name": "lora", "r": 4, "target_modules": {"v", "q"}, "layers_to_transform": range(2)})
    assert isinstance(found, LoraConfig)
    assert (found.r, found.target_modules, found.layers_to_transform) == (4, ["q", "v"], [0, 1])
    given = {"name": "lora", "r": 4}
    parse_method(given)
    assert given == {"name": "lora", "r": 4}
    assert parse_method(found) is found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"r": 4}, r"has no 'name'\. Give one of .*lora"),
        ({"name": None}, r"Unknown method None"),
        ({"name": "lora", "r": "8"}, r"r='8'; int was expected"),
        ({"name": "lora", "rr": 8}, r"no setting 'rr'"),
        ({"name": "lora", 8: 8}, r"no setting 8"),
        (None, r"None describes no method\. Give a string such as 'lora:r=8'"),
        (8, r"8 describes no method"),
    ],
)
def test_mappings_that_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_method(spec)


def test_every_method_has_a_name_a_class_and_defaults() -> None:
    for name, cls, preset in registry.methods():
        found = parse_method(name)
        assert type(found) is cls
        assert {key: getattr(found, key) for key in preset} == preset
        assert issubclass(cls.adapter, Adapter)
    assert veneer.method_names() == sorted(name for name, *_ in registry.methods())
    assert {"lora", "bitfit", "bottleneck", "houlsby", "pfeiffer"} <= set(veneer.method_names())


# Configurations in code


def test_types_are_checked_in_code_as_well() -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig: r='8'; int was expected"):
        LoraConfig(r="8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"BottleneckConfig: reduction=1\.5; int was expected"):
        BottleneckConfig(reduction=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task_type=3"):
        LoraConfig(task_type=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("megatron_config", {"a": 1}, "Megatron"),
    ],
)
def test_what_is_only_planned_is_refused(name: str, value: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"LoraConfig\({name}=.*{what}.* is not in this version.*Leave {name} at"):
        LoraConfig(**{name: value})


def test_planned_fields_take_their_defaults_and_nothing() -> None:
    assert LoraConfig(arrow_config=None, loftq_config={}).loftq_config == {}
    assert LoraConfig(loftq_config=None).loftq_config is None  # type: ignore[arg-type]  # as older files have it


def test_collections_of_names_become_sorted_lists() -> None:
    found = LoraConfig(target_modules={"v", "q"}, exclude_modules=("b", "a"), modules_to_save=("head",))  # type: ignore[arg-type]
    assert (found.target_modules, found.exclude_modules, found.modules_to_save) == (["q", "v"], ["a", "b"], ["head"])


def test_rank_and_alpha_at_a_path() -> None:
    settings = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, r"layers\.[01]\.v_proj": 2, "model.layers.2.v_proj": 3},
        alpha_pattern={"q_proj": 1.5},
    )

    def at(path: str) -> tuple[int, float]:
        found = settings.at(path)
        return found.r, found.lora_alpha

    assert at("model.layers.0.q_proj") == (4, 1.5)
    assert at("q_proj") == (4, 1.5)
    assert at("model.layers.0.v_proj") == (2, 16)
    assert at("model.layers.2.v_proj") == (3, 16)
    assert at("model.layers.3.v_proj") == (8, 16)
    assert at("model.layers.0.my_q_proj") == (8, 16)  # a name counts from a dot on
    assert at("model.q_proj.inner") == (8, 16)
    assert settings.at("k_proj") is settings
    assert settings.r == 8


# Files


@pytest.mark.parametrize(
    "given",
    [
        LoraConfig(r=3, lora_alpha=2.5, rank_pattern={"q": 2}, layers_to_transform=[1], task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q"], modules_to_save=["head"], init_lora_weights="orthogonal", use_rslora=True),
        BitFitConfig(target_modules="all-linear", exclude_modules=r".*\.k"),
        BottleneckConfig(bottleneck_size=7, non_linearity="swish", scaling=0.5),
        parse_method("pfeiffer"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_round_trip_through_a_file(given: PeftConfig, tmp_path: Path) -> None:
    given.save_pretrained(tmp_path)
    found = PeftConfig.from_pretrained(tmp_path)
    assert found == given
    assert type(found) is type(given)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert values["peft_type"] == type(given).peft_name
    assert list(values) == sorted(values)


def write(folder: Path, **values: Any) -> Path:
    text = json.dumps({"peft_type": "LORA", **values})
    (folder / CONFIG_NAME).write_text(text)
    return folder


def test_overrides_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, r=4)
    assert PeftConfig.from_pretrained(tmp_path, lora_alpha=3).lora_alpha == 3
    with pytest.raises(ConfigError, match="no setting 'lora_alhpa'"):
        PeftConfig.from_pretrained(tmp_path, lora_alhpa=3)


def test_the_file_says_which_method_it_is(tmp_path: Path) -> None:
    BitFitConfig().save_pretrained(tmp_path)
    assert type(LoraConfig.from_pretrained(tmp_path)) is BitFitConfig  # as in peft
    assert type(LoraConfig.from_dict({"r": 4})) is LoraConfig
    with pytest.raises(ConfigError, match=r"adapter_config\.json: peft_type 'LORAX' is no method.*Did you mean 'LORA'"):
        PeftConfig.from_pretrained(write(tmp_path, peft_type="LORAX"))
    with pytest.raises(ConfigError, match="peft_type '' is no method"):
        PeftConfig.from_dict({"r": 4})


def test_unknown_keys_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, lora_alhpa=16)
    with pytest.raises(ConfigError, match=r"no setting 'lora_alhpa' \(value 16\)\. Did you mean 'lora_alpha'.*Remove"):
        PeftConfig.from_pretrained(tmp_path)
    write(tmp_path, of_a_later_version=None, r=4)
    with pytest.warns(VeneerWarning, match=r"ignored the unknown, empty setting 'of_a_later_version'"):
        found = PeftConfig.from_pretrained(tmp_path)
    assert found.r == 4


@pytest.mark.parametrize("empty", [None, False, 0, "", [], {}])
def test_empty_values_of_unknown_keys_ask_for_nothing(empty: Any) -> None:
    with pytest.warns(VeneerWarning, match="'extra'"):
        PeftConfig.from_dict({"peft_type": "LORA", "extra": empty})


def test_settings_of_a_run_of_peft_are_passed_over() -> None:
    assert (
        PeftConfig.from_dict({"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}}) == LoraConfig()
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": "8"}, r"adapter_config\.json: LoraConfig: r='8'; int was expected"),
        ({"lora_dropout": "a"}, r"lora_dropout='a'; float was expected"),
        ({"rank_pattern": None}, r"rank_pattern=None; dict\[str, int\] was expected"),
        ({"megatron_config": {"a": 1}}, r"adapter_config\.json: LoraConfig\(megatron_config=.* is not in this version"),
        ({"task_type": "X"}, r"adapter_config\.json: task_type='X' is not one of"),
    ],
)
def test_values_of_a_file_that_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        PeftConfig.from_pretrained(write(tmp_path, **values))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not readable as JSON .*save the adapter again"),
        (b'{"peft_type": "LORA", "r": ', r"not readable as JSON"),
        (b'{"peft_type": "LORA"}}', r"not readable as JSON"),
        (b"\xff\xfe\x00", r"not readable as JSON"),
        (b"[1, 2]", r"a JSON object was expected, found a list"),
        (b'"LORA"', r"a JSON object was expected, found a str"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {message}"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_function_has_no_form_in_a_file(tmp_path: Path) -> None:
    def chosen(path: str, module: nn.Module) -> bool:
        return True

    with pytest.raises(ConfigError, match=r"target_modules=.*chosen is a function .*Name the modules instead"):
        LoraConfig(target_modules=chosen).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"LoraConfig cannot be written to a file: .*PosixPath|WindowsPath"):
        LoraConfig(target_modules=[Path("a")]).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_peft_types_are_the_registered_names() -> None:
    assert PeftType.LORA == "LORA"
    assert {"LORA", "BITFIT", "BOTTLENECK"} <= set(PeftType)
    assert not hasattr(PeftType, "LORAX")
    with pytest.raises(AttributeError, match=r"'LORAX' is no method.*Did you mean 'LORA'"):
        _ = PeftType.LORAX


# The registry


@pytest.fixture
def changeable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry whose changes are taken back."""
    veneer.method_names()
    monkeypatch.setattr(registry, "_by_name", dict(registry._by_name))
    monkeypatch.setattr(registry, "_by_peft_type", dict(registry._by_peft_type))
    monkeypatch.setattr(registry, "_discovered", True)


class Nothing(Adapter):
    """An adapter that does nothing."""


@pytest.mark.usefixtures("changeable")
def test_a_third_party_method(tmp_path: Path) -> None:
    @register("nothing_much", size=3)
    @register("nothing")
    @dataclass
    class NothingConfig(ModuleConfig):
        adapter = Nothing
        peft_name = "NOTHING"
        size: int = 1
        kind: Literal["a", "b"] = "a"
        more: dict[str, int] = field(default_factory=dict)

    assert "nothing" in veneer.method_names()
    assert parse_method("nothing:kind=b").kind == "b"
    assert parse_method("nothing_much").size == 3
    assert parse_method("nothing_much:size=5").size == 5
    assert PeftType.NOTHING == "NOTHING"
    NothingConfig(size=2).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == NothingConfig(size=2)
    with pytest.raises(ConfigError, match=r"kind='c'; one of 'a', 'b' was expected"):
        NothingConfig(kind="c")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Did you mean 'nothing'"):
        parse_method("nothin")


@pytest.mark.usefixtures("changeable")
def test_names_that_are_taken() -> None:
    def another(name: str, file_name: str) -> None:
        @register(name)
        @dataclass
        class Another(ModuleConfig):
            adapter = Nothing
            peft_name = file_name

    with pytest.raises(ConfigError, match=r"The method 'lora' of Another is already taken by LoraConfig"):
        another("lora", "ANOTHER")
    with pytest.raises(ConfigError, match=r"The peft_type 'LORA' of Another is already taken by LoraConfig"):
        another("another", "LORA")
    assert type(parse_method("lora")) is LoraConfig
    assert "another" not in veneer.method_names()
    another("another", "ANOTHER")
    another("another", "ANOTHER")  # the same class again, as when its module is reloaded


@pytest.mark.usefixtures("changeable")
def test_a_class_without_names_is_not_registered() -> None:
    with pytest.raises(ConfigError, match=r"Bare needs the class attributes `peft_name` and `adapter`"):

        @register("bare")
        @dataclass
        class Bare(ModuleConfig):
            pass


PLUGIN = """
from dataclasses import dataclass
from veneer.adapter import Adapter
from veneer.config import ModuleConfig
from veneer.registry import register

class Plugged(Adapter):
    pass

@register("plugged")
@dataclass
class PluggedConfig(ModuleConfig):
    adapter = Plugged
    peft_name = "PLUGGED"
    strength: float = 1.0
"""


@pytest.mark.usefixtures("changeable")
def test_methods_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "veneer_plugin_for_a_test.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        importlib.metadata.EntryPoint("gone", "veneer_plugin_that_is_not_there", "veneer.methods"),
        importlib.metadata.EntryPoint("plugged", "veneer_plugin_for_a_test", "veneer.methods"),
    ]
    asked: list[dict[str, str]] = []

    def entry_points(**query: str) -> list[importlib.metadata.EntryPoint]:
        asked.append(query)
        return entries

    monkeypatch.setattr(registry.importlib, "metadata", SimpleNamespace(entry_points=entry_points))
    monkeypatch.setattr(registry, "_discovered", False)
    with pytest.warns(
        VeneerWarning, match=r"'veneer_plugin_that_is_not_there'.*ModuleNotFoundError.*Update that package"
    ):
        found = parse_method("plugged:strength=1e-2")
    assert found.strength == 0.01
    assert parse_method("lora").peft_type == "LORA"
    assert PeftConfig.from_dict({"peft_type": "PLUGGED"}).peft_type == "PLUGGED"
    assert asked == [{"group": "veneer.methods"}]  # once, not at every call


def test_the_base_configuration_attaches_to_nothing() -> None:
    assert PeftConfig().peft_type is None
    assert not PeftConfig().is_prompt_learning
    with pytest.raises((ConfigError, TargetError), match="PeftConfig describes no method"):
        veneer.get_peft_model(nn.Sequential(nn.Linear(2, 2)), PeftConfig())


def test_a_resolved_configuration_reads_back_from_yaml() -> None:
    given = parse_method("lora:r=4,lora_dropout=1e-1,rank_pattern={q: 2}")
    text = yaml.safe_dump({"name": "lora", **json.loads(given.to_text())})
    assert parse_method(yaml.safe_load(text)) == given


def test_patterns_keep_their_order_in_files(tmp_path: Path) -> None:  # the first that matches counts
    config = LoraConfig(rank_pattern={"q_proj": 2, "layers.0.q_proj": 4, "k_proj": 3})
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert list(read.rank_pattern) == ["q_proj", "layers.0.q_proj", "k_proj"]
