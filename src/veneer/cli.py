"""The `veneer` command: parse, call, print. What each command does is done elsewhere in the package.

Exit codes: 0 done; 1 it cannot be done (the message says why and what to do); 2 the command line is wrong;
130 interrupted.
"""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jsonargparse import Namespace

from veneer.allocation import keep_freed_memory
from veneer.commands.arguments import many_options, parse, run_options, search_options, select_options
from veneer.commands.usage import UsageError
from veneer.errors import VeneerError, VeneerWarning
from veneer.options import RunOptions

# Defaults for the libraries below: an answer on the terminal is what the user asked for, not their remarks about it.
# They are read when those libraries are imported, and a value that the user has set stays as it is.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# Loggers that talk while transformers imports torchao and bitsandbytes, which it does wherever they are installed.
_TALKING_ON_IMPORT = ("torchao", "torch.utils._pytree", "bitsandbytes")

# Texts of a file that are answered together: enough to sort them by length, few enough to see answers soon.
_GROUP = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = _take_debug(given)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in () if debug else _TALKING_ON_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        _show_warnings(debug)
        try:
            command, chosen = parse(given)
            code = _COMMANDS[command](chosen) or 0
            sys.stdout.flush()
        except SystemExit as error:  # help, version or configuration have been printed
            return error.code if isinstance(error.code, int) else 0
        except VeneerError as error:
            if debug:
                raise
            print(f"veneer: error: {error}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        except KeyboardInterrupt:
            print(_interrupted(given), file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader, `head` for example, has had enough. What is left in the buffer must not raise at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    return code


def _train(chosen: Namespace) -> None:
    options = run_options(chosen)
    _choose_allocation(options)
    from veneer.evaluation.report import summary_table
    from veneer.training.run import train

    result = train(options, console=_console(sys.stderr))
    _console().print(summary_table([result]))
    print(f"Use it: veneer predict {shlex.quote(result.folder)} TEXT")


def _compare(chosen: Namespace) -> int:
    options, methods = many_options(chosen)
    _choose_allocation(options)
    from veneer.evaluation.report import summary_table
    from veneer.training.many import train_many

    done = train_many(options, methods, console=_console(sys.stderr))
    if done.results:
        _console().print(summary_table(list(done.results.values())))
        print(f"Use one: veneer predict {shlex.quote(next(iter(done.results.values())).folder)} TEXT")
    for name, reason in done.failures.items():
        print(f"veneer: error: {name}: {reason}", file=sys.stderr)
    return 1 if done.failures else 0


def _select(chosen: Namespace) -> None:
    options, how = select_options(chosen)
    _choose_allocation(options)
    from veneer.selection.select import select, table

    found = select(options, how, console=_console(sys.stderr))
    _console().print(table(found))
    for each in found.rounds:
        name, value = each.score
        kept = "" if each.kept is None else f", {each.kept:.0%} chosen before too"
        print(f"round {each.number}: held-out {name} {value:.4f}{kept}")
    print(f"Train it: veneer train --config {shlex.quote(found.config)} --output FOLDER")


def _search(chosen: Namespace) -> None:
    options, what = search_options(chosen)
    _choose_allocation(options)
    from veneer.selection.search import search
    from veneer.selection.trials import table

    found = search(options, what, console=_console(sys.stderr))
    _console().print(table(found))
    print(f"Report: {found.report}")
    print(f"Train the best: veneer train --config {shlex.quote(found.config)} --output FOLDER")


def _choose_allocation(options: RunOptions) -> None:
    """Keeps freed memory, unless a setting says that memory matters more than time: kept memory has gaps."""
    training = options.training
    checkpoints = training.get("gradient_checkpointing") or training.get("activation_checkpointing")
    if options.model.quantize is None and not checkpoints:
        keep_freed_memory()


def _estimate(chosen: Namespace) -> None:
    if (chosen.length is None) == (chosen.data.train == ""):
        raise UsageError("Give either --data or --length, the tokens of every example. Try: veneer estimate --help")
    options = run_options(chosen)
    from veneer.evaluation.estimates import estimate

    found = estimate(options, chosen.length)
    if chosen.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _console().print(found)


def _evaluate(chosen: Namespace) -> None:
    from veneer.training.run import evaluate

    metrics = evaluate(chosen.folder, chosen.data)
    if chosen.json:
        print(json.dumps(metrics))
        return
    figures = {name.replace("_", " "): value for name, value in metrics.items()}
    width = max(map(len, figures))
    for name, value in figures.items():
        print(f"{name:{width}}  {value:.0f}" if name == "examples" else f"{name:{width}}  {value:.4f}")


def _predict(chosen: Namespace) -> None:
    from veneer.training.run import predictor

    if chosen.texts and chosen.file:
        raise UsageError("Texts and --file were both given. Leave one out.")
    if chosen.combine != "probabilities" and not chosen.ensemble:
        raise UsageError("--combine goes with --ensemble, which was not given.")
    answer = predictor(
        chosen.folder,
        max_new_tokens=chosen.max_new_tokens,
        temperature=chosen.temperature,
        others=chosen.ensemble,
        combine=chosen.combine,
    )
    alone = len(chosen.texts) == 1
    for texts in _texts(chosen):
        for text, found in zip(texts, answer(texts), strict=True):
            line = json.dumps({"text": text, **found}, ensure_ascii=False) if chosen.json else _line(text, found, alone)
            print(line, flush=True)


def _texts(chosen: Namespace) -> Iterator[list[str]]:
    """The texts, in groups that are answered together."""
    if chosen.texts:
        yield chosen.texts
    elif chosen.file:
        from veneer.training.run import read_texts

        texts = read_texts(chosen.folder, chosen.file)
        yield from (texts[start : start + _GROUP] for start in range(0, len(texts), _GROUP))
    else:
        if sys.stdin.isatty():
            print("One text a line; Ctrl-D ends.", file=sys.stderr)
        # One by one: whoever writes into the pipe may be waiting for the answer.
        for line in sys.stdin:
            if line.strip():
                yield [line.strip()]


def _line(text: str, answer: dict[str, Any], alone: bool) -> str:
    """An answer as people read it: label, probability and text in columns, or the prompt and what was written."""
    if "generated" in answer:
        return answer["generated"] if alone else f"> {text}\n{answer['generated']}\n"
    width = max(map(len, answer["probabilities"]))
    return f"{answer['label']:{width}}  {answer['probabilities'][answer['label']]:.3f}  {' '.join(text.split())}"


def _merge(chosen: Namespace) -> None:
    from veneer.commands.merging import merge_folder

    merged = merge_folder(chosen.folder, chosen.output, base=chosen.base)
    print(f"Merged model: {merged.folder}")
    difference = f"{merged.difference:.1e} of the largest output, up to {merged.allowed:.0e} is rounding"
    print(f"Difference from the adapted model: {difference}")


def _convert(chosen: Namespace) -> None:
    from veneer.commands.conversion import convert_folder, rewrite_folder

    if chosen.rank is None:
        if chosen.max_rank is not None or chosen.base is not None:
            raise UsageError("--max-rank and --base go with --rank, which was not given.")
        method = rewrite_folder(chosen.folder, chosen.output, allow_pickle=chosen.allow_pickle)
        print(f"{method} adapter in today's layout: {chosen.output}")
        return
    if chosen.allow_pickle:
        raise UsageError("--allow-pickle goes without --rank. Convert the layout first, then to LoRA.")
    done = convert_folder(chosen.folder, chosen.output, chosen.rank, max_rank=chosen.max_rank, base=chosen.base)
    low, high = done.ranks
    print(f"LoRA adapter: {done.folder}")
    print(f"Rank: {low}" + ("" if low == high else f" to {high}"))
    print(f"Lost: {done.error:.1%} of the change of the weights; most at {done.worst[0]}, {done.worst[1]:.1%}")


def _inspect(chosen: Namespace) -> None:
    from veneer.commands import inspection

    found = inspection.inspect(chosen.what, method=chosen.method, target=chosen.target, task=chosen.task)
    if chosen.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _console().print(found)


def _demo(chosen: Namespace) -> None:
    from veneer.evaluation.demo import run_demo

    keep_freed_memory()
    run_demo(chosen.output, quick=chosen.quick)


def _samples(chosen: Namespace) -> None:
    from veneer import samples

    if not chosen.names:
        samples.main([])
    for name in chosen.names:
        print(samples.fetch(name))


_COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "train": _train,
    "compare": _compare,
    "estimate": _estimate,
    "select": _select,
    "search": _search,
    "evaluate": _evaluate,
    "predict": _predict,
    "merge": _merge,
    "convert": _convert,
    "inspect": _inspect,
    "demo": _demo,
    "samples": _samples,
}


def _take_debug(arguments: list[str]) -> bool:
    """Remove `--debug`, which every command takes in any place, except after `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:end]:
        return False
    arguments.remove("--debug")
    return True


def _show_warnings(debug: bool) -> None:
    """Show Veneer's own warnings as one line; those of other packages only to who asked for details."""
    original = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, VeneerWarning):
            print(f"veneer: warning: {message}", file=sys.stderr)
        elif debug or sys.warnoptions:
            original(message, category, *rest, **more)

    warnings.showwarning = show


def _interrupted(arguments: Sequence[str]) -> str:
    if arguments[:1] == ["search"]:
        return "veneer: interrupted. The same command goes on with the study."
    if arguments[:1] not in (["train"], ["compare"]):
        return "veneer: interrupted; nothing was left half-written."
    again = shlex.join(["veneer", *arguments, "--output.resume", "true"])
    return f"veneer: interrupted. Go on from the last complete checkpoint with: {again}"


def _console(file: Any = None) -> Any:
    from rich.console import Console

    return Console(file=file or sys.stdout, highlight=False)
