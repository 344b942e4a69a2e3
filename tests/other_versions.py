"""Tests on other versions of a library: ``tests/other_versions.py LIBRARY [VERSION...] [-- pytest's arguments]``.

Without a version, on the oldest and the newest that are supported, but for the installed.

Each gets an environment of its own in ``.venv/LIBRARY/VERSION``, made once, which borrows all other packages.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTEST = ("-m", "pytest", "-q", "-n", "2", "--dist", "worksteal")


@dataclass(frozen=True)
class Library:
    """versions: the oldest and the newest that are supported. tests: what pytest is given."""

    versions: tuple[str, ...]
    tests: tuple[str, ...]


def _files(pattern: str) -> list[str]:
    return sorted(map(str, HERE.glob(pattern)))


LIBRARIES = {
    "transformers": Library(
        ("5.23.0", "5.24.0"),
        (*_files("test_patch_*.py"), *_files("test_transformers.py"), *_files("test_checkpoint_transformers.py")),
    ),
    "numba": Library(
        ("0.62.0", "0.68.1"),
        (
            *("--backend", "numba", "-k", "not test_parity or matmul or rms_norm or sparse_attention"),
            *(*_files("test_backends.py"), *_files("test_code_cache.py"), *_files("test_threads.py")),
            *_files("test_parity.py"),
        ),
    ),
}
MISSING = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for text in importlib.metadata.requires(sys.argv[1]):
    needed = Requirement(text)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        try:
            fits = needed.specifier.contains(importlib.metadata.version(needed.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits = False
        if not fits:
            print(text.partition(";")[0].replace(" ", ""))
"""


def environment(library: str, version: str) -> Path:
    """The interpreter of an environment in which that version is imported, and else what is imported here."""
    folder = Path(sys.prefix) / library / version
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, symlinks=True)
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        borrowed = Path(folder, "lib", name, "site-packages", "borrowed.pth")
        borrowed.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install(python, f"{library}=={version}")
        if missing := output(python, MISSING, library).split():
            install(python, *missing)
        ready.touch()
    found = output(python, f"import {library}; print({library}.__version__)").strip()
    if found != version:
        sys.exit(f"{python} imports {library} {found}, expected {version}; remove {folder}")
    return python


def install(python: Path, *packages: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed", "--ignore-requires-python")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, *packages], check=True)


def output(python: Path, code: str, *words: str) -> str:
    return subprocess.run([python, "-c", code, *words], check=True, capture_output=True, text=True).stdout


def main() -> int:
    given, more = sys.argv[1:], []
    if "--" in given:
        at = given.index("--")
        given, more = given[:at], given[at + 1 :]
    if not given or given[0] not in LIBRARIES:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(LIBRARIES)} [VERSION...] [-- pytest's arguments]")
    name, failed = given[0], 0
    installed, library = importlib.metadata.version(name), LIBRARIES[name]
    for version in given[1:] or [version for version in library.versions if version != installed]:
        print(f"{name} {version}", flush=True)
        command = [environment(name, version), *PYTEST, *library.tests, *more]
        failed |= subprocess.run(command, cwd=HERE.parent).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
