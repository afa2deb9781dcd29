"""What the pages say of rooms, commands and files is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtrec_ray import storage

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_design_names_every_room_and_no_other() -> None:
    rooms = {p.parent.name for p in (ROOT / "mtrec_ray").glob("*/__init__.py")}
    named = set(re.findall(r"^  (\w+)/ ", text("docs/design.md"), re.MULTILINE))
    assert named == rooms


def test_every_job_is_named_on_a_page_and_every_named_job_is_there() -> None:
    jobs = {p.stem for p in (ROOT / "jobs").glob("*.py")} - {"__init__", "command"}
    listed = re.search(r"^jobs/ +([^:]*):", text("docs/design.md"), re.MULTILINE)
    assert listed is not None and set(listed[1].split(", ")) == jobs
    pages = "".join(p.read_text(encoding="utf-8") for p in [*PAGES, ROOT / "Makefile"])
    assert {m for m in re.findall(r"python -m jobs\.(\w+)", pages)} <= jobs
    stages = {"encode", "index", "evaluate", "score"}  # "each is also a job"
    assert jobs - stages <= set(re.findall(r"jobs\.(\w+)", pages))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_of_a_page_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [u for u in links if "://" not in u and not (page.parent / u).exists()] == []


def test_every_page_and_picture_is_linked() -> None:
    pages = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    made = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "pictures").glob("*.svg")]
    assert [p.name for p in made if f"{p.name})" not in pages] == []


def test_every_result_is_told_on_a_page_by_the_command_that_made_it() -> None:
    pages = "".join(p.read_text(encoding="utf-8") for p in PAGES)
    scripts = sorted((p.stem for p in (ROOT / "benchmarks").glob("*.py")), key=len)
    results = {
        max((s for s in scripts if p.stem == s or p.stem.startswith(s + "_")), key=len, default=p.stem)  # NAME, or NAME_variant
        for p in (ROOT / "benchmarks" / "results").glob("*.json")
    }
    assert [r for r in sorted(results) if f"python -m benchmarks.{r}" not in pages] == []


def test_every_measurement_is_among_those_of_make_bench() -> None:
    scripts = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text(encoding="utf-8")}
    made = set(re.findall(r"benchmarks\.(\w+)", text("Makefile")))
    helpers = {"generate", "polars_prepare"}
    assert scripts - helpers == made


def test_the_changelog_tells_the_schema_version() -> None:
    assert f"schema_version {storage.SCHEMA_VERSION}" in text("CHANGELOG.md")
