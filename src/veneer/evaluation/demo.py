"""What `veneer demo` runs: real models adapted to real tasks with the very commands that a user would type.

Each run is a process of its own, so that its peak memory is its own too. The saved adapters are then loaded here and
used, which shows that all there is to an adapter lies in its folder.
"""

import csv
import dataclasses
import json
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from veneer import files, samples, units
from veneer.errors import VeneerError
from veneer.evaluation.report import summary_table, write_report
from veneer.options import RunResult

SEED = 42
# Tweets to airlines, whose labels people agree on, and as many good ones as bad.
AIRLINES = re.compile(r"@(VirginAmerica|united|SouthwestAir|AmericanAir|USAirways|JetBlue|Delta)\b", re.IGNORECASE)
FEELINGS = ("negative", "positive")
QUESTION = "Is the feeling of this tweet negative or positive? Answer with one word."


@dataclass(frozen=True)
class DemoRun:
    """One training run of the demo.

    Args:
        name: Of its folder.
        arguments: What `veneer train` is told, without data and output.
        texts: New texts that the trained model is asked about.
    """

    name: str
    arguments: tuple[str, ...]
    texts: tuple[str, ...]


REVIEWS = (
    "A quiet, honest film that stayed with me for days.",
    "Two hours that I will never get back.",
    "The jokes are stale, but the cast almost saves it.",
)
TWEETS = (
    "My bag is lost again and nobody answers the phone.",
    "Smooth boarding and such a friendly crew, thank you!",
    "Three hours on the runway, and not even water.",
)
_CLASSIFY = ("--task", "classification", "--model", "minilm", "--method")
CLASSIFIERS = (
    DemoRun("lora", (*_CLASSIFY, "lora:r=8,target_modules=[query,value]"), REVIEWS),
    DemoRun("bitfit", (*_CLASSIFY, "bitfit", "--training.learning_rate", "3e-3"), REVIEWS),
    DemoRun("houlsby", (*_CLASSIFY, "houlsby"), REVIEWS),
)
CHAT = DemoRun(
    "tweets",
    ("--task", "causal-lm", "--model", "smollm2", "--method", "lora:r=8", "--training.learning_rate", "1e-3"),
    TWEETS,
)


@dataclass(frozen=True)
class Sizes:
    """How much of the data is used."""

    reviews: int = 2000
    held_out_reviews: int = 1000
    review_epochs: int = 2
    tweets: int = 160
    held_out_tweets: int = 100


QUICK = Sizes(reviews=64, held_out_reviews=32, review_epochs=1, tweets=8, held_out_tweets=8)


def run_demo(folder: str, quick: bool = False, console: Console | None = None) -> list[RunResult]:
    """Train, measure, save, reload and use several adapters, and write `report.html` into the folder.

    Args:
        folder: Receives a folder for each run; those of an earlier demo are replaced.
        quick: Use few examples: shows the way, not the accuracy.
        console: Where to report; standard output if none.

    Raises:
        VeneerError: A sample cannot be fetched, or a run failed.
    """
    console = console or Console(highlight=False)
    sizes = QUICK if quick else Sizes()
    place = Path(folder)
    for sample in ("minilm", "smollm2", "movie-sentiment", "tweets-sentiment"):
        samples.fetch(sample)
    results = [_classify(run, place, sizes, console) for run in CLASSIFIERS]
    results.append(_chat(place, sizes, console))
    report = write_report(results, place / "report.html", "Veneer demo")
    console.rule("Results")
    console.print(summary_table(results))
    console.print(f"Report: {escape(str(report))}", soft_wrap=True)
    return results


def _classify(run: DemoRun, place: Path, sizes: Sizes, console: Console) -> RunResult:
    data = (
        "--data", "movie-sentiment",
        "--data.limit", str(sizes.reviews),
        "--data.validation_limit", str(sizes.held_out_reviews),
        "--data.max_length", "64",
        "--training.num_train_epochs", str(sizes.review_epochs),
        "--training.per_device_train_batch_size", "8",
    )  # fmt: skip
    result = _train(run, data, place, console)
    from veneer.training.run import predictor

    answers = predictor(result.folder)(list(run.texts))
    for text, answer in zip(run.texts, answers, strict=True):
        label = answer["label"]
        console.print(f"  [bold]{escape(label)}[/bold] {answer['probabilities'][label]:.2f}  {escape(text)}")
    return result


