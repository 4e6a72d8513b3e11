"""The arguments of every command: what they are called, what they may be, and what is said when they are wrong.

Nothing here imports torch, so that `veneer --help` answers at once. Only a training run, which needs them anyway, looks
up the fields of `transformers.TrainingArguments` and the registered methods.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from veneer import __version__
from veneer.commands.usage import UsageError, plain, usage_error
from veneer.errors import ConfigError
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions, SearchOptions, SelectOptions, Task


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


# `--model minilm` is what one types; jsonargparse would read it as "load the model section from this file".
_SHORT_FORMS = {"--model": "--model.name", "--data": "--data.train", "--output": "--output.folder"}


def parse(arguments: Sequence[str]) -> tuple[str, Namespace]:
    """The command and its arguments.

    Raises:
        UsageError: An argument is unknown, missing or of the wrong type.
        SystemExit: Help, the version or the configuration was asked for and has been printed.
    """
    arguments = list(arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    parser, subparsers = build()
    if command in ("train", "compare", "estimate", "select", "search"):
        arguments = _expand_short_forms(arguments)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise usage_error(str(error), command, arguments, subparsers) from error
    chosen = parsed.pop(parsed.command) if parsed.command in parsed else Namespace()
    return parsed.command, chosen


def build() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser and those of the commands by name."""
    parser = ArgumentParser(
        prog="veneer",
        description="Adapt a large frozen model by training few parameters.",
        epilog="Every command takes --debug: show where an error comes from.\nStart with: veneer demo",
        version=__version__,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    commands = parser.add_subcommands(dest="command", title="commands", description="veneer COMMAND --help explains.")
    subparsers = {}
    for name, (fill, summary) in _COMMANDS.items():
        usage, description = _text(fill)
        subparser = ArgumentParser(
            description=description,
            usage=usage,
            exit_on_error=False,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        fill(subparser)
        commands.add_subcommand(name, subparser, help=summary)
        subparsers[name] = subparser
    return parser, subparsers


def run_options(arguments: Namespace, command: str = "train") -> RunOptions:
    """The options of `veneer train`, every value of the type that its field declares.

    Raises:
        UsageError: A method or a training setting is unknown or of the wrong type.
    """
    from veneer.method_strings import parse_method
    from veneer.training.arguments import check

    options = _options(arguments)
    options.method = arguments.method
    try:
        parse_method(options.method)
        options.training = check(arguments.training, options.output)
    except ConfigError as error:
        raise UsageError(f"{plain(str(error))} Try: veneer {command} --help") from error
    return options


def many_options(arguments: Namespace) -> tuple[RunOptions, list[str | dict[str, Any]]]:
    """The options of `veneer compare`, and its methods.

    Raises:
        UsageError: A method or a training setting is unknown, of the wrong type, or given twice.
    """
    from veneer.training.many import configurations

    options = _options(arguments)
    options.training = arguments.training
    methods = [method if isinstance(method, str) else dict(method) for method in arguments.methods]
    try:
        configurations(options, methods)
    except ConfigError as error:
        raise UsageError(f"{plain(str(error))} Try: veneer compare --help") from error
    return options, methods


def select_options(arguments: Namespace) -> tuple[RunOptions, SelectOptions]:
    """The options of `veneer select`: those of the run, and how to choose.

    Raises:
        UsageError: As for `run_options`.
    """
    how = {entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(SelectOptions)}
    return run_options(arguments, "select"), SelectOptions(**how)


def search_options(arguments: Namespace) -> tuple[RunOptions, SearchOptions]:
    """The options of `veneer search`: those of the runs, and what to look through.

    Raises:
        UsageError: A method or a training setting is unknown or of the wrong type.
    """
    from veneer.method_strings import parse_method
    from veneer.training.arguments import check

    what = SearchOptions(**{entry.name: getattr(arguments, entry.name) for entry in dataclasses.fields(SearchOptions)})
    what.methods = [method if isinstance(method, str) else dict(method) for method in what.methods]
    options = _options(arguments)
    try:
        for method in what.methods:
            parse_method(method)
        options.training = check(arguments.training, options.output)
    except ConfigError as error:
        raise UsageError(f"{plain(str(error))} Try: veneer search --help") from error
    return options, what


def _options(arguments: Namespace) -> RunOptions:
    """All but method and training."""
    return RunOptions(
        task=arguments.task,
        model=ModelOptions(**arguments.model.as_dict()),
        data=DataOptions(**arguments.data.as_dict()),
        output=OutputOptions(**arguments.output.as_dict()),
    )


def _train(parser: ArgumentParser) -> None:
    """veneer train --task TASK --model NAME --data FILE --output FOLDER [--method METHOD] [options]

    Train one method on one model. Writes the adapter, the configuration and the results into the output folder, after
    checking that the saved adapter gives the same answers as the trained one.

    examples:
      veneer train --task classification --model minilm --data movie-sentiment --output outputs/lora
      veneer train --task classification --model minilm --data reviews.csv --output outputs/wide \\
          --method lora:r=16,target_modules=all-linear --training.learning_rate 1e-3 --training.num_train_epochs 3
      veneer train --config run.yaml --method.r 4 --print_config

    --training.FIELD takes every field of transformers.TrainingArguments by its name and type, for example
    num_train_epochs, learning_rate, per_device_train_batch_size, lr_scheduler_type, seed or report_to. With LoRA,
    --training.lora_optimizer takes loraplus, lorafa or riemannian.
    """
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the settings below.")
    _add_run(parser)


def _compare(parser: ArgumentParser) -> None:
    """veneer compare --task TASK --model NAME --data FILE --output FOLDER --methods METHOD ... [options of train]

    Train several methods, one after the other, on one base model that is loaded once. Each gets a folder of its own in
    the output folder, which is that of `veneer train` and ends in the same weights. One that fails does not stop the
    others; the exit code is 1 then.

    examples:
      veneer compare --task classification --model minilm --data movie-sentiment --output outputs/ranks \\
          --methods lora:r=4 lora:r=8 lora:r=16,training.learning_rate=5e-4 bitfit
      veneer compare --config compare.yaml --output.resume true

    Settings of one method alone: training.FIELD among its own. In YAML, methods is a list.
    """
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the settings below.")
    parser.add_argument(
        "--methods", type=str | dict[str, Any], nargs="+", required=True, metavar="METHOD",
        help="Method strings or mappings.",
    )  # fmt: skip
    _add_run(parser, skip={"method"})


def _add_run(parser: ArgumentParser, skip: set[str] | None = None) -> None:
    """The options of a run."""
    parser.add_class_arguments(RunOptions, skip=skip)
    for action in parser._actions:
        if (short := next(iter(action.option_strings), "")) in _SHORT_FORMS:
            action.metavar = _SHORT_FORMS[short].rpartition(".")[2].upper()
            action.help = f"Short for {_SHORT_FORMS[short]}."


def _estimate(parser: ArgumentParser) -> None:
    """veneer estimate --task TASK --model NAME (--data FILE | --length TOKENS) [--json] [options of train]

    Peak memory and time of a training step, part by part, before anything is trained. Takes what `veneer train` takes;
    put the one word in place of the other. No weights are loaded: the model's code runs on tensors that have shapes and
    no numbers, and its operations are timed on this machine.

    examples:
      veneer estimate --task classification --model minilm --data movie-sentiment --method bitfit
      veneer estimate --task causal-lm --model smollm2 --length 512 --training.per_device_train_batch_size 2
    """
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the settings below.")
    parser.add_argument(
        "--length", type=int | None, default=None, metavar="TOKENS", help="Length of every example, in place of data."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    _add_run(parser)
    for action in parser._actions:
        if action.dest in ("data.train", "output.folder"):
            action.required, action.default = False, ""


def _select(parser: ArgumentParser) -> None:
    """veneer select --task TASK --model NAME --data FILE --output FOLDER [--method METHOD] [options of train]

    Score the weights of a model on real batches and choose what of it a method trains: single entries for sparse,
    fish_mask, gps and snip, ranks by module for lora, the best layers or modules (--keep_layers, --keep_modules) for
    any method on modules. Writes the scores, a picture of them, and train.yaml, which `veneer train` takes.

    examples:
      veneer select --task classification --model minilm --data movie-sentiment --output outputs/fish \\
          --method fish_mask:density=0.005
      veneer train --config outputs/fish/train.yaml --output outputs/fish-trained
      veneer select --task classification --model minilm --data movie-sentiment --output outputs/ranks \\
          --method lora:r=8,target_modules=all-linear --criterion fisher --refine 3
    """
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the settings below.")
    parser.add_class_arguments(SelectOptions)
    _add_run(parser)


def _search(parser: ArgumentParser) -> None:
    """veneer search --task TASK --model NAME --data FILE --output FOLDER --methods METHOD ... [options of train]

    Look for the best method, rank, targets and learning rate by held-out score, on one base model that is loaded once.
    Trials that fall behind are stopped early. Started again, or on several machines with one --storage, it goes on with
    the same study. Writes best.yaml, which `veneer train` takes, and a report with the trade-off of score and size.

    examples:
      veneer search --task classification --model minilm --data movie-sentiment --output outputs/search \\
          --methods lora bitfit houlsby fish_mask --trials 20 --training.num_train_epochs 3
      veneer search --config search.yaml --storage postgresql://user@host/studies --study reviews
    """
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the settings below.")
    parser.add_class_arguments(SearchOptions, skip={"methods", "ranks", "densities", "reductions", "targets", "rates"})
    parser.add_argument(
        "--methods", type=str | dict[str, Any], nargs="+", required=True, metavar="METHOD",
        help="Method strings or mappings; what they set is kept.",
    )  # fmt: skip
    defaults = SearchOptions([])
    for name, kind, said in (
        ("ranks", int, "Of methods that have a rank."),
        ("densities", float, "Of methods that train a share of the entries."),
        ("reductions", int, "Of methods with a bottleneck."),
        ("targets", str, "What target_modules may be, beside the method's own default."),
    ):
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=getattr(defaults, name), help=said)
    parser.add_argument(
        "--rates", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="Learning rates; from a quarter of the method's own to four times it if not given.",
    )  # fmt: skip
    _add_run(parser, skip={"method"})


def _evaluate(parser: ArgumentParser) -> None:
    """veneer evaluate FOLDER [--data FILE] [--json]

    Measure a trained adapter on the held-out data it was trained with, or on other data.

    examples:
      veneer evaluate outputs/lora
      veneer evaluate outputs/lora --data new-reviews.csv --json
    """
    parser.add_argument("folder", type=str, help="Output folder of a training run.")
    parser.add_argument("--data", type=str | None, default=None, metavar="FILE", help="Other data, as in `train`.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def _predict(parser: ArgumentParser) -> None:
    """veneer predict FOLDER [TEXT ...] [--file FILE] [--ensemble FOLDER ...] [--json] [options]

    Use a trained adapter. Texts come from the command line, from a file, or line by line from standard input.
    A classifier answers with labels and probabilities, a language model with generated text.

    examples:
      veneer predict outputs/lora "A quiet triumph." "Two hours I will never get back."
      veneer predict outputs/lora --file reviews.csv --json > answers.jsonl
      tail -f messages.txt | veneer predict outputs/lora
      veneer predict outputs/prompt-1 --file reviews.csv --ensemble outputs/prompt-2 outputs/prompt-3
    """
    parser.add_argument("folder", type=str, help="Output folder of a training run.")
    parser.add_argument(
        "texts", type=str, nargs="*", default=[], metavar="TEXT", help="A text; write -- before one that starts with -."
    )
    parser.add_argument(
        "--file", type=str | None, default=None, metavar="FILE",
        help="txt (a text a line), csv, tsv, json, jsonl or parquet, with the text column that was trained on.",
    )  # fmt: skip
    parser.add_argument(
        "--ensemble", type=str, nargs="+", default=[], metavar="FOLDER",
        help="Runs whose adapters answer together with the first, on one base model and in one batch.",
    )  # fmt: skip
    parser.add_argument(
        "--combine", type=Literal["probabilities", "logits", "votes"], default="probabilities",
        help="What the answers of an ensemble are put together by: means of the first two, or the number of votes.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print one JSON object a line.")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Longest generated text.")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the most probable token.")


def _merge(parser: ArgumentParser) -> None:
    """veneer merge FOLDER --output FOLDER [--base NAME]

    Write a plain model with the adapter merged into its weights; it loads with transformers alone. The tokenizer is
    included. The written model's outputs are compared with the adapted model's before the folder gets its name.

    examples:
      veneer merge outputs/lora --output outputs/merged
      veneer merge outputs/lora --output outputs/merged --base ./my-copy-of-the-base
    """
    parser.add_argument("folder", type=str, help="Adapter folder.")
    parser.add_argument("--output", type=str, required=True, metavar="FOLDER", help="New or empty folder.")
    parser.add_argument("--base", type=str | None, default=None, metavar="NAME", help="Base model, if it has moved.")


def _convert(parser: ArgumentParser) -> None:
    """veneer convert FOLDER --output FOLDER [--rank RANK] [--max-rank R] [--base NAME] [--allow-pickle]

    With --rank: write an adapter of any method that changes weights as a LoRA adapter, for programs that know no other.
    A whole number is the rank of every layer; a share such as 0.95 keeps so much of the change's energy in each, in the
    lowest rank that does. What is LoRA already loses nothing as long as the rank suffices.

    Without: write an adapter of an older version of peft, of mlx-lm or of AdapterHub in today's layout.

    examples:
      veneer convert outputs/dora --output outputs/as-lora --rank 16
      veneer convert outputs/loha --output outputs/as-lora --rank 0.95 --max-rank 32
      veneer convert downloads/mlx-adapter --output outputs/adapter
    """
    parser.add_argument("folder", type=str, help="Adapter folder.")
    parser.add_argument("--output", type=str, required=True, metavar="FOLDER", help="New or empty folder.")
    parser.add_argument(
        "--rank", type=int | float | None, default=None, metavar="RANK", help="Rank, or share of the energy up to 1.0."
    )
    parser.add_argument("--max-rank", type=int | None, default=None, metavar="R", help="With a share: highest rank.")
    parser.add_argument("--allow-pickle", action="store_true", help="Without --rank: read pickles too.")
    parser.add_argument("--base", type=str | None, default=None, metavar="NAME", help="Base model, if it has moved.")


def _inspect(parser: ArgumentParser) -> None:
    """veneer inspect ADAPTER-OR-MODEL [--method METHOD] [--target EXPRESSION] [--task TASK] [--json]

    Of an adapter: its method, base, tensors, size, and what it was trained on. Of a model (built from its
    configuration alone, no weights are loaded): its layers as a tree, and what a method would attach to and train.

    examples:
      veneer inspect outputs/lora
      veneer inspect minilm
      veneer inspect minilm --task classification --method lora:r=16 --target all-linear
      veneer inspect smollm2 --target '.*layers\\.[0-4]\\..*proj'
    """
    parser.add_argument("what", type=str, metavar="ADAPTER-OR-MODEL", help="A folder, a hub id or a sample's name.")
    parser.add_argument("--method", type=str | None, default=None, help="Count what this method would train.")
    parser.add_argument(
        "--target", type=str | None, default=None, metavar="EXPRESSION",
        help="As target_modules: names with commas between, a regular expression, or all-linear.",
    )  # fmt: skip
    parser.add_argument("--task", type=Task | None, default=None, help="Build the model with the head for this task.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def _demo(parser: ArgumentParser) -> None:
    """veneer demo [--output FOLDER] [--quick]

    Fetch the sample models and data, train several methods, use them, and write a report. Takes some minutes on two
    cores, downloads aside.

    examples:
      veneer demo
      veneer demo --output /tmp/demo --quick
    """
    parser.add_argument(
        "--output", type=str, default="outputs/demo", metavar="FOLDER", help="Replaced if it is a demo."
    )
    parser.add_argument("--quick", action="store_true", help="Few examples: shows the way, not the accuracy.")


def _samples(parser: ArgumentParser) -> None:
    """veneer samples [NAME ...]

    List the sample models and data sets, or fetch some and print their folders.

    examples:
      veneer samples
      veneer samples minilm movie-sentiment
    """
    parser.add_argument("names", type=str, nargs="*", metavar="NAME", help="What to fetch; none lists all.")


_COMMANDS: dict[str, tuple[Callable[[ArgumentParser], None], str]] = {
    "train": (_train, "train an adapter"),
    "compare": (_compare, "train several methods on one base model, loaded once"),
    "estimate": (_estimate, "tell memory and time of a training run beforehand"),
    "select": (_select, "score the weights of a model and choose what is trained"),
    "search": (_search, "look for the best method, rank, targets and rate"),
    "evaluate": (_evaluate, "measure a trained adapter"),
    "predict": (_predict, "use a trained adapter on texts"),
    "merge": (_merge, "write a plain model with the adapter merged in"),
    "convert": (_convert, "write an adapter as LoRA, or one of another library in today's layout"),
    "inspect": (_inspect, "show what an adapter or a model is made of"),
    "demo": (_demo, "adapt real models to real tasks in a few minutes"),
    "samples": (_samples, "list or fetch sample models and data"),
}


def _text(fill: Callable[[ArgumentParser], None]) -> tuple[str, str]:
    """Usage line and description, which stand in the function's docstring."""
    usage, _, rest = (fill.__doc__ or "").partition("\n")
    lines = [line.removeprefix("    ") for line in rest.strip("\n").rstrip().split("\n")]
    return usage, "\n".join(lines)


def _expand_short_forms(arguments: Sequence[str]) -> list[str]:
    """
    >>> _expand_short_forms(["train", "--model", "minilm", "--data=a.csv"])
    ['train', '--model.name', 'minilm', '--data.train=a.csv']
    """
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        expanded.append(_SHORT_FORMS.get(name, name) + equals + value)
    return expanded
