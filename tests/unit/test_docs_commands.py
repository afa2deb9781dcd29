"""Commands of the pages are taken by their programs; the reference is current; the site builds."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mtrec_ray.config import reference

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")])


class Parsed(Exception):
    """A program has read its arguments, and may stop."""


def commands() -> list[str]:
    """Those that stand at the beginning of a line, with arguments, and mean what they say."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(
            r"^\s+python -m ((?:jobs|benchmarks)\.\w+ [^\n#]+)|^python -m (jobs\.\w+ [^\n#]+)", text, re.MULTILINE
        ):
            command = "".join(line).split("  #")[0].strip()
            if not re.search(r"\.\.\.|…|[;&]| \[|\b[A-Z]{3,}\b", command):  # `...`, NAME, [key=value]: not meant as it stands
                found.add(command)
    return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_is_taken_by_its_program(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, *arguments = shlex.split(command)
    whole = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *args: object, **named: object) -> object:
        _, rest = whole(self, *args, **named)  # type: ignore[arg-type]
        assert not rest or module == "jobs.submit", f"not known: {rest}"
        raise Parsed

    program = importlib.import_module(module)
    source = Path(str(program.__file__)).read_text(encoding="utf-8")
    assert "argparse" in source or "jobs.command" in source, f"{module} takes no arguments"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        _run(program)


def test_there_are_commands_to_look_at() -> None:
    found = {c.split()[0] for c in commands()}
    assert {"jobs.pipeline", "jobs.serve", "jobs.compare", "jobs.nightly", "jobs.submit", "jobs.tune"} <= found, found


def _run(program: object) -> None:
    """What `python -m` would call."""
    text = Path(str(program.__file__)).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    call = re.search(r"sys\.exit\((main\(.*\))\)$", text, re.MULTILINE)
    assert call is not None, program
    exec(call[1], vars(program))


def test_the_reference_of_the_configuration_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference.page(), "python -m mtrec_ray.config.reference > docs/configuration.md"


def test_the_site_builds_and_no_link_leads_nowhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tutorial" / "index.html").exists()