def _chat(place: Path, sizes: Sizes, console: Console) -> RunResult:
    train, held_out = _write_tweets(place / "data", sizes)
    data = ("--data", str(train), "--data.validation", str(held_out), "--training.num_train_epochs", "1")
    result = _train(CHAT, data, place, console)
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows] + [f"{QUESTION}\n\n{text}" for text in CHAT.texts]
    before, after = _answers(result.folder, prompts)
    for text, old, new in zip(CHAT.texts, before[len(rows) :], after[len(rows) :], strict=True):
        console.print(f"  {escape(text)}\n    before: {escape(old)}\n    after:  [bold]{escape(new)}[/bold]")
    expected = [row["completion"] for row in rows]
    return dataclasses.replace(
        result,
        before={"accuracy": accuracy(before[: len(rows)], expected), **result.before},
        after={"accuracy": accuracy(after[: len(rows)], expected), **result.after},
        majority=max(Counter(expected).values()) / len(expected),
    )


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of the answers in which the first feeling that is mentioned is the expected one.

    A model that was never told to be brief is so not blamed for a whole sentence.

    >>> accuracy(["Positive.", "I think it is negative", "A lost bag"], ["positive", "negative", "negative"])
    0.6666666666666666
    """
    found = [re.search("|".join(FEELINGS), answer.lower()) for answer in answers]
    right = (match is not None and match[0] == wanted for match, wanted in zip(found, expected, strict=True))
    return sum(right) / len(expected)


def _train(run: DemoRun, data: Sequence[str], place: Path, console: Console) -> RunResult:
    """Run `veneer train` in a process of its own, showing how to do the same."""
    arguments = ["train", *run.arguments, *data, "--output", str(place / run.name), "--training.seed", str(SEED)]
    console.rule(run.name)
    console.print(f"$ {escape(shlex.join(['veneer', *arguments]))}", soft_wrap=True, style="dim")
    command = [sys.executable, "-m", "veneer", *arguments, "--output.overwrite", "true"]
    # Its progress is on the error stream; its own table would come once more at the end.
    finished = subprocess.run(command, stdout=subprocess.DEVNULL)
    if finished.returncode < 0:
        raise VeneerError(
            f"The run {run.name!r} was killed by signal {-finished.returncode}. Signal 9 mostly means that memory "
            "ran out: close other programs, or try: veneer demo --quick"
        )
    if finished.returncode:
        raise VeneerError(f"The run {run.name!r} failed; the reason stands above. Nothing of it was published.")
    from veneer.training.folder import read_result

    result = read_result(place / run.name)
    console.print(
        f"Adapter: {units.size(result.adapter_bytes)}, loaded again from {escape(result.folder)} and asked:",
        soft_wrap=True,
    )
    return result


def _answers(folder: str, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the model answers without and with its adapter."""
    from veneer.data import encode_prompts
    from veneer.training.trained import generate, load_trained

    model, tokenizer, *_ = load_trained(folder)
    ids = encode_prompts(prompts, tokenizer)
    with model.disable_adapter():
        before = generate(model, tokenizer, ids, max_new_tokens=12)
    return before, generate(model, tokenizer, ids, max_new_tokens=12)


def _write_tweets(folder: Path, sizes: Sizes) -> tuple[Path, Path]:
    """Tweets as questions with one-word answers, for training and held out."""
    with open(samples.data_file("tweets-sentiment"), encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if AIRLINES.search(row["text"]) and row["label"] in FEELINGS]
    random.Random(SEED).shuffle(rows)
    each = [[row for row in rows if row["label"] == feeling] for feeling in FEELINGS]
    mixed = [row for pair in zip(*each, strict=False) for row in pair]
    held_out, train = mixed[: sizes.held_out_tweets], mixed[sizes.held_out_tweets :][: sizes.tweets]
    paths = (folder / "tweets-train.jsonl", folder / "tweets-held-out.jsonl")
    for path, part in zip(paths, (train, held_out), strict=True):
        lines = [
            json.dumps({"prompt": f"{QUESTION}\n\n{row['text']}", "completion": row["label"]}, ensure_ascii=False)
            for row in part
        ]
        files.write_text(path, "\n".join(lines) + "\n")
    return paths
