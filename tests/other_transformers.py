"""The tests of `flagops.patch` on other versions of transformers: ``python tests/other_transformers.py [VERSION...]
[-- pytest's arguments]``; without a version on the oldest and the newest supported one, but for the installed.

Each gets an environment of its own in ``.venv/transformers/VERSION``, made once, which borrows all other packages.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

OLDEST, NEWEST = "5.23.0", "5.24.0"
HERE = Path(__file__).resolve().parent
TESTS = (*sorted(HERE.glob("test_patch_*.py")), HERE / "test_transformers.py", HERE / "test_checkpoint_transformers.py")
MISSING = """
import importlib.metadata, sys
from packaging.requirements import Requirement
for text in importlib.metadata.requires("transformers"):
    needed = Requirement(text)
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        try:
            fits = needed.specifier.contains(importlib.metadata.version(needed.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits = False
        if not fits:
            print(text.partition(";")[0])
"""


def environment(version: str) -> Path:
    """The interpreter of an environment in which that transformers is imported, and else what is imported here."""
    folder = Path(sys.prefix) / "transformers" / version
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, clear=True, symlinks=True)
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        borrowed = Path(folder, "lib", name, "site-packages", "borrowed.pth")
        borrowed.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        install(python, f"transformers=={version}")
        if missing := output(python, MISSING).split():
            install(python, *missing)
        ready.touch()
    found = output(python, "import transformers; print(transformers.__version__)").strip()
    if found != version:
        sys.exit(f"{python} imports transformers {found}, expected {version}; remove {folder}")
    return python


def install(python: Path, *packages: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, *packages], check=True)


def output(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def main() -> int:
    given, more = sys.argv[1:], []
    if "--" in given:
        at = given.index("--")
        given, more = given[:at], given[at + 1 :]
    installed, failed = importlib.metadata.version("transformers"), 0
    for version in given or [version for version in (OLDEST, NEWEST) if version != installed]:
        print(f"transformers {version}", flush=True)
        failed |= subprocess.run(
            [environment(version), "-m", "pytest", "-q", *more, *TESTS], cwd=HERE.parent
        ).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
