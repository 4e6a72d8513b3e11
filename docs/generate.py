"""Writes what the documentation says of methods, from the registry and from trying every method on every place.

python docs/generate.py           writes README.md's tables and docs/methods/
python docs/generate.py --check   fails where they are not up to date
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import tiny  # noqa: E402
import veneer  # noqa: E402
from contract.places import QUANTISED, SPOTS, Spot, config, randomise, said_of, settings_of  # noqa: E402
from veneer.adapter import Adapter, WeightAdapter  # noqa: E402
from veneer.config import PeftConfig  # noqa: E402
from veneer.errors import VeneerError  # noqa: E402
from veneer.method_strings import parse_method  # noqa: E402
from veneer.registry import methods  # noqa: E402

BASE = "quantised base"  # linear layers in every store's form
KINDS = ("linear", "conv", "embedding", "norm", "parameter", BASE)


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method: its name, what carries it out, its configuration and what of that the name sets."""

    name: str
    adapter: type[Adapter]
    config: type[PeftConfig]
    preset: dict[str, Any]

    @property
    def page(self) -> str:
        """Name of its file, and of its page; a method of another name is a preset of that file's."""
        return self.adapter.__module__.rpartition(".")[2]

    @property
    def lines(self) -> int:
        return len(Path(inspect.getfile(self.adapter)).read_text(encoding="utf-8").splitlines())


def published() -> list[Method]:
    return [Method(name, parse_method({"name": name}).method(), cls, preset) for name, cls, preset in methods()]


def summary(adapter: type[Adapter]) -> str:
    """First sentence of the method's docstring."""
    return (inspect.getdoc(adapter) or "").partition("\n")[0].rstrip(".").replace("|", "\\|")


def source(method: Method) -> str:
    """The paper, as an arXiv link where it is there: the one that bears the method's name, or else the first."""
    text = " ".join((inspect.getdoc(method.adapter) or "").partition("Source: ")[2].split())
    papers = [
        match
        for part in text.split("; ")
        if (match := re.match(r"(?:[A-Za-z ]+: )?(.+? \d{4})(?:, arXiv:([\d.]+\d))?", part))
    ]
    name = method.name.replace("_", " ")
    named = [paper for paper in papers if name in paper[0].lower()]
    if not papers:
        return ""
    paper = (named or papers)[0]
    return f"[{paper[1]}](https://arxiv.org/abs/{paper[2]})" if paper[2] else paper[1]


def method_table() -> str:
    rows = ["| method | what it does | source |", "|---|---|---|"]
    for method in published():
        note = ""
        if method.preset and method.name != method.page:
            note = f" (`{method.page}` with {', '.join(f'{k}={v}' for k, v in method.preset.items())})"
        page = f"[`{method.name}`](docs/methods/{method.page}.md)"
        rows.append(f"| {page} | {summary(method.adapter)}{note} | {source(method)} |")
    return "\n".join(rows)


def lines_table() -> str:
    """Lines of every method's file, with its configuration and its documentation."""
    own = [method for method in published() if method.name == method.page]
    rows = ["| method | lines |", "|---|---|", *(f"| `{method.name}` | {method.lines} |" for method in own)]
    return "\n".join([*rows, f"| median | {statistics.median(method.lines for method in own):.0f} |"])


def tried(name: str, spot: Spot) -> set[str]:
    """What the method can do on a place: run, merge, mixed."""
    settings = (settings_of(name) or [said_of(name, "SHOWN", {})])[0]
    try:
        model = veneer.get_peft_model(spot.model(), config(name, settings, spot))
    except VeneerError:
        return set()
    model.add_adapter("other", config(name, settings, spot))
    return abilities(model, spot.input())


def tried_on_a_model(name: str) -> set[str]:
    """The same on a small language model, for methods that need more than a layer."""
    try:
        method = parse_method({"name": name, **said_of(name, "SHOWN", {})})
        model = veneer.get_peft_model(tiny.llama(), method)
        model.add_adapter("other", method)
    except VeneerError:
        return set()
    return abilities(model, tiny.tokens(4))


def abilities(model: Any, x: Any) -> set[str]:
    """What a model can do with its adapters, `default` and `other`."""
    randomise(model)
    can = {"run"}
    for what, attempt in (
        ("mixed", lambda: model(x, adapter_names=["default", "other", "__base__", "default"])),
        ("merge", model.merge_adapter),
    ):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Merging has quantised")
                attempt()
        except VeneerError:
            continue
        can.add(what)
    return can


def cell(name: str, kind: str) -> str:
    spots = QUANTISED if kind == BASE else [spot for spot in SPOTS if spot.kind == kind]
    return in_words({spot.name: tried(name, spot) for spot in spots})


def in_words(results: dict[str, set[str]]) -> str:
    """What can be done on some places, by name."""
    running = {spot: can for spot, can in results.items() if can}
    if not running:
        return "no"
    words = []
    for what in ("merge", "mixed"):
        without = [spot for spot, can in running.items() if what not in can]
        if not without:
            words.append(what)
        elif len(without) < len(running):
            words.append(f"{what} (not {', '.join(without)})")
    return ", ".join(["runs", *words])


def support_table() -> str:
    kinds = [*KINDS, "whole model"]
    rows = [f"| method | {' | '.join(kinds)} | file type |", f"|---|{'---|' * len(kinds)}---|"]
    for method in published():
        if method.name == method.page:
            cells = [cell(method.name, kind) for kind in KINDS]
            whole = in_words({"model": tried_on_a_model(method.name)}) if set(cells) == {"no"} else ""
            rows.append(f"| `{method.name}` | {' | '.join(cells)} | {whole} | `{method.config.peft_name}` |")
    return "\n".join(rows)


def page(method: Method, names: list[str]) -> str:
    """The page of one method."""
    adapter, cls = method.adapter, method.config
    kind = "Changes the weight" if issubclass(adapter, WeightAdapter) else "Changes the output"
    settings = ["| setting | type | default |", "|---|---|---|"]
    base = {entry.name for entry in dataclasses.fields(PeftConfig)}
    for entry in dataclasses.fields(cls):
        if entry.name in base or entry.metadata.keys() & {"planned", "internal"}:
            continue
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        kind_of = str(entry.type).replace("|", "\\|")
        settings.append(f"| `{entry.name}` | `{kind_of}` | `{default!r}` |")
    return "\n".join(
        [
            f"# {adapter.__name__}",
            "",
            f"Method strings: {', '.join(f'`{name}`' for name in names)}. {kind}; attaches to "
            f"{', '.join(sorted(adapter.kinds)) or 'any module'}.",
            "",
            "```text",
            inspect.getdoc(adapter) or "",
            "```",
            "",
            f"## `{cls.__name__}`",
            "",
            inspect.getdoc(cls) or "",
            "",
            *settings,
            "",
        ]
    )


def replace(text: str, name: str, content: str) -> str:
    """Puts `content` between the markers of that name."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if start not in text or end not in text:
        raise SystemExit(f"There are no markers {start} ... {end}")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = replace(readme, "methods", method_table())
    files = {ROOT / "README.md": replace(readme, "support", support_table())}
    guide = ROOT / "docs" / "how-to-add-a-method.md"
    files[guide] = replace(guide.read_text(encoding="utf-8"), "lines", lines_table())
    by_page: dict[str, list[Method]] = {}
    for method in published():
        by_page.setdefault(method.page, []).append(method)
    for name, those in by_page.items():
        files[ROOT / "docs" / "methods" / f"{name}.md"] = page(those[0], [method.name for method in those])
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not up to date; run `make docs`.")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
