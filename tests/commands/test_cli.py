"""The command line as a user meets it: every command, what it prints, and what it says when something is wrong."""

import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from veneer.cli import main
from veneer.commands.arguments import parse, run_options
from veneer.errors import VeneerError
from veneer.evaluation import demo

GOOD, BAD = ["bright", "warm", "funny"], ["dull", "cold", "slow"]
OTHER = ["the", "film", "was", "and", "story", "plot"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = ["[PAD]", "[UNK]", "[EOS]", *GOOD, *BAD, *OTHER]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a tiny decoder, and data for both."""
    folder = tmp_path_factory.mktemp("cli")
    words = tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "encoder")
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=2, bos_token_id=None)).save_pretrained(folder / "decoder")
    for name in ("encoder", "decoder"):
        words.save_pretrained(folder / name)
    draw = random.Random(0)
    rows = []
    for i in range(64):
        rest = draw.choices(OTHER, k=draw.randint(2, 6))
        rows.append(f"{draw.choice(GOOD if i % 2 else BAD)} {' '.join(rest)},{'good' if i % 2 else 'bad'}")
    (folder / "reviews.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    pairs = [{"prompt": f"the {word} film was", "completion": word} for word in GOOD + BAD] * 4
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return folder


def classify(place: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--task", "classification", "--model", str(place / "encoder"), "--data", str(place / "reviews.csv"),
        "--data.validation_share", "0.25", "--output", str(output), "--method", "lora:r=4",
        "--training.num_train_epochs", "12", "--training.learning_rate", "1e-2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(place: Path) -> str:
    assert main(classify(place, place / "classifier")) == 0
    return str(place / "classifier")


@pytest.fixture(scope="module")
def writer(place: Path) -> str:
    code = main([
        "train", "--task", "causal-lm", "--model", str(place / "decoder"), "--data", str(place / "chat.jsonl"),
        "--output", str(place / "writer"), "--method", "lora:target_modules=all-linear",
        "--training.num_train_epochs", "20", "--training.learning_rate", "2e-2",
    ])  # fmt: skip
    assert code == 0
    return str(place / "writer")


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "veneer", *arguments], capture_output=True, text=True, **more)


# What is asked for before anything is loaded


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; from veneer.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['train', '--help'], ['predict', '--help'], ['train']):\n"
        "    main(arguments)\n"
        "print(sorted({'torch', 'transformers', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "veneer 0." in done.stdout


@pytest.mark.parametrize(
    "command", ["train", "compare", "estimate", "evaluate", "predict", "merge", "inspect", "demo", "samples"]
)
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: veneer {command}")
    assert f"\n  veneer {command}" in shown


def test_python_dash_m_is_the_same_command() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("veneer 0.")


# One configuration, many ways to write it


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "lora:r=2,target_modules=all-linear"],
        ["--method", "{name: lora, r: 2, target_modules: all-linear}"],
        ["--method.name", "lora", "--method.r", "2", "--method.target_modules", "all-linear"],
        ["--config", "mapping.yaml"],
        ["--config", "text.yaml"],
        ["--config", "other.yaml", "--method.r", "2"],
    ],
)
def test_every_way_of_naming_a_method(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.method_strings import parse_method

    monkeypatch.chdir(tmp_path)
    Path("mapping.yaml").write_text("method:\n  name: lora\n  r: 2\n  target_modules: all-linear\n")
    Path("text.yaml").write_text("method: lora:r=2,target_modules=all-linear\n")
    Path("other.yaml").write_text("method:\n  name: lora\n  r: 64\n  target_modules: all-linear\n")
    _, chosen = parse(["train", *flags, "--task", "classification", "--model", "m", "--data", "d", "--output", "o"])
    config = parse_method(run_options(chosen).method)
    assert (config.peft_type, config.r, config.target_modules) == ("LORA", 2, "all-linear")  # type: ignore[attr-defined]


def test_training_takes_any_field_with_its_type() -> None:
    _, chosen = parse([
        "train", "--task", "causal-lm", "--model", "m", "--data", "d", "--output", "o",
        "--training.learning_rate", "3e-4", "--training.bf16", "false", "--training.max_steps", "7",
        "--training.lr_scheduler_kwargs", '{"num_cycles": 2}', "--training.optim", "adafactor",
        "--training.lora_optimizer", "loraplus", "--training.loraplus_lr_ratio", "8",
    ])  # fmt: skip
    assert run_options(chosen).training == {
        "learning_rate": 3e-4, "bf16": False, "max_steps": 7, "lr_scheduler_kwargs": {"num_cycles": 2},
        "optim": "adafactor", "lora_optimizer": "loraplus", "loraplus_lr_ratio": 8.0,
    }  # fmt: skip


def test_print_config_prints_what_config_takes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = classify(place, tmp_path / "out")
    assert main([*arguments, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["training"] == {"num_train_epochs": 12, "learning_rate": 0.01}
    (tmp_path / "run.yaml").write_text(printed)
    again = parse(["train", "--config", str(tmp_path / "run.yaml")])[1]
    assert run_options(again) == run_options(parse(arguments)[1])
    assert not (tmp_path / "out").exists()


NEEDED = ["--task", "classification", "--model", "m", "--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No command was given. The commands are train, compare, estimate"),
        (["trian"], "There is no command 'trian'. Did you mean 'train'?"),
        (["--hlep"], "Unknown argument --hlep. Did you mean '--help'"),
        (["train"], "Not given, but needed: --task, --model.name, --data.train, --output.folder."),
        (["train", *NEEDED, "--data.max_lenght", "5"], "Did you mean '--data.max_length'"),
        (["train", *NEEDED, "--modle.name", "x"], "Unknown argument --modle.name. Did you mean '--model.name'"),
        (["train", *NEEDED, "--data.lim", "5"], "Unknown argument --data.lim."),
        (["train", *NEEDED, "--task", "classify"], "--task: expected one of 'classification', 'causal-lm'; got"),
        (["train", *NEEDED, "--data.limit", "many"], "--data.limit: expected int or null; got many"),
        (["train", *NEEDED, "--training.lerning_rate", "1"], "Did you mean 'learning_rate'"),
        (["train", *NEEDED, "--training.max_steps", "x"], "--training.max_steps: expected int; got x."),
        (["train", *NEEDED, "--method", "lroa"], "Unknown method 'lroa'. Did you mean "),
        (["train", *NEEDED, "--method", "lora:rank=4"], "The method 'lora' has no setting 'rank'."),
        (["train", *NEEDED, "--method.name", "lora", "--method.r", "four"], "r='four'; int was expected"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "--config", "top.yaml"], "top.yaml: unknown setting 'modell.name'. Did you mean 'model.name'"),
        (["train", "--config", "nested.yaml"], "nested.yaml: unknown setting 'data.trian'. Did you mean 'data.train'"),
        (["train", "--config", "broken.yaml"], "broken.yaml, line 2"),
        (["evaluate"], "Not given, but needed: FOLDER."),
        (["evaluate", "x", "--jsn"], "Unknown argument --jsn. Did you mean '--json'"),
        (["predict", "x", "text", "--max-new-tokens", "few"], "expected int; got few"),
        (["merge", "x"], "Not given, but needed: --output."),
        (["inspect"], "Not given, but needed: WHAT."),
        (["inspect", "x", "--task", "chat"], "--task"),
        (["demo", "--fast"], "Unknown argument --fast."),
    ],
)
def test_a_wrong_command_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("top.yaml").write_text("modell: {name: x}\n")
    Path("nested.yaml").write_text("data: {trian: x}\n")
    Path("broken.yaml").write_text("data:\n  train: [x\n")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("veneer: error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert "--help" in said.err


# Training


def test_training_ends_in_an_adapter_and_a_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(classify(place, tmp_path / "run")) == 0
    said = capsys.readouterr()
    assert "held-out accuracy" in said.out
    assert f"veneer predict {tmp_path / 'run'} TEXT" in said.out
    assert "held out, before training" in said.err
    assert {"adapter_config.json", "adapter_model.safetensors", "run.yaml", "results.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert json.loads((tmp_path / "run" / "results.json").read_text())["after"]["accuracy"] > 0.9


def test_an_error_is_one_message_without_traceback(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(classify(place, tmp_path / "run", "--data.label_column", "labell")) == 1
    said = capsys.readouterr()
    assert said.err.startswith("veneer: error: ")
    assert "'label'" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_debug_shows_where_an_error_comes_from(place: Path, tmp_path: Path) -> None:
    with pytest.raises(VeneerError):
        main(["--debug", *classify(place, tmp_path / "run", "--data.label_column", "labell")])


def test_a_target_that_matches_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(classify(place, tmp_path / "run", "--method", "lora:target_modules=[qeury]")) == 1
    assert "Did you mean 'query'" in capsys.readouterr().err


def test_a_taken_folder_is_not_overwritten(place: Path, classifier: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (Path(classifier) / "adapter_model.safetensors").read_bytes()
    assert main(classify(place, Path(classifier))) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert (Path(classifier) / "adapter_model.safetensors").read_bytes() == before


def test_an_interrupted_run_says_how_to_go_on_and_does(place: Path, tmp_path: Path) -> None:
    arguments = classify(place, tmp_path / "a run", "--training.save_steps", "5")
    arguments[arguments.index("--training.num_train_epochs") + 1] = "400"
    process = subprocess.Popen(
        [sys.executable, "-m", "veneer", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a run").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "--output.resume true" in said.splitlines()[-1]
    assert f"'{tmp_path / 'a run'}'" in said.splitlines()[-1]
    again = run(*arguments, "--output.resume", "true", "--training.num_train_epochs", "1")
    assert again.returncode == 0, again.stderr
    assert "Going on from step" in again.stderr


# Evaluating and predicting


def test_evaluate(classifier: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", classifier]) == 0
    figures = dict(re.findall(r"^(\S.*?)  +([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    assert float(figures["accuracy"]) > 0.9
    assert figures["examples"] == "16"
    assert main(["evaluate", classifier, "--data", str(place / "reviews.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 64


@pytest.mark.parametrize(
    ("rows", "message"), [("text,label\nwarm film,wonderful\n", "wonderful"), ("text,label\n", "reviews.csv")]
)
def test_evaluate_on_data_that_does_not_fit(
    classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, message: str
) -> None:
    (tmp_path / "reviews.csv").write_text(rows)
    assert main(["evaluate", classifier, "--data", str(tmp_path / "reviews.csv")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate"], ["predict"]])
def test_a_folder_without_a_run(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path), *(["text"] if command == ["predict"] else [])]) == 1
    assert "is not the output folder of a run" in capsys.readouterr().err


def test_predict_answers_texts_in_order(classifier: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["predict", classifier, "warm story", "dull plot and the film"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["good", "bad"]
    assert re.fullmatch(r"good  [01]\.\d{3}  warm story", lines[0])
    assert re.fullmatch(r"bad   [01]\.\d{3}  dull plot and the film", lines[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "warm story\ndull plot\n"),
        ("texts.csv", "id,text\n1,warm story\n2,dull plot\n"),
        ("texts.jsonl", '{"text": "warm story"}\n{"text": "dull plot"}\n'),
    ],
)
def test_predict_reads_files(
    classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    capsys.readouterr()
    (tmp_path / name).write_text(content)
    assert main(["predict", classifier, "--file", str(tmp_path / name), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(answer["text"], answer["label"]) for answer in answers] == [("warm story", "good"), ("dull plot", "bad")]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1)


def test_predict_in_a_pipe_answers_line_by_line(classifier: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "veneer", "predict", classifier, "--json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for text, label in (("warm film", "good"), ("cold film", "bad")):
            process.stdin.write(f"{text}\n\n")  # an empty line is no text
            process.stdin.flush()
            # The answer comes while the pipe is still open.
            answer = json.loads(process.stdout.readline())
            assert (answer["text"], answer["label"]) == (text, label)
        assert process.communicate(timeout=300) == ("", "")
    assert process.returncode == 0


def test_a_reader_that_has_had_enough_is_no_error(classifier: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("warm story\n" * 2_000)
    command = shlex.join([sys.executable, "-m", "veneer", "predict", classifier, "--file", str(tmp_path / "texts.txt")])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("good")


def test_predict_writes_text(writer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["predict", writer, "the warm film was", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == "warm\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("the slow film was\n"))
    assert main(["predict", writer, "--json", "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "the slow film was", "generated": "slow"}
    assert main(["predict", writer, "the cold film was", "the warm film was"]) == 0
    assert capsys.readouterr().out == "> the cold film was\ncold\n\n> the warm film was\nwarm\n\n"


def test_temperature_lets_answers_vary(writer: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    torch.manual_seed(0)
    assert main(["predict", writer, *["film"] * 12, "--temperature", "5", "--json", "--max-new-tokens", "6"]) == 0
    assert len({json.loads(line)["generated"] for line in capsys.readouterr().out.splitlines()}) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a text", "--file", "f.txt"], 2, "Texts and --file were both given."),
        (["--file", "absent.csv"], 1, "There is no file or folder absent.csv"),
        ([" "], 1, "empty"),
        (["x", "--max-new-tokens", "0"], 1, "max_new_tokens is 0"),
        (["x", "--temperature", "-1"], 1, "temperature -1.0"),
    ],
)
def test_predict_cannot(
    classifier: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    capsys.readouterr()
    assert main(["predict", classifier, *arguments]) == code
    said = capsys.readouterr()
    assert (said.out, message in said.err) == ("", True), said.err


def test_a_corrupted_adapter_is_refused(classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(classifier).iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 255
    weights.write_bytes(data)
    assert main(["predict", str(copy), "text"]) == 1
    assert "corrupted" in capsys.readouterr().err


# Merging


def test_predict_asks_an_ensemble(classifier: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", classifier, "dull film"]) == 0
    alone = capsys.readouterr().out
    assert main(["predict", classifier, "dull film", "--ensemble", classifier, classifier]) == 0
    assert capsys.readouterr().out == alone
    assert main(["predict", classifier, "dull film", "--ensemble", classifier, "--combine", "votes", "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["probabilities"].values()) == [0, 1]
    assert main(["predict", classifier, "dull film", "--combine", "votes"]) == 2
    assert "--combine goes with --ensemble" in capsys.readouterr().err


def test_merge_writes_a_plain_model(classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["merge", classifier, "--output", str(tmp_path / "merged")]) == 0
    assert f"Merged model: {tmp_path / 'merged'}" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        best = int(model(**words("warm story", return_tensors="pt", return_token_type_ids=False)).logits.argmax())
    assert model.config.id2label[best] == "good"
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes == {0o666 & ~umask()}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_merge_of_a_writer_generates_the_same(writer: str, tmp_path: Path) -> None:
    assert main(["merge", writer, "--output", str(tmp_path / "merged")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = words("the warm film was", return_tensors="pt").input_ids
    assert words.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == "warm"


def test_merge_never_overwrites(classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["merge", classifier, "--output", str(tmp_path)]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_merge_onto_another_base_is_refused(
    classifier: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(place / "encoder")).save_pretrained(tmp_path / "other")
    assert main(["merge", classifier, "--output", str(tmp_path / "merged"), "--base", str(tmp_path / "other")]) == 1
    assert "was trained on another base model" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_merge_of_a_base_that_has_moved(place: Path, classifier: str, tmp_path: Path) -> None:
    """The adapter alone, without the run's files, as another library would have written it."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((Path(classifier) / name).read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    assert main(["merge", str(adapter), "--output", str(tmp_path / "none")]) == 1
    arguments = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--base", str(place / "encoder")]
    assert main(arguments) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").num_labels == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer())


def test_a_method_that_cannot_be_merged_says_why(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = classify(place, tmp_path / "run", "--method", "houlsby:reduction=4", "--training.max_steps", "2")
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("veneer: error: ")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".*partial"))


