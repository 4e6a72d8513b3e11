"""Freed memory stays with the process: seen by the page faults of asking for it again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from veneer import keep_freed_memory

# Takes and frees 64 MB some times, writing to each page, and counts the faults of all but the first.
PROBE = """
import resource, sys
import veneer
kept = veneer.keep_freed_memory() if sys.argv[1] == "keep" else False
assert "torch" not in sys.modules
size = 64 * 2**20
bytearray(b"x") * size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(b"x") * size
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="another C library keeps its own rules"
)


def probe(how: str, **variables: str) -> tuple[str, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROBE, how]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)


@on_glibc
def test_freed_memory_is_not_asked_for_again() -> None:
    pages = 4 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert probe("leave")[1] > pages // 600  # pages may be huge ones
    kept, faults = probe("keep")
    assert kept == "True"
    assert faults < 32


@on_glibc
@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}]
)
def test_what_the_user_has_set_stays(variables: dict[str, str]) -> None:
    assert probe("keep", **variables)[0] == "False"


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
