"""The benchmarks' harness, records and page. How fast anything is, is never asserted: that is for `make bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # benchmarks are run from the checkout and are not installed
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import harness, pages, records  # noqa: E402
from benchmarks.harness import Job, Row, Spread, Times  # noqa: E402

ROWS = [
    Row("loading", "peft", Spread.of([2.0, 3.0, 4.0]), target=10, seconds={"Veneer": 0.012345}),
    Row("starting", "torch", Spread.of([0.1]), "s more", 0.2, True, memory={"Veneer": 2e6}, score={"Veneer": "0.8"}),
]


def test_jobs_run_in_turns_and_only_after_a_warm_up_are_timed() -> None:
    order: list[str] = []
    jobs = {
        "a": Job(lambda: order.append("a") or "result", lambda result: order.append(f"after {result}")),
        "b": lambda: order.append("b"),
    }
    times = harness.in_turns(jobs, pairs=2, warm_up=1)
    assert order == ["a", "after result", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_ratios_are_those_of_pairs() -> None:
    times = Times(ours=[1.0, 2.0, 4.0], theirs=[10.0, 10.0, 80.0])
    assert times.ratio("theirs", "ours") == Spread(10.0, 5.0, 20.0, 3)
    assert times.difference("theirs", "ours") == Spread(9.0, 8.0, 76.0, 3)
    assert times.seconds(Veneer="ours") == {"Veneer": 2.0}


def test_a_row_says_whether_its_target_is_reached() -> None:
    slow, quick = ROWS
    assert (slow.reached, quick.reached) == (False, True)
    assert Row("anything", "peft", Spread.of([1.0])).reached is None


def test_a_process_of_its_own_gives_result_and_peak_memory() -> None:
    done = harness.apart("records", "commit")
    assert isinstance(done.value, str)
    assert 1e6 < done.memory < 1e9
    assert harness.peak_memory() > 1e6
    with pytest.raises(RuntimeError, match=r"records\.nothing"):
        harness.apart("records", "nothing")


def test_the_variables_of_such_a_process_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    changed = {"MALLOC_TRIM_THRESHOLD_": None, "MALLOC_MMAP_THRESHOLD_": "5"}
    assert harness.apart("records", "allocator", variables=changed).value == {"MALLOC_MMAP_THRESHOLD_": "5"}


def test_the_last_record_is_read_back(tmp_path: Path) -> None:
    assert records.latest("trial", tmp_path) is None
    for rows in (ROWS[:1], ROWS):
        records.append(records.record("trial", rows, 0.5), tmp_path)
    entry = records.latest("trial", tmp_path)
    assert entry is not None
    assert [row.what for row in entry.rows] == ["loading", "starting"]
    assert entry.rows[1] == ROWS[1]
    assert entry.rows[0].seconds == {"Veneer": 0.01235}
    assert entry.machine["load"] == 0.5
    assert str(ROOT) not in (tmp_path / "trial.jsonl").read_text(encoding="utf-8")


def test_a_table_is_drawn_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- trial -->\nold\n<!-- end of trial -->\nafter\n", encoding="utf-8")
    entry = records.record("trial", ROWS, None)
    assert pages.redraw({"trial": entry, "other": entry}, page) == ["other"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- trial -->\n| what |")
    assert text.endswith("<!-- end of trial -->\nafter\n")
    assert "| loading | peft | **3.00** times as fast | 2.00 to 4.00 | 3 | 10: not reached |" in text
    assert "| **0.100** s more |" in text
    assert "| at most 0.2: reached | Veneer 2 MB | Veneer 0.8 |" in text


def test_a_plot_is_the_same_for_the_same_figures(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        series = {"Veneer": [(12.0, 1.0), (24.0, 2.0)], "peft": [(12.0, 3.0), (24.0, 9.0)]}
        pages.lines_plot(tmp_path / name, series, "layers", "ms", "Loading")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_every_benchmark_asks_a_question_and_the_page_answers_it() -> None:
    page = pages.PAGE.read_text(encoding="utf-8")
    modules = command.found()
    assert list(modules)[:2] == ["imports", "loading"]
    for name, module in modules.items():
        assert module.QUESTION.endswith("?")
        assert callable(module.run)
        assert f"<!-- {name} -->" in page
        entry = records.latest(name)
        if entry is not None:
            assert pages.table(entry) in page


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["lodaing"])
    assert "no benchmark 'lodaing'; there are imports" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # of the peer
def test_a_benchmark_runs_and_a_trial_records_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "QUIET", {})  # the environment of the other tests stays as it is
    before = sorted(records.RESULTS.iterdir())
    sizes = [path.stat().st_size for path in before]
    assert command.main(["--quick", "switching"]) == 0
    assert "2 layers, 14 places, against peft:" in capsys.readouterr().out
    assert sorted(records.RESULTS.iterdir()) == before
    assert [path.stat().st_size for path in before] == sizes


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # of the peer
def test_the_benchmark_of_the_frozen_part_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks import frozen_part, ladder

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 30}
    monkeypatch.setattr(ladder, "base_model", lambda width: LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=49152)))
    monkeypatch.setattr(frozen_part, "apart", lambda module, function, **named: harness.Apart(named["arm"], 1))
    monkeypatch.setattr(frozen_part, "_score", lambda alone: alone.value)
    rows = list(frozen_part.run(quick=True))
    assert [row.score for row in rows[:1]] == [{"Veneer": "memory", "peft": "peft"}]
    assert rows[1].figure.median > 1  # fewer multiplications


def test_the_benchmark_of_packed_rows_runs() -> None:
    import tiny
    from benchmarks import packing

    def collate(numbers: list[int]) -> dict[str, torch.Tensor]:
        mask = (torch.arange(9) < torch.tensor([2 + i for i in numbers])[:, None]).long()
        tokens = tiny.tokens(len(numbers), 9) * mask
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}

    rows = list(packing.measure("tiny", tiny.llama(), collate, [2 + i for i in range(8)], 4, 2, 1))
    assert [row.what for row in rows[:2]] == ["tiny: 2 x 4 rows, random", "tiny: 2 x 4 rows, random: positions"]
    assert rows[1].figure.median == 72 / sum(range(2, 10))


def test_the_layers_of_the_int8_benchmark_run_and_its_curves_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import int8, int8_scores

    times = harness.in_turns(int8.layer(3, 8, 16), pairs=1)
    assert list(times) == ["float32", "int8", "float32 alone", "integers alone"]
    rows = [
        Row(f"{data}, {arm}, after {step} steps", "3 seeds", Spread.of([0.6, 0.7]), "accuracy")
        for data in int8_scores.TASKS
        for arm in int8.ARMS
        for step in (5, 10)
    ]
    monkeypatch.setattr(pages, "FIGURES", tmp_path)
    int8_scores.draw(records.record("int8_scores", rows, None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8-movie-sentiment.svg", "int8-sms-spam.svg"]


@pytest.mark.parametrize(("form", "bits"), [("float32", 32), ("int8", 8), ("nf4", 4)])
def test_a_model_of_the_memory_benchmark_is_held_in_its_form(form: str, bits: int) -> None:
    from benchmarks import memory

    sizes = memory.QUICK["a narrow Llama"]
    held = memory.held(memory.build(sizes, form))
    embedding = sizes["vocab_size"] * sizes["hidden_size"]
    weights = memory.held(memory.build(sizes, "float32")) / 4 - embedding
    assert held == pytest.approx(4 * embedding + bits / 8 * weights, rel=0.1)


def test_an_ensemble_of_the_benchmark_says_what_its_members_say() -> None:
    from benchmarks import ensemble

    for method in ensemble.METHODS.values():
        model, names = ensemble.members(method, ensemble.QUICK)
        assert list(ensemble.answering(model, names, 2)) == ["one batch", "5 runs", "one member"]


def test_the_table_of_prompts_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import prompts

    figures = {"accuracy": 0.9, "before": 0.5, "majority": 0.6, "trained": 1234}
    monkeypatch.setattr(prompts, "KEPT", tmp_path / "prompts")
    monkeypatch.setattr(
        prompts, "apart", lambda module, function, **named: harness.Apart(dict.fromkeys(prompts.METHODS, figures), 1)
    )
    page = tmp_path / "prompts.md"
    page.write_text("above\n<!-- prompts -->\n<!-- end of prompts -->\nbelow\n", encoding="utf-8")
    for _ in range(2):
        prompts.draw(records.record("prompts", list(prompts.run(quick=False)), None), page)
    lines = page.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert lines[2].count("|") == 2 + 4
    assert lines[5] == "| prompt tuning" + " | 0.900 (1,234)" * 4 + " |"


def test_the_arms_of_many_configurations_are_added_up() -> None:
    from benchmarks import many

    assert len({str(one) for one in many.CONFIGURATIONS}) == 8
    parts = [(2.0, harness.Apart([0.5], 100)), (3.0, harness.Apart([0.75], 200))]
    whole = many._added(parts)
    assert (whole.seconds, whole.memory, whole.score) == (5.0, 300, "0.625 (mean of 2)")


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # of the peer
@pytest.mark.parametrize("arm", ["together", "alone", "loop"])
def test_an_arm_of_many_configurations_runs(arm: str) -> None:
    from benchmarks import many

    (accuracy,) = getattr(many, arm)(configurations=many.CONFIGURATIONS[:1], limit=16, held=16)
    assert 0 <= accuracy <= 1


@pytest.mark.filterwarnings("ignore")  # of the peer
def test_the_arms_of_the_sparse_benchmark_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import methods, sparse

    monkeypatch.setattr(sparse, "apart", lambda module, function, **named: harness.Apart(len(named["arm"]), 1))
    monkeypatch.setattr(methods, "step", lambda library, name: lambda: None)
    monkeypatch.setattr(sparse, "build", lambda layers, build=sparse.build: build(1))
    rows = list(sparse.run(quick=True))
    assert [row.unit for row in rows] == ["of the memory", "of the memory", *["times the time"] * 4]
    assert sparse.weights(1) == 4 * sum(
        module.weight.numel()
        for path, module in sparse.build(1).named_modules()
        if path.rpartition(".")[2] in sparse.SAME
    )


def test_every_output_and_sparse_method_is_in_the_tradeoff(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tradeoff

    names = tradeoff.compared()
    assert names[:3] == ["lora", "full", "head"]
    assert {"houlsby", "fish_mask", "gps", "shira", "lt_sft", "spiel", "diff_pruning"} <= set(names)
    assert not set(names) & set(tradeoff.LEFT_OUT)

    def counted(model: str, method: str) -> int:
        name, _, setting = method.partition(":")
        size = int(setting.rpartition("=")[2] or 8)
        return tradeoff.UNKNOWN if name == "shadow" else 770 + 9216 * size

    monkeypatch.setattr(tradeoff, "_counted", counted)
    monkeypatch.setattr(tradeoff, "_linear", lambda task: [(1000, 100), (1000, 900)])
    names = ["lora", "houlsby", "fish_mask", "gps", "sparse", "shadow", "mam"]
    found = tradeoff.settings(tradeoff.TASK, names)
    assert found["houlsby"] == {"name": "houlsby", "bottleneck_size": 8}
    assert found["fish_mask"] == {"name": "fish_mask", "count": 73728}
    assert found["gps"] == {"name": "gps", "count": 8}
    assert found["sparse"]["density"] == 0.073728
    assert found["shadow"] == {"name": "shadow"}
    assert found["mam"] == {"name": "mam", "num_virtual_tokens": 4, "bottleneck_size": 8}


@pytest.mark.filterwarnings("ignore")
def test_the_tradeoff_tells_of_methods_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tradeoff

    def apart(module: str, function: str, **named: object) -> harness.Apart:
        reached = {"accuracy": 0.5, "trained": 5}
        return harness.Apart({"lora": reached, "fish_mask": {"failed": "ConfigError: no place"}}, 1)

    monkeypatch.setattr(tradeoff, "apart", apart)
    monkeypatch.setattr(tradeoff, "settings", lambda task, names: {name: {"name": name} for name in names})
    rows = list(tradeoff.run(quick=True))
    assert [row.unit for row in rows] == ["accuracy", "failed"]
    assert rows[1].score == {"failed": "ConfigError: no place"}


def test_a_step_beside_the_benchmark_model_is_taken_by_every_method() -> None:
    from benchmarks import memory, side

    sizes = memory.QUICK["a narrow Llama"]
    weights = memory.held(memory.build(sizes, "float32"))
    assert [side._steps(sizes, method, 2, 16) for method in side.METHODS.values()] == [weights] * 3
