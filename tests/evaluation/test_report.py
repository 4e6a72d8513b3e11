"""The report as a reader meets it: the right numbers, nothing fetched from elsewhere, nothing executed."""

import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from veneer.errors import CheckpointError
from veneer.evaluation.report import group_runs, summary_table, write_report
from veneer.options import RunResult

EVIL = "<script>alert('x')</script> & \"more\""


def classified(method: str, folder: Path, accuracy: float = 0.791, parameters: int = 74_498) -> RunResult:
    return RunResult(
        method=method,
        config={"peft_type": method.upper(), "r": 8, "note": EVIL},
        before={"loss": 0.701, "accuracy": 0.497},
        after={"loss": 0.452, "accuracy": accuracy, "f1": 0.788},
        majority=0.532,
        labels=["negative", EVIL],
        trained_parameters=parameters,
        total_parameters=22_788_484,
        adapter_bytes=301_234,
        seconds=61.4,
        peak_memory_bytes=1_214_000_000,
        history=[
            {"step": 10, "epoch": 0.5, "loss": 0.68},
            {"step": 20, "epoch": 1.0, "loss": 0.55},
            {"step": 20, "epoch": 1.0, "eval_loss": 0.50, "eval_accuracy": 0.76},
            {"step": 40, "epoch": 2.0, "eval_loss": 0.452, "eval_accuracy": accuracy},
            {"step": 40, "epoch": 2.0, "train_runtime": 61.4},
        ],
        examples=[],
        folder=str(folder),
    )


def generated(folder: Path) -> RunResult:
    return RunResult(
        method="lora",
        config={"peft_type": "LORA"},
        before={"loss": 3.456},
        after={"loss": 1.234},
        majority=None,
        labels=[],
        trained_parameters=460_800,
        total_parameters=134_975_808,
        adapter_bytes=1_860_000,
        seconds=125.0,
        peak_memory_bytes=1_900_000_000,
        history=[{"step": 1, "epoch": 1.0, "loss": 2.0}, {"step": 1, "epoch": 1.0, "eval_loss": 1.234}],
        examples=[{"prompt": EVIL, "expected": "fine", "before": "I <b>do</b> not know", "after": "fine"}],
        folder=str(folder),
    )


class Page(HTMLParser):
    """Collects what matters of a page: tags with attributes, text, and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def page(tmp_path: Path) -> Page:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "run.yaml").write_text(
        f"task: classification\nmodel: {{name: {tmp_path}/mini}}\ndata: {{train: movie-sentiment}}\n"
    )
    (tmp_path / "bitfit").symlink_to(folder)
    results = [
        classified("lora", folder),
        classified("bitfit", tmp_path / "bitfit", 0.774, 52_994),
        generated(tmp_path / "chat"),
    ]
    path = write_report(results, tmp_path / "out" / "report.html", f"Demo {EVIL}", command=f"veneer demo {EVIL}")
    return Page(path.read_text(encoding="utf-8"))


def test_the_numbers_stand_in_the_table(page: Page) -> None:
    rows = {row[0]: row for row in page.rows if row}
    assert rows["bitfit"] == ["bitfit", "0.497", "0.774", "52,994", "0.233%", "301 kB", "1 min 01 s", "1.21 GB"]
    lora = [row for row in page.rows if row and row[0] == "lora"]
    assert [row[1:4] for row in lora] == [["0.497", "0.791", "74,498"], ["3.456", "1.234", "460,800"]]
    assert "gives 0.532" in page.text
    assert "f1" in page.text
    assert "0.788" in page.text


def test_each_task_has_a_section_and_its_figures(page: Page) -> None:
    headings = [word.strip() for word in page.words if "with" in word or "Language" in word]
    assert "Text classification: movie-sentiment with mini" in headings
    assert "Language modelling" in headings
    # Curves and the parameter figure for two compared methods, curves alone for the single one.
    assert [tag for tag, _ in page.tags].count("svg") == 3
    assert "Held-out accuracy after training" in page.text
    assert page.text.count("Loss (solid: training, smoothed; dashed: held out)") == 2


def test_nothing_is_fetched_from_elsewhere(page: Page, tmp_path: Path) -> None:
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "poster", "action"):
                assert value is not None
                assert value.startswith("#"), (name, value)
            assert not name.startswith("on")
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert all(part.startswith("#") for part in source.split("url(")[1:])


def test_what_models_and_data_say_is_text_not_markup(page: Page) -> None:
    assert "I <b>do</b> not know" in page.text
    assert page.text.count("alert('x')") >= 4  # prompt, label, title, command; and the configuration
    assert not any(tag == "b" for tag, _ in page.tags)


def test_local_paths_are_cut_to_their_last_part(page: Page, tmp_path: Path) -> None:
    heading = next(word for word in page.words if "Text classification" in word)
    assert str(tmp_path) not in heading


def test_versions_and_command_are_named(page: Page) -> None:
    assert "veneer demo <script>" in page.text
    for name in ("veneer", "torch", "transformers", "Python"):
        assert name in page.text


def test_a_method_that_ran_twice_is_told_apart_by_its_folder(tmp_path: Path) -> None:
    [group] = group_runs([classified("lora", tmp_path / "r4"), classified("lora", tmp_path / "r16")])
    assert [run.label for run in group.runs] == ["lora (r4)", "lora (r16)"]


def test_a_run_without_history_or_measurements_can_be_reported(tmp_path: Path) -> None:
    result = classified("lora", tmp_path)
    result.history, result.before, result.after, result.majority = [], {}, {}, None
    page = Page(write_report([result], tmp_path / "r.html", "Bare").read_text(encoding="utf-8"))
    assert ["lora", "-", "-"] in [row[:3] for row in page.rows]
    assert "svg" not in [tag for tag, _ in page.tags]


def test_the_same_results_give_the_same_figures(tmp_path: Path) -> None:
    pages = [write_report([generated(tmp_path)], tmp_path / f"{i}.html", "T").read_text("utf-8") for i in (0, 1)]
    assert pages[0].split("<figure")[1] == pages[1].split("<figure")[1]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="Free some space"):
        write_report([generated(tmp_path)], path, "T")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_table_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    results = [classified("houlsby", tmp_path / "a", parameters=1_304_066), generated(tmp_path / "[bold]")]
    file = io.StringIO()
    Console(file=file, width=80).print(summary_table(results))
    shown = file.getvalue()
    assert all(len(line) <= 80 for line in shown.splitlines())
    for figure in ("houlsby", "0.497", "0.791", "1,304,066", "5.72%", "301 kB", "1.234", "majority class 0.532"):
        assert figure in shown
    assert "…" not in shown
