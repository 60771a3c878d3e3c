"""Calibration finds terms that are known, refuses what the data cannot hold, and says how good it is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from servetwin.cli.app import app
from servetwin.errors import InputError
from servetwin.measure.calibrate import calibrate
from servetwin.measure.calibration_data import (
    Observed,
    hold_out,
    read_observed,
    read_points,
    split_at_random,
)
from servetwin.measure.calibration_fit import minimise, trust
from servetwin.measure.calibration_runs import Runs
from servetwin.measure.calibration_terms import FITTED, check_told_apart, choose, confused, terms_named
from servetwin.results.metrics import summarize
from servetwin.scenario.load import from_data
from servetwin.scenario.resolve import resolve
from servetwin.scenario.schema import Scenario
from servetwin.simulation import simulate
from servetwin.timing.choose import host_of
from servetwin.timing.overlay import Overlay, read_overlay

TRUTH = Overlay(prefill_factor=1.3, gap_ns=900_000, request_ns=9_000_000)
CONDITIONS = [(isl, 16, c) for isl in (512, 4096) for c in (1, 8)] + [(1024, 24, 4), (2048, 12, 2)]
CLOSED = {
    "arrivals": {"process": "closed_loop", "concurrency": 1}, "requests": 1, "input_tokens": 1, "output_tokens": 1
}  # fmt: skip


def data_of(workload: dict[str, Any] | None = None, **engine: Any) -> dict[str, Any]:
    options = {"max_model_len": 8192, "enable_prefix_caching": False, "max_num_seqs": 64, **engine}
    return {
        "model": "meta-llama/Llama-3.2-1B",
        "workload": workload or CLOSED,
        "timing": {"source": "roofline"},
        "pools": [{"device": "h100_sxm", "engine": options}],
    }


def template(workload: dict[str, Any] | None = None, **engine: Any) -> Scenario:
    return from_data(data_of(workload, **engine), None, Path())


def csv_of(path: Path, rows: Sequence[Sequence[object]], more: str = "") -> Path:
    lines = ["isl,osl,concurrency,ttft_ms,tpot_ms" + more, *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def measured(path: Path, conditions: Sequence[tuple[int, int, int]], truth: Overlay, **engine: Any) -> Path:
    """A CSV of what the simulator itself says under `truth`, as if it had been measured."""
    rows = csv_of(path, [(*one, 1, 1, 0.8) for one in conditions], ",ratio")
    observed = read_points(rows, template(**engine), Path())
    with Runs(observed, 1) as runs:
        replays = runs(range(len(observed)), [truth])[0]
    found = [
        (*one, repr(float(replay.ttft_ms[0])), repr(float(replay.tpot_ms[0])), 0.8)
        for one, replay in zip(conditions, replays, strict=True)
    ]
    return csv_of(path, found, ",ratio")


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(tmp_path_factory.mktemp("points") / "points.csv", CONDITIONS, TRUTH)


def observed_in(path: Path, **engine: Any) -> list[Observed]:
    return read_points(path, template(**engine), Path())


# ---- fits ----


def test_known_terms_are_found_and_hold_elsewhere(points: Path) -> None:
    observed = observed_in(points)
    found = calibrate(observed, hold_out(observed, "isl", "2048"), ["prefill_factor", "gap_ns", "request_ns"])
    assert found.overlay.prefill_factor == pytest.approx(1.3, rel=0.01)
    assert found.overlay.gap_ns == pytest.approx(900_000, rel=0.01)
    assert found.overlay.request_ns == pytest.approx(9_000_000, rel=0.02)
    assert (found.train.runs, found.unseen.runs) == (5, 1)
    for metric in ("ttft", "tpot"):
        assert found.unseen.raw[metric].mape_percent > 10
        assert found.unseen.calibrated[metric].mape_percent < 1
    assert {term.name: term.start for term in found.terms}["gap_ns"] == host_of(
        resolve(observed[0].scenario).pools[0]
    ).gap_ns
    assert found.left_out == {} and found.notes == []


def test_the_overlay_file_gives_the_calibrated_figures(points: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "t.yaml"
    scenario.write_text(yaml.safe_dump(data_of()))
    out = tmp_path / "overlay.yaml"
    arguments = ["calibrate", str(scenario), "--real", str(points), "-o", str(out), "--terms", "gap_ns,request_ns"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    content = yaml.safe_load(out.read_text())
    assert content["overlay"] == 1 and set(content["terms"]) == {"gap_ns", "request_ns"}
    assert content["fitted"]["files"][0]["file"] == "points.csv" and len(content["fitted"]["files"][0]["sha256"]) == 64
    assert set(content["fitted"]["standard_errors"]) == {"gap_ns", "request_ns"}

    overlay = read_overlay(out)
    assert {name: value for name, value in vars(overlay).items() if value is not None} == content["terms"]
    observed = observed_in(points)
    masks = split_at_random(observed, 0.5, 0)
    unseen = [one for one, mask in zip(observed, masks, strict=True) if not mask[0]]
    off = []
    for one in unseen:
        timing = one.scenario.timing.model_copy(update={"overlay": str(out)})
        summary = summarize(simulate(one.scenario.model_copy(update={"timing": timing})))
        off.append(100 * abs(summary["mean_tpot_ms"] / one.tpot_ms[0] - 1))
    assert content["fitted"]["unseen"]["calibrated"]["tpot"]["mape_percent"] == round(float(np.mean(off)), 2)

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "the file is there already" in again.output
    bytes_before = out.read_bytes()
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert out.read_bytes() == bytes_before


def test_terms_of_the_scenarios_overlay_stay(points: Path, tmp_path: Path) -> None:
    (tmp_path / "known.yaml").write_text("overlay: 1\nterms: {request_ns: 9000000, gap_ns: 850000}\n")
    data = data_of()
    data["timing"]["overlay"] = "known.yaml"
    observed = read_points(points, from_data(data, None, tmp_path), tmp_path)
    found = calibrate(observed, split_at_random(observed, 0.7, 1), ["prefill_factor", "gap_ns"])
    assert found.overlay.request_ns == 9_000_000
    assert found.overlay.prefill_factor == pytest.approx(1.3, rel=0.01)
    assert {term.name: term.start for term in found.terms} == {"prefill_factor": 1.0, "gap_ns": 850_000}


def test_requests_of_a_bench_run_are_the_observations(tmp_path: Path) -> None:
    arrivals = {"process": "poisson", "rate": 10}
    lengths = {"distribution": "uniform", "min": 500, "max": 7000}
    scenario = template({"arrivals": arrivals, "requests": 80, "input_tokens": lengths, "output_tokens": 20})
    (tmp_path / "truth.yaml").write_text("overlay: 1\nterms: {prefill_factor: 1.4, gap_ns: 800000}\n")
    timing = scenario.timing.model_copy(update={"overlay": "truth.yaml"})
    run = simulate(scenario.model_copy(update={"timing": timing}), tmp_path)
    first, last = run.ints("first_token_ns") / 1e9, run.ints("finish_ns") / 1e9
    real = tmp_path / "bench.json"
    columns = {
        "ttfts": (first - run.ints("arrival_ns") / 1e9).tolist(),
        "itls": [[gap] for gap in (last - first).tolist()],
        "input_lens": run.ints("input_tokens").tolist(),
        "output_lens": run.ints("output_tokens").tolist(),
    }
    real.write_text(json.dumps(columns))
    observed = read_observed(real, scenario, tmp_path)
    masks = split_at_random(observed, 0.5, 0)
    assert [len(one) for one in observed] == [80] and int(masks[0].sum()) == 40
    found = calibrate(observed, masks, ["prefill_factor", "gap_ns"])
    assert found.overlay.prefill_factor == pytest.approx(1.4, rel=0.01)
    assert found.overlay.gap_ns == pytest.approx(800_000, rel=0.01)
    assert found.unseen.raw["ttft"].figures == 40
    assert found.unseen.calibrated["ttft"].mape_percent < 1 < found.unseen.raw["ttft"].mape_percent

    columns["input_lens"] = [n + 1 for n in columns["input_lens"]]
    real.write_text(json.dumps(columns))
    with pytest.raises(InputError, match="no request has the lengths of the scenario's request of the same number"):
        read_observed(real, scenario, tmp_path)


def test_kv_factor_is_found_where_kv_runs_out(tmp_path: Path) -> None:
    engine = {"num_gpu_blocks_override": None, "gpu_memory_utilization": 0.085}
    conditions = [(4096, 64, c) for c in (1, 16, 24, 32)]
    path = measured(tmp_path / "kv.csv", conditions, Overlay(kv_factor=0.8), **engine)
    observed = observed_in(path, **engine)
    found = calibrate(observed, hold_out(observed, "concurrency", "24"), ["kv_factor"])
    assert found.overlay.kv_factor == pytest.approx(0.8, rel=0.03)
    assert found.unseen.calibrated["ttft"].mape_percent < found.unseen.raw["ttft"].mape_percent / 3


def test_workers_change_nothing(points: Path) -> None:
    observed = observed_in(points)[:4]
    masks = split_at_random(observed, 0.75, 3)
    texts = {calibrate(observed, masks, ["gap_ns"], workers=n).text() for n in (1, 2)}
    assert len(texts) == 1


# ---- what the data cannot hold ----


def test_more_terms_than_figures_are_refused(points: Path) -> None:
    observed = observed_in(points)
    with pytest.raises(InputError) as caught:
        calibrate(observed, split_at_random(observed, 0.5, 0), ["prefill_factor", "gap_ns", "request_ns"])
    assert str(caught.value) == (
        "--terms: more terms than the data can hold; found '3 terms, 6 figures (a mean TTFT or TPOT each) in the"
        " train part'; allowed: 3 for each term, so at most 2 terms, or more measurements"
    )


@pytest.fixture(scope="module")
def one_concurrency(tmp_path_factory: pytest.TempPathFactory) -> list[Observed]:
    conditions = [(isl, osl, 8) for isl in (512, 4096) for osl in (16, 32)]
    return observed_in(measured(tmp_path_factory.mktemp("one") / "one.csv", conditions, TRUTH))


def test_terms_that_look_alike_are_refused_by_name(tmp_path: Path) -> None:
    one_length = [(2048, osl, 1) for osl in (8, 16, 32, 64)]
    observed = observed_in(measured(tmp_path / "length.csv", one_length, TRUTH))
    with pytest.raises(InputError) as caught:
        calibrate(observed, split_at_random(observed, 0.75, 0), ["request_ns", "request_token_ns"])
    assert str(caught.value) == (
        "--terms: the train part cannot tell these terms apart; found 'request_ns, request_token_ns'; allowed: one of"
        " them, or more runs (request_ns: several prompt lengths, arrivals at the client; request_token_ns: prompts of"
        " several lengths, arrivals at the client)"
    )


def test_terms_are_chosen_when_none_are_named(one_concurrency: list[Observed]) -> None:
    found = calibrate(one_concurrency, split_at_random(one_concurrency, 0.75, 0))
    assert [term.name for term in found.terms] == ["prefill_factor", "gap_ns"]
    assert found.left_out["kv_factor"] == "no run of the train part is limited by KV blocks"
    assert found.left_out["request_ns"] == "6 figures hold no more terms (3 for each)"
    assert set(found.left_out) == {
        "request_ns",
        "decode_factor",
        "attention_factor",
        "gap_seq_ns",
        "kv_factor",
        "request_token_ns",
        "step_ns",
    }


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["gap"], "unknown term; found 'gap'; allowed: prefill_factor, gap_ns, .*did you mean 'gap_ns'"),
        ([], "--terms: names no term; allowed: prefill_factor, gap_ns"),
        (["gap_ns", "gap_ns"], "stands twice; found 'gap_ns'"),
        (["kv_factor"], "no run of the train part is limited by KV blocks; found 'kv_factor'; allowed: leave it out"),
    ],
)
def test_other_terms_that_are_refused(one_concurrency: list[Observed], terms: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(one_concurrency, split_at_random(one_concurrency, 0.75, 0), terms)


def test_a_stated_law_is_not_calibrated(one_concurrency: list[Observed]) -> None:
    timing = from_data(data_of() | {"timing": {"source": "linear", "base_ns": 1}}, None, Path()).timing
    stated = [replace(one, scenario=one.scenario.model_copy(update={"timing": timing})) for one in one_concurrency]
    with pytest.raises(InputError, match=r"timing\.source: has nothing to calibrate"):
        calibrate(stated, split_at_random(stated, 0.5, 0), ["gap_ns"])


def test_choice_takes_terms_in_order_and_says_why_not() -> None:
    terms = list(FITTED[:4])
    slopes = np.array([[0.1, 0.0, 0.2, 0.0], [0.0, 0.1, 0.0, 1e-4], [0.0, 0.0, 1e-5, 0.0]])
    chosen, left = choose(slopes, 12, terms)
    assert chosen == [0, 1]
    assert left == {
        "request_ns": "cannot be told apart from prefill_factor",
        "decode_factor": "the train part does not depend on it",
    }
    with pytest.raises(InputError, match="does not depend on this term; found 'decode_factor'"):
        check_told_apart(terms, slopes)


def test_collinear_columns_are_the_ones_named() -> None:
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(20, 4))
    assert confused(slopes) == []
    slopes[:, 3] = slopes[:, 1] + 1e-3 * rng.normal(size=20)
    assert confused(slopes) == [1, 3]
    slopes[:, 3] = slopes[:, 1]
    assert confused(slopes) == [1, 3]
    assert confused(rng.normal(size=(2, 3))) != []


# ---- least squares ----


def test_least_squares_stops_at_bounds_and_frees_the_rest() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, -1.0], [2.0, 0.5]])
    target = matrix @ np.array([-1.0, 3.0])
    start, low, high = np.array([1.0, 1.0]), np.array([0.0, 0.0]), np.array([5.0, 5.0])
    fit = minimise(start, low, high, lambda at: matrix @ at - target, lambda at: matrix, matrix)
    alone = float(matrix[:, 1] @ target / (matrix[:, 1] @ matrix[:, 1]))
    assert fit.at == pytest.approx([0.0, alone], abs=1e-2)


def test_least_squares_backs_out_of_where_nothing_can_be_computed() -> None:
    def residuals(at: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.full(2, np.inf) if at[0] > 2 else np.array([at[0] ** 2 - 3, 0.0])

    def slopes(at: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([[2 * at[0]], [0.0]])

    start = np.array([0.5])
    fit = minimise(start, np.array([0.0]), np.array([9.0]), residuals, slopes, slopes(start))
    assert fit.at[0] <= 2 and abs(fit.at[0] ** 2 - 3) < 2.75


# ---- reading and splitting ----


def test_rows_of_the_same_conditions_are_one_point(tmp_path: Path) -> None:
    path = csv_of(
        tmp_path / "p.csv", [(100, 10, 4, 10, 5, 2), (100, 10, 4, 20, 7, 2), (100, 10, 4, 1, 1, 4)], ",tensor"
    )
    first, second = observed_in(path)
    assert (first.ttft_ms.tolist(), first.tpot_ms.tolist(), second.ttft_ms.tolist()) == ([15.0], [6.0], [1.0])
    assert (first.scenario.pools[0].parallelism.tensor, second.scenario.pools[0].parallelism.tensor) == (2, 4)
    workload = first.scenario.workload
    assert (workload.requests, workload.arrivals.concurrency, workload.input_tokens) == (40, 4, 100)  # type: ignore[union-attr]
    assert first.short.workload.requests == 24  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("isl,osl,concurrency,ttft,tpot_ms\n", "line 1: column ttft_ms is missing.*did you mean 'ttft'"),
        ("isl,osl,concurrency,ttft_ms,tpot_ms\n", "no rows below the header"),
        ("isl,osl,concurrency,ttft_ms,tpot_ms\n1,2,3,4\n", "line 2: wrong number of columns; found 4; allowed: 5"),
        ("isl,osl,concurrency,ttft_ms,tpot_ms\n1.5,2,3,4,5\n", "line 2: isl: is wrong; found '1.5'; allowed: a whole"),
        ("isl,osl,concurrency,ttft_ms,tpot_ms\n1,2,3,-4,5\n", "line 2: ttft_ms: is wrong; found '-4'"),
        ("isl,osl,concurrency,ttft_ms,tpot_ms,ratio\n1,2,3,4,5,2\n", "line 2: ratio: is wrong; found '2'"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        observed_in(path)


def test_splits(tmp_path: Path) -> None:
    rows = [(100 * k, 10, 4, 10, 5, "a" if k < 3 else "b") for k in range(1, 11)]
    observed = observed_in(csv_of(tmp_path / "p.csv", rows, ",rack"))
    masks = [bool(mask[0]) for mask in split_at_random(observed, 0.3, 5)]
    assert sum(masks) == 3
    assert masks == [bool(mask[0]) for mask in split_at_random(observed, 0.3, 5)]
    assert masks != [bool(mask[0]) for mask in split_at_random(observed, 0.3, 6)]
    assert [bool(mask[0]) for mask in hold_out(observed, "rack", "a")] == [False] * 2 + [True] * 8
    assert sum(bool(mask[0]) for mask in hold_out(observed, "isl", "300.0")) == 9
    for share in (0.0, 1.0):
        with pytest.raises(InputError, match="must leave something unseen"):
            split_at_random(observed, share, 0)
    with pytest.raises(InputError, match=r"no such column; found 'rak'; .*did you mean 'rack'"):
        hold_out(observed, "rak", "a")
    with pytest.raises(InputError, match="holds out no run; found 'rack=c'; allowed: a value that some have: a, b"):
        hold_out(observed, "rack", "c")
    with pytest.raises(InputError, match="holds out every run"):
        hold_out(observed, "osl", "10")


def test_terms_are_named_as_in_an_overlay() -> None:
    assert {term.name for term in terms_named([term.name for term in FITTED])} == set(vars(Overlay()))


def test_one_faulty_measurement_does_not_move_the_fit() -> None:
    """A straight line through thirty points, of which one is off by half: squares are misled, trust is not."""
    matrix = np.stack([np.ones(30), np.linspace(0, 1, 30)], axis=1)
    noise = 0.02 * np.random.default_rng(1).normal(size=30)
    faulty = np.where(np.arange(30) == 27, -0.5, 0.0)
    target = matrix @ np.array([0.1, 0.3]) + noise + faulty
    kinds = np.zeros(30, dtype=np.int64)
    low, high = np.full(2, -9.0), np.full(2, 9.0)

    def fit(with_trust: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        weigh = (lambda found: trust(found, kinds)) if with_trust else None
        at = minimise(np.zeros(2), low, high, lambda at: matrix @ at - target, lambda at: matrix, matrix, weigh).at
        return np.asarray(at)

    sound = np.linalg.lstsq(np.delete(matrix, 27, 0), np.delete(target, 27), rcond=None)[0]
    assert np.abs(fit(with_trust=True) - sound).max() < 0.01
    assert np.abs(fit(with_trust=False) - sound).max() > 0.05


def test_trust_falls_with_the_distance_of_its_own_kind_alone() -> None:
    differences = np.array([0.03, -0.03, 0.03, 0.5, 0.5, -0.5, 0.5])
    found = trust(differences, np.array([0, 0, 0, 0, 1, 1, 1]))
    assert found[3] < 0.25 < 0.9 < found[0] == found[1]
    assert found[4] == pytest.approx((1 + 1 / (2.385 * 1.4826) ** 2) ** -0.5), "all alike is no outlier"
    assert trust(np.array([0.01, 0.001]), np.zeros(2, dtype=np.int64))[0] > 0.97, "noise of repeats is none either"
