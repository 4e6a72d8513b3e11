"""Adapter files that are broken, do not fit or come from elsewhere; saves that fail or are killed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tiny import bert, llama, randomise, tokens
from veneer import BitFitConfig, LoraConfig, PeftModel, checkpoint, get_peft_model
from veneer.checkpoint import PICKLE_NAME, WEIGHTS_NAME
from veneer.config import CONFIG_NAME
from veneer.errors import BaseMismatchError, CheckpointError, ConfigError, TargetError, VeneerWarning

METHODS = ["lora:r=4,lora_alpha=12", "bitfit", "houlsby:reduction=4"]


def trained(method: str = METHODS[0], base: nn.Module | None = None) -> PeftModel:
    """A model with a random adapter."""
    model = get_peft_model(base or llama(), method)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA adapter of `llama()`; tests may not change it."""
    folder = tmp_path_factory.mktemp("adapter")
    trained().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to be changed."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class State:
    """All of a model that a failed call may not change."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {key: value.clone() for key, value in model.state_dict().items()}
        self.modules = {name: type(module) for name, module in model.named_modules()}
        self.trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.adapters = dict(getattr(model, "peft_config", {}))
        self.active = getattr(model, "active_adapters", None)

    def holds(self, model: nn.Module) -> None:
        now = State(model)
        assert now.modules == self.modules
        assert same(now.tensors, self.tensors)
        assert now.trained == self.trained
        assert now.adapters == self.adapters
        assert now.active == self.active


def fails_to_load(folder: Path | str, error: type[Exception], message: str, **how: Any) -> None:
    """Loading raises, on a plain model and on one with adapters, and both are left as they were."""
    plain = llama()
    before = State(plain)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(plain, folder, **how)
    before.holds(plain)
    adapted = trained("lora:r=2,target_modules=[q_proj]")
    before, x = State(adapted), tokens()
    expected = adapted(x).logits
    with pytest.raises(error, match=message):
        adapted.load_adapter(folder, "second", **how)
    before.holds(adapted)
    assert torch.equal(adapted(x).logits, expected)


# What is written


def test_the_two_files_of_an_adapter(saved: Path) -> None:
    assert listing(saved) == [CONFIG_NAME, WEIGHTS_NAME]
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as file:
        header = file.metadata()
        names = set(file.keys())
    assert header["format"] == "pt"
    own = json.loads(header["veneer"])
    layer = "model.layers.0.self_attn.q_proj"
    assert f"base_model.model.{layer}.lora_A.weight" in names
    assert len(names) == 8
    weight = llama().get_submodule(layer).weight.flatten()
    expected = [weight[i].item() for i in (0, 256, 512, 768)]  # of 1024
    assert own["base"][layer] == pytest.approx(expected, abs=1e-6)
    assert json.loads((saved / CONFIG_NAME).read_text())["inference_mode"] is True


def test_adapters_have_folders_of_their_names(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("second", "bitfit")
    model.set_adapter("second")
    randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    assert listing(tmp_path) == [CONFIG_NAME, WEIGHTS_NAME, "second"]
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "second", "second")
    loaded.load_adapter(tmp_path, "default")
    for name in ("default", "second"):
        wanted = veneer.get_peft_model_state_dict(model, adapter_name=name)
        assert same(veneer.get_peft_model_state_dict(loaded, adapter_name=name), wanted)
    again = PeftModel.from_pretrained(llama(), tmp_path, subfolder="second")
    assert again.peft_type == "BITFIT"
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert listing(tmp_path / "one") == ["second"]
    assert model.peft_config["second"].inference_mode is False  # saving changes the file, not the model


def test_loaded_tensors_are_copies_in_the_type_of_the_adapter(tmp_path: Path) -> None:
    first = trained()
    given = veneer.get_peft_model_state_dict(first)
    second = get_peft_model(llama(), METHODS[0], low_cpu_mem_usage=True)
    veneer.set_peft_model_state_dict(second, {key: value.bfloat16() for key, value in given.items()})
    for name, parameter in second.named_parameters():
        assert parameter.dtype == torch.float32, name
    veneer.set_peft_model_state_dict(get_peft_model(llama(), METHODS[0], low_cpu_mem_usage=True), given)
    third = get_peft_model(llama(), METHODS[0], low_cpu_mem_usage=True)
    veneer.set_peft_model_state_dict(third, given)
    with torch.no_grad():
        for parameter in third.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert same(veneer.get_peft_model_state_dict(first), veneer.get_peft_model_state_dict(trained()))


def test_tensors_can_be_read_without_a_model(saved: Path) -> None:
    assert same(veneer.load_peft_weights(saved), tensors_of(saved))


# Files that are broken


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_files_are_refused(
    data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = (saved / WEIGHTS_NAME).read_bytes()
    length = data.draw(st.integers(0, len(whole) - 1))
    folder = tmp_path_factory.mktemp("truncated")
    (folder / WEIGHTS_NAME).write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_NAME} \({length} bytes\) is truncated .*Copy or save"):
        checkpoint.read(folder)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_truncated_files_leave_models_alone(broken: Path, length: int) -> None:
    path = broken / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:length])
    fails_to_load(broken, CheckpointError, "is truncated or no safetensors file")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bits_in_the_data_are_noticed(
    data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((saved / WEIGHTS_NAME).read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    bit = data.draw(st.integers(8 * start, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    folder = tmp_path_factory.mktemp("flipped")
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_NAME} is corrupted: .*checksum"):
        checkpoint.read(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_in_the_header_never_changes_what_is_read(
    data: st.DataObject, saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((saved / WEIGHTS_NAME).read_bytes())
    size = 8 + struct.unpack("<Q", content[:8])[0]
    bit = data.draw(st.integers(0, 8 * size - 1))
    content[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "flipped-header"
    path.mkdir(exist_ok=True)
    (path / WEIGHTS_NAME).write_bytes(content)
    expected, own = checkpoint.read(saved)
    try:
        tensors, header = checkpoint.read(path)
    except CheckpointError:
        return
    assert same(tensors, expected)
    assert header in ({}, own)  # a header that is not recognised is as good as none


def test_flipped_bits_leave_models_alone(broken: Path) -> None:
    path = broken / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    fails_to_load(broken, CheckpointError, "is corrupted")


@pytest.mark.parametrize("own", ["", "[]", "3", '"x"', "{}", '{"sha256": "0"}', '{"base": {}}'])
def test_a_header_of_ours_that_says_nothing_is_refused(broken: Path, own: str) -> None:
    save_file(tensors_of(broken), broken / WEIGHTS_NAME, metadata={"veneer": own})
    with pytest.raises(CheckpointError, match="is corrupted"):
        checkpoint.read(broken)


def test_files_of_others_have_no_checksum(broken: Path) -> None:
    save_file(tensors_of(broken), broken / WEIGHTS_NAME)
    assert checkpoint.read(broken)[1] == {}
    loaded = PeftModel.from_pretrained(llama(seed=1), broken)  # and no fingerprint of their base either
    assert same(veneer.get_peft_model_state_dict(loaded), tensors_of(broken))


def test_what_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    fails_to_load(tmp_path, CheckpointError, rf"has no {CONFIG_NAME}; it holds: nothing")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / CONFIG_NAME).write_bytes((saved / CONFIG_NAME).read_bytes())
    fails_to_load(tmp_path / "half", CheckpointError, rf"has no {WEIGHTS_NAME}\. Name the folder that an adapter was")
    (tmp_path / WEIGHTS_NAME).write_bytes((saved / WEIGHTS_NAME).read_bytes())
    fails_to_load(tmp_path, CheckpointError, rf"has no {CONFIG_NAME}; it holds: {WEIGHTS_NAME}")
    fails_to_load(saved, CheckpointError, f"has no {CONFIG_NAME}", subfolder="other")
    fails_to_load(
        "no-such-user/no-such-adapter", CheckpointError, "is no folder here.*could not be fetched from the hub"
    )
    fails_to_load(str(tmp_path / "not" / "there"), CheckpointError, "is no folder here")


def test_a_pointer_of_git_lfs_is_no_adapter(broken: Path) -> None:
    (broken / WEIGHTS_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    fails_to_load(broken, CheckpointError, "no safetensors file")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", CheckpointError, "not readable as JSON"),
        ('{"peft_type": "LORA", "r": 4, "lora_alhpa": 12}', ConfigError, "Did you mean 'lora_alpha'"),
        ('{"peft_type": "SOMETHING"}', ConfigError, "peft_type 'SOMETHING' is no method"),
        ('{"peft_type": "LORA", "target_modules": ["q_prj"]}', TargetError, "Did you mean 'q_proj'"),
        ('{"peft_type": "LORA", "r": 8}', CheckpointError, r"has shape \(4, 32\), expected \(8, 32\)"),
    ],
)
def test_configurations_that_do_not_fit(broken: Path, content: str, error: type[Exception], message: str) -> None:
    (broken / CONFIG_NAME).write_text(content)
    fails_to_load(broken, error, message)


# Pickles


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_pickles_are_read_only_if_asked_for(broken: Path) -> None:
    tensors = tensors_of(broken)
    (broken / WEIGHTS_NAME).unlink()
    torch.save(tensors, broken / PICKLE_NAME)
    fails_to_load(broken, CheckpointError, rf"{PICKLE_NAME} is a pickle, .*can run code.*allow_pickle=True")
    loaded = PeftModel.from_pretrained(llama(), broken, allow_pickle=True)
    assert same(veneer.get_peft_model_state_dict(loaded), tensors)
    loaded.load_adapter(broken, "second", allow_pickle=True)
    assert same(veneer.get_peft_model_state_dict(loaded, adapter_name="second"), tensors)


def test_code_in_a_pickle_is_never_run(broken: Path) -> None:
    mark = broken / "was-run"
    (broken / WEIGHTS_NAME).unlink()
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        write({"x": Evil(mark)}, broken / PICKLE_NAME)
        fails_to_load(broken, CheckpointError, "is a pickle")
        fails_to_load(broken, CheckpointError, "is truncated, or holds more than tensors", allow_pickle=True)
    assert not mark.exists()


def test_pickles_beside_an_adapter_are_not_touched(broken: Path) -> None:
    mark = broken / "was-run"
    for name in (PICKLE_NAME, "training_args.bin", "optimizer.pt"):
        torch.save({"x": Evil(mark)}, broken / name)
    PeftModel.from_pretrained(llama(), broken, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04 truncated", b"nonsense"])
def test_broken_pickles(broken: Path, content: bytes) -> None:
    (broken / WEIGHTS_NAME).unlink()
    (broken / PICKLE_NAME).write_bytes(content)
    fails_to_load(broken, CheckpointError, rf"{PICKLE_NAME} \({len(content)} bytes\) is truncated", allow_pickle=True)


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), {"a": 3}])
def test_pickles_of_something_else(broken: Path, value: Any) -> None:
    (broken / WEIGHTS_NAME).unlink()
    torch.save(value, broken / PICKLE_NAME)
    fails_to_load(broken, CheckpointError, "holds no dictionary of tensors", allow_pickle=True)


# Tensors that do not fit


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed(broken: Path) -> None:
    tensors = tensors_of(broken)
    q, v = (f"base_model.model.model.layers.0.self_attn.{name}.lora_" for name in ("q_proj", "v_proj"))
    tensors[f"{q}C.weight"] = tensors.pop(f"{q}A.weight")
    tensors[f"{v}B.weight"] = torch.zeros(5, 4)
    tensors["base_model.model.other"] = torch.zeros(3)
    save_file(tensors, broken / WEIGHTS_NAME)
    path = r"model\.layers\.0\.self_attn"
    message = (
        rf"(?s)does not fit adapter '\w+' on this LlamaForCausalLM:\s+missing {path}\.q_proj\.lora_A\.weight \(4, 32\)"
        rf"\s+unexpected {path}\.q_proj\.lora_C\.weight \(4, 32\) Did you mean '{path}\.q_proj\.lora_B\.weight'\?"
        r"\s+unexpected other \(3,\)"
        rf"\s+{path}\.v_proj\.lora_B\.weight has shape \(5, 4\), expected \(16, 4\)\n"
        r"Load it onto the base model and with the configuration that it was trained with\."
    )
    fails_to_load(broken, CheckpointError, message)
    model = trained()
    before = State(model)
    with pytest.raises(CheckpointError, match=message.replace(r"\w+", "default")):
        veneer.set_peft_model_state_dict(model, tensors)
    before.holds(model)


def test_a_long_list_is_cut(broken: Path) -> None:
    save_file({f"x{i}": torch.zeros(1) for i in range(9)}, broken / WEIGHTS_NAME)
    fails_to_load(broken, CheckpointError, r"(?s)missing .*and 5 more\n")


def test_an_adapter_of_another_method(tmp_path: Path, saved: Path) -> None:
    trained("bitfit:target_modules=[q_proj]").save_pretrained(tmp_path)
    message = (
        r"(?s)missing model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight.*unexpected .*q_proj\.bitfit_delta \(32,\)"
    )
    fails_to_load(tmp_path, CheckpointError, message, config=LoraConfig(r=4, target_modules=["q_proj"]))
    fails_to_load(saved, CheckpointError, r"(?s)missing .*bitfit_delta", config=BitFitConfig(target_modules=["q_proj"]))


def test_a_larger_model_of_the_family(saved: Path) -> None:
    model = llama(hidden_size=64)
    before = State(model)
    with pytest.raises(CheckpointError, match=r"has shape \(4, 32\), expected \(4, 64\)"):
        PeftModel.from_pretrained(model, saved, check_base=False)
    with pytest.raises(CheckpointError, match=r"has shape|was trained on another base model"):
        PeftModel.from_pretrained(model, saved)
    before.holds(model)


def test_embeddings_that_a_file_brings_along(broken: Path) -> None:
    tensors = tensors_of(broken)
    key = "base_model.model.model.embed_tokens.weight"
    tensors[key] = llama().model.embed_tokens.weight.detach().clone()
    save_file(tensors, broken / WEIGHTS_NAME)
    PeftModel.from_pretrained(llama(), broken)  # the same embeddings: nothing to say
    tensors[key] += 1
    save_file(tensors, broken / WEIGHTS_NAME)
    with pytest.warns(VeneerWarning, match=r"brings its own model\.embed_tokens\.weight; it replaced the base model's"):
        loaded = PeftModel.from_pretrained(llama(), broken)
    assert torch.equal(loaded.get_base_model().model.embed_tokens.weight, tensors[key])


# Other base models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [llama, bert])
def test_another_base_of_the_same_shapes_is_refused(method: str, family: Any, tmp_path: Path) -> None:
    model = trained(method, family())
    model.save_pretrained(tmp_path)
    other = family(seed=1)
    before = State(other)
    with pytest.raises(
        BaseMismatchError,
        match=rf"was trained on another base model: .* differ by \d+% from those of this {type(other).__name__}\. "
        r"Load the base that the adapter names .*check_base=False",
    ):
        PeftModel.from_pretrained(other, tmp_path)
    before.holds(other)
    loaded = PeftModel.from_pretrained(other, tmp_path, check_base=False)
    assert same(veneer.get_peft_model_state_dict(loaded), veneer.get_peft_model_state_dict(model))


def test_another_base_is_refused_beside_other_adapters(saved: Path) -> None:
    model = trained("lora:r=2,target_modules=[q_proj]", llama(seed=1))
    before = State(model)
    with pytest.raises(BaseMismatchError, match="check_base=False"):
        model.load_adapter(saved, "second")
    before.holds(model)
    model.load_adapter(saved, "second", check_base=False)
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_type_is_accepted(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained(method).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(llama(), tmp_path / "again")


def test_the_base_is_known_while_other_adapters_are_on_it_or_merged(saved: Path, tmp_path: Path) -> None:
    model = trained("lora:r=2,target_modules=[q_proj]")
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert same(tensors_of(tmp_path / "second"), tensors_of(saved))
    PeftModel.from_pretrained(llama(), tmp_path / "second")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite(value: float, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = llama()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.fill_(value)
        return model

    trained(base=base()).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(llama(), tmp_path)
    trained().save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(base(), tmp_path)


# Saves that fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("Error: I/O error: No space left on device (os error 28)"), "No space left.*Free some space"),
        (SafetensorError("something else"), "something else.*Check the folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*Free some space"),
    ],
)
def test_a_full_disk_leaves_the_earlier_adapter(
    broken: Path, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in broken.iterdir()}

    def save(tensors: dict[str, Tensor], path: Path, **more: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", save)
    model = trained("lora:r=2,lora_alpha=3")
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_NAME} could not be written .*{message}"):
        model.save_pretrained(broken)
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before
    assert model.peft_config["default"].inference_mode is False
    PeftModel.from_pretrained(llama(), broken)


def test_a_configuration_that_cannot_be_written_leaves_the_earlier_adapter(broken: Path) -> None:
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    model = trained("lora:r=2")
    model.peft_config["default"].target_modules = lambda path, module: True  # type: ignore[attr-defined]
    for folder in (broken, broken / "new"):
        with pytest.raises(ConfigError, match=r"target_modules=.* is a function and cannot be written to a file"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    model = trained()
    with pytest.raises(TypeError, match="no argument 'save_directry'"):
        model.save_pretrained(tmp_path, save_directry=3)
    with pytest.raises(ConfigError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(RuntimeError, match=r"no adapter 'defualt'.*Did you mean 'default'"):
        model.save_pretrained(tmp_path, selected_adapters=["defualt"])
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert listing(tmp_path) == []


PROCESS = """
    import json, os, resource, signal, sys
    from pathlib import Path

    import torch
    from torch import nn

    import veneer

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])


    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))


    def adapter(value, r):  # alpha and the tensors tell the adapters apart
        model = veneer.get_peft_model(base(), veneer.LoraConfig(r=r, lora_alpha=value, target_modules=["0", "1"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(value)
        return model


    def loaded():
        model = veneer.PeftModel.from_pretrained(base(), folder)
        values = {p.flatten()[0].item() for n, p in model.named_parameters() if ".adapters." in n}
        return sorted({float(model.peft_config["default"].lora_alpha), *values})


    def in_a_child(action):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                action()
                code = 0
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1]


    old, new, larger = adapter(1.0, 2), adapter(2.0, 2), adapter(3.0, 16)

    # Saving is ended by a kill at its first, second, third ... step, until it comes to its own end.

    STEPS = {"open", "os.rename", "os.remove", "os.chmod", "os.listdir"}


    def save_until(last):
        count = 0

        def end(event, arguments):
            nonlocal count
            count += event in STEPS
            if count == last and event in STEPS:
                os.kill(os.getpid(), signal.SIGKILL)

        def action():
            sync = os.fsync
            os.fsync = lambda handle: (end("open", ()), sync(handle))
            sys.addaudithook(end)
            new.save_pretrained(folder)

        return action


    killed = []
    for last in range(1, 200):
        old.save_pretrained(folder)
        status = in_a_child(save_until(last))
        if os.WIFEXITED(status):
            break
        killed.append(loaded())
        new.save_pretrained(folder)  # what a killed process leaves behind does not keep the next one from saving
        assert loaded() == [2.0], loaded()
    finished = {"status": os.WEXITSTATUS(status), "found": loaded()}

    # A file may not outgrow a limit of the system.


    def save_larger():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            larger.save_pretrained(folder)
        except veneer.errors.CheckpointError as error:
            (folder / "message").write_text(str(error))


    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status = in_a_child(save_larger)
    message = (folder / "message").read_text()
    (folder / "message").unlink()
    unchanged = {path.name: path.read_bytes() for path in folder.iterdir()} == before
    limited = {"status": status, "message": message, "unchanged": unchanged, "found": loaded()}

    print(json.dumps({"killed": killed, "finished": finished, "limited": limited}))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process of its own found when it saved adapters and was hindered."""
    if not hasattr(os, "fork"):
        pytest.skip("needs processes that fork")
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROCESS), str(tmp_path_factory.mktemp("hindered"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_adapter(outcome: Any) -> None:
    old, new = [1.0], [2.0]
    killed = outcome["killed"]
    assert all(found in (old, new) for found in killed)
    assert killed == sorted(killed)  # once the new one is there it stays
    assert killed.count(old) > 10
    assert killed.count(new) > 5  # some were killed between the two renames
    assert outcome["finished"] == {"status": 0, "found": new}


def test_a_file_that_outgrows_its_limit_leaves_the_earlier_adapter(outcome: Any) -> None:
    limited = outcome["limited"]
    assert "could not be written" in limited.pop("message")
    assert limited == {"status": 0, "unchanged": True, "found": [2.0]}
