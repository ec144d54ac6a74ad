"""What can be known of the images without docker: that pip will find its build tools."""

import re
import tomllib
from pathlib import Path


def test_everything_that_builds_emu35_is_installed_before_isolation_is_off(
    repository: Path,
) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    build = [re.split(r"[<>=~! ]", name)[0] for name in project["build-system"]["requires"]]
    # What hatchling may ask for besides, where the installation is an editable one.
    needed = {*build, "editables"}
    text = (repository / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    (run,) = [line for line in text.splitlines() if "--no-build-isolation" in line]
    assert '--editable ".[gpu,tokenizer]"' in run
    before, _ = run.split("--no-build-isolation")
    assert needed <= set(before.split())
