"""The example of docs/routing.md, installed as a user would, and what goes wrong with others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from running import MS, Row, run, scenario_of, table_of
from servetwin.errors import InputError
from servetwin.scenario.routing import POLICIES

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def install(folder: Path, module: str, points: str) -> None:
    """What an installer leaves behind: a module, and the metadata of its distribution."""
    (folder / "my_policies.py").write_text(module)
    info = folder / "my_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_policies", raising=False)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_the_page(own: Path) -> None:
    points = blocks("toml")[0].replace('[project.entry-points."servetwin.routing"]', "[servetwin.routing]")
    install(own, blocks("python")[0], points.replace('"', ""))
    rows = [Row(0, 1000, 400), *(Row((300 + 30 * i) * MS, 300, 2) for i in range(4)), Row(900 * MS, 20, 2)]
    ran = run(scenario_of(replicas=2, routing="room_for_prompt"), table_of(rows))
    assert [request.engine for request in ran.requests] == [0, 1, 1, 1, 1, 1]


def test_the_scenario_of_the_page() -> None:
    routing = scenario_of(routing=yaml.safe_load(blocks("yaml")[0])["routing"]).routing
    assert (routing.policy, routing.refresh, routing.when_full) == ("weighted", 100 * MS, "queue")


def test_the_page_names_every_policy() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## Policies")[1].split("## Admission")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) - {"policy"} == set(POLICIES)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("raise OSError('no licence')", r"cannot be loaded \(OSError: no licence\); found 'my_policies:Own'"),
        ("class Other: pass", r"cannot be loaded \(AttributeError"),
        ("class Own:\n    def __init__(self, size): pass", r"cannot be loaded \(TypeError.*size"),
        ("class Own: pass", r"the policy 'own' has no method choose; found 'my_policies:Own'; allowed: a class whose"),
        (
            "class Own:\n    def choose(self, request, candidates, now): return 2",
            r"^routing.policy: policy 'own' chose no engine; found '2'; allowed: a position from 0 to 1$",
        ),
        (
            "class Own:\n    def choose(self, request, candidates, now): return candidates.engines[0]",
            r"policy 'own' chose no engine; found '<servetwin.engine",
        ),
    ],
)
def test_what_is_wrong_with_a_policy(own: Path, module: str, says: str) -> None:
    install(own, module, "[servetwin.routing]\nown = my_policies:Own\n")
    with pytest.raises(InputError, match=says):
        run(scenario_of(replicas=2, routing="own"), table_of([Row()]))


def test_a_misspelt_name_lists_those_of_packages_too(own: Path) -> None:
    install(own, "raise OSError('loaded too early')", "[servetwin.routing]\nmy_policy = my_policies:Own\n")
    with pytest.raises(
        InputError, match=r"unknown policy; found 'my_polcy'; .*, my_policy; did you mean 'my_policy'\?"
    ):
        scenario_of(routing="my_polcy")
