"""A virtual environment for what a benchmark compares emu35 with.

It lives in the user's cache, never in the project, and sees the packages of the interpreter that
runs the benchmark (torch above all, which must not be fetched twice) behind its own. pip respects
the project's constraints file. A stamp written last tells a finished environment from one whose
installation was cut short.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMP = "emu35-bench-ready"


def ensure_venv(name: str, *, requirements: list[str]) -> Path:
    """The Python of environment ``name`` with ``requirements`` installed; made when needed.

    Raises:
        SystemExit: pip failed; its own message has been shown.
    """
    folder = _cache() / name
    python = folder / "bin" / "python"
    stamp = folder / STAMP
    wanted = _fingerprint(requirements)
    if stamp.exists() and stamp.read_text() == wanted and _has(python, requirements=requirements):
        return python
    _say(f"installing {', '.join(requirements)} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    _see_packages_of_this_interpreter(folder)
    # What is compared is always the environment's own; what it needs may be the parent's.
    _pip(python, "--no-deps", "--ignore-installed", *requirements)
    _pip(python, *requirements)
    stamp.write_text(wanted)
    return python


def run_in_venv(name: str, *, requirements: list[str], script: Path, arguments: list[str]) -> int:
    """Run ``script`` again in environment ``name``; its exit code."""
    python = ensure_venv(name, requirements=requirements)
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(
        [str(python), str(script), *arguments], env=environment, check=False
    ).returncode


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ROOT / "constraints.txt"
    if constraints.exists():
        command += ["--constraint", str(constraints)]
    if subprocess.run([*command, *arguments], check=False).returncode:
        raise SystemExit(f"pip install {' '.join(arguments)} failed; see its message above")


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "emu35" / "bench"


def _see_packages_of_this_interpreter(folder: Path) -> None:
    # addsitedir, unlike a bare path, also follows the .pth file of an editable installation.
    lines = {
        f"import site; site.addsitedir({sysconfig.get_path(kind)!r})\n"
        for kind in ("purelib", "platlib")
    }
    packages = subprocess.run(
        [
            str(folder / "bin" / "python"),
            "-c",
            "import sysconfig as s; print(s.get_path('purelib'))",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(packages) / "zz_parent.pth").write_text("".join(sorted(lines)))


def _fingerprint(requirements: list[str]) -> str:
    constraints = ROOT / "constraints.txt"
    content = [sys.executable, sys.version, *requirements]
    content.append(constraints.read_text() if constraints.exists() else "")
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _has(python: Path, *, requirements: list[str]) -> bool:
    names = [requirement.split("=")[0].split(">")[0].split("<")[0] for requirement in requirements]
    program = f"from importlib.metadata import version\nfor n in {names!r}: version(n)"
    return (
        python.exists()
        and not subprocess.run(
            [str(python), "-c", program], check=False, stderr=subprocess.DEVNULL
        ).returncode
    )


def _say(text: str) -> None:
    print(f"[bench] {text}", file=sys.stderr, flush=True)
