"""Writes what the documentation says of methods, from the registry and from trying every method on every place.

python docs/generate.py           writes README.md's tables and docs/methods/
python docs/generate.py --check   fails where they are not up to date
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import veneer  # noqa: E402
from contract.places import SPOTS, Spot, config, randomise  # noqa: E402
from veneer.adapter import WeightAdapter  # noqa: E402
from veneer.config import PeftConfig, methods  # noqa: E402
from veneer.errors import VeneerError  # noqa: E402

KINDS = ("linear", "conv", "embedding", "norm", "parameter")


def published() -> list[tuple[str, type[PeftConfig], dict[str, Any]]]:
    return list(methods())


def summary(cls: type[PeftConfig]) -> str:
    """First sentence of the method's docstring."""
    return (inspect.getdoc(cls.adapter) or "").partition("\n")[0].rstrip(".")


def source(cls: type[PeftConfig]) -> str:
    """The paper, as an arXiv link."""
    found = re.search(r"Source: (.*?), arXiv:(\d+\.\d+)", inspect.getdoc(cls.adapter) or "", re.DOTALL)
    return f"[{' '.join(found[1].split())}](https://arxiv.org/abs/{found[2]})" if found else ""


def method_table() -> str:
    rows = ["| method | what it does | source |", "|---|---|---|"]
    for name, cls, preset in published():
        note = f" (`bottleneck` with {', '.join(f'{k}={v}' for k, v in preset.items())})" if preset else ""
        page = cls.__module__.rpartition(".")[2]
        rows.append(f"| [`{name}`](docs/methods/{page}.md) | {summary(cls)}{note} | {source(cls)} |")
    return "\n".join(rows)


def tried(name: str, spot: Spot) -> set[str]:
    """What the method can do on a place: run, merge, mixed."""
    try:
        model = veneer.get_peft_model(spot.model(), config(name, {}, spot))
    except VeneerError:
        return set()
    randomise(model)
    x, can = spot.input(), {"run"}
    model.add_adapter("other", config(name, {}, spot))
    for what, attempt in (
        ("mixed", lambda: model(x, adapter_names=["default", "other", "__base__", "default"])),
        ("merge", model.merge_adapter),
    ):
        try:
            attempt()
        except VeneerError:
            continue
        can.add(what)
    return can


def cell(name: str, kind: str) -> str:
    results = {spot.name: tried(name, spot) for spot in SPOTS if spot.kind == kind}
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
    rows = [f"| method | {' | '.join(KINDS)} | file type |", f"|---|{'---|' * len(KINDS)}---|"]
    for name, cls, _ in published():
        if name == cls.__module__.rpartition(".")[2]:
            rows.append(f"| `{name}` | {' | '.join(cell(name, kind) for kind in KINDS)} | `{cls.peft_name}` |")
    return "\n".join(rows)


def page(cls: type[PeftConfig], names: list[str]) -> str:
    """The page of one method."""
    kind = "Changes the weight" if issubclass(cls.adapter, WeightAdapter) else "Changes the output"
    settings = ["| setting | type | default |", "|---|---|---|"]
    base = {entry.name for entry in dataclasses.fields(PeftConfig)}
    for entry in dataclasses.fields(cls):
        if entry.name in base or "planned" in entry.metadata:
            continue
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        kind_of = str(entry.type).replace("|", "\\|")
        settings.append(f"| `{entry.name}` | `{kind_of}` | `{default!r}` |")
    return "\n".join(
        [
            f"# {cls.adapter.__name__}",
            "",
            f"Method strings: {', '.join(f'`{name}`' for name in names)}. {kind}; attaches to "
            f"{', '.join(sorted(cls.adapter.kinds)) or 'any module'}.",
            "",
            "```text",
            inspect.getdoc(cls.adapter) or "",
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
        raise SystemExit(f"README.md has no markers {start} ... {end}")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = replace(readme, "methods", method_table())
    files = {ROOT / "README.md": replace(readme, "support", support_table())}
    by_class: dict[type[PeftConfig], list[str]] = {}
    for name, cls, _ in published():
        by_class.setdefault(cls, []).append(name)
    for cls, names in by_class.items():
        files[ROOT / "docs" / "methods" / f"{cls.__module__.rpartition('.')[2]}.md"] = page(cls, names)
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