# Estimating


def test_estimate_takes_the_arguments_of_train(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = classify(place, place / "never")
    assert main(["estimate", *arguments[1:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak"] == sum(found["parts"].values())
    assert found["seconds"] > 0
    assert (found["batch"]["rows"], found["batch"]["steps"]) == (16, 36)  # 48 examples, 12 epochs
    assert not (place / "never").exists()


def test_estimate_needs_no_data_but_a_length(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["estimate", "--task", "causal-lm", "--model", str(place / "decoder")]
    assert main([*asked, "--length", "16"]) == 0
    shown = capsys.readouterr().out
    assert "Batches of 8 x 16 tokens at most" in shown
    assert re.search(r"^peak +\d", shown, re.MULTILINE)
    assert main(asked) == 2
    assert "Give either --data or --length" in capsys.readouterr().err


# Inspecting, samples, demo


def test_convert_writes_a_lora_adapter(classifier: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "lora")
    assert main(["convert", classifier, "--output", output, "--rank", "16"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"LoRA adapter: \S+lora\nRank: \d+.*\nLost: 0.0% of the change of the weights; most at ", said)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert main(["convert", classifier, "--output", output, "--rank", "0.9"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["convert", classifier, "--output", str(tmp_path / "other"), "--rank", "0.9", "--max-rank", "1"]) == 0
    assert "Rank: 1\n" in capsys.readouterr().out
    assert main(["convert", classifier, "--output", str(tmp_path / "third"), "--rank", "x"]) == 2
    assert not (tmp_path / "third").exists()


def test_inspect_an_adapter_and_a_model(classifier: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", classifier, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "LORA"
    assert found["run"]["data"]["train"] == str(place / "reviews.csv")
    assert main(["inspect", str(place / "encoder"), "--target", "query", "--method", "lora:r=4"]) == 0
    said = capsys.readouterr().out
    assert "* matched: 2 modules" in said
    assert "trains 512 parameters" in said


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_inspect_nothing(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent"), *more]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "neither an adapter's folder nor a model" in said.err


def test_samples_lists_and_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples"]) == 0
    assert "movie-sentiment" in capsys.readouterr().out
    assert main(["samples", "minlm"]) == 1
    assert "Did you mean 'minilm'" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "message"), [(1, "the reason stands above"), (-9, "killed by signal 9")])
def test_a_demo_run_that_fails_stops_the_demo(
    code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.samples.fetch", lambda name: tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
    assert main(["demo", "--output", str(tmp_path / "demo"), "--quick"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert "$ veneer train --task classification --model minilm" in said.out


@pytest.mark.real
@pytest.mark.timeout(1800)  # four runs of real models
def test_the_demo_ends_in_a_table_and_a_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output", str(tmp_path / "demo"), "--quick"]) == 0
    said = capfd.readouterr().out
    for words in ("lora", "bitfit", "houlsby", "before:", "after:", "report.html"):
        assert words in said
    assert (tmp_path / "demo" / "report.html").stat().st_size > 20_000
