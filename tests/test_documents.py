"""What the documents point to is there, and the scenario of the front page can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from servetwin.results.files import RESULT_FILES
from servetwin.results.run import REQUEST_COLUMNS, SCHEDULE_COLUMNS, STEP_COLUMNS
from servetwin.scenario.load import load
from servetwin.scenario.resolve import resolve

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_the_scenario_of_the_front_page_loads(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "scenario.yaml"
    file.write_text(text)
    overrides = re.findall(r"--set (\S+)", (ROOT / "README.md").read_text().partition("my.yaml")[2].splitlines()[0])
    assert len(overrides) == 2
    resolved = resolve(load(file, overrides), tmp_path)
    assert resolved.pools[0].replicas == 4


def test_every_room_is_on_the_plan() -> None:
    plan = (ROOT / "docs" / "README.md").read_text()
    package = ROOT / "src" / "servetwin"
    rooms = {f"{folder.parent.name}/" for folder in package.glob("*/__init__.py")}
    modules = {module.name for module in package.glob("*.py")} - {"__init__.py"}
    assert {place for place in rooms | modules if f"| `{place}` |" not in plan} == set()


def test_the_page_on_results_names_every_file_and_column() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    named = {name for line in page.splitlines() for name in re.findall(r"`([a-z_.]+)`", line)}
    assert {*RESULT_FILES, *REQUEST_COLUMNS, *STEP_COLUMNS, *SCHEDULE_COLUMNS} - named == set()
