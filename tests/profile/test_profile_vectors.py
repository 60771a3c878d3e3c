"""Inside the measured grid the look-ups are LLMServingSim's, to the nanosecond; outside they are better."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from profile_shapes import shape

from servetwin.timing.profile import ProfileTimer


@pytest.fixture(scope="module")
def vectors(shared: Path) -> dict[str, Any]:
    data = json.loads((shared / "data/llmservingsim/lookup_vectors.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = data["RTXPRO6000|meta-llama/Llama-3.1-8B"]["tp1"]
    return found


@pytest.fixture(scope="module")
def slices(measured_bundle: Path) -> dict[tuple[int, int], dict[int, list[int]]]:
    """(chunk, decodes) -> history -> contexts, read from the CSV independently of the importer."""
    found: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    with (measured_bundle / "tp1/attention.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = int(row["prefill_chunk"]), int(row["n_decode"])
            found[key][int(row["kv_prefill"])].append(int(row["kv_decode"]))
    return found


def neighbours(axis: list[int], x: int) -> list[int]:
    """The values of `axis` between which `x` lies; none when it lies outside."""
    if x in axis:
        return [x]
    below, above = [a for a in axis if a < x], [a for a in axis if a > x]
    return [max(below), min(above)] if below and above else []


def measured_around(slices: dict[tuple[int, int], dict[int, list[int]]], query: list[int]) -> bool:
    """Whether all slices around the query were measured and every row that is needed covers it."""
    chunk, history, decodes, context = query
    chunks = neighbours(sorted({c for c, _ in slices}), chunk)
    counts = neighbours(sorted({n for _, n in slices}), decodes)
    if not chunks or not counts or any((c, n) not in slices for c in chunks for n in counts):
        return False
    for c in chunks:
        for n in counts:
            rows = neighbours(sorted(slices[c, n]), history if c else 0)
            if not rows or any(not neighbours(sorted(slices[c, n][row]), context if n else 0) for row in rows):
                return False
    return True


def test_dense_and_per_sequence(measured: ProfileTimer, vectors: dict[str, Any]) -> None:
    inside = [row for row in vectors["dense"] if row[1] <= 2048]
    assert len(inside) >= 70
    assert [[layer, x, measured.dense_ns(layer, x)] for layer, x, _ in inside] == inside
    inside = [row for row in vectors["per_sequence"] if row[1] <= 256]
    assert [[layer, x, measured.per_sequence_ns(layer, x)] for layer, x, _ in inside] == inside


def test_attention_inside(
    measured: ProfileTimer, vectors: dict[str, Any], slices: dict[tuple[int, int], dict[int, list[int]]]
) -> None:
    inside = [row for row in vectors["attention"] if measured_around(slices, row[:4])]
    assert len(inside) >= 20
    assert [[*row[:4], measured.attention_ns(*row[:4])] for row in inside] == inside


def test_attention_outside_is_called_extrapolated(
    measured: ProfileTimer, vectors: dict[str, Any], slices: dict[tuple[int, int], dict[int, list[int]]]
) -> None:
    outside = [row for row in vectors["attention"] if not measured_around(slices, row[:4]) and (row[0] or row[2])]
    assert outside
    for chunk, history, decodes, context, _ in outside:
        step = shape([(chunk, history)] if chunk else [], [context] * decodes)
        assert ("attention", "extrapolated") in {(name, how) for name, _, how in measured.explain(step)}


def test_nearest_slice_fault_is_gone(measured: ProfileTimer) -> None:
    """Beyond the last number of decodes of the mixed slices neither the prefill nor the decodes may vanish."""
    assert measured.attention_ns(100, 0, 256, 512) > measured.attention_ns(0, 0, 256, 512)
    assert measured.attention_ns(2048, 4096, 256, 512) > measured.attention_ns(2048, 4096, 128, 512)
    assert measured.attention_ns(2048, 4096, 256, 512) > measured.attention_ns(2048, 0, 256, 512)


def test_dense_beyond_the_table_grows_like_the_table(measured: ProfileTimer) -> None:
    """The last two points alone would give 1537 ns for 3000 tokens of embedding after 7904 ns for 2048."""
    assert measured.dense_ns("embedding", 2048) == 7904
    assert 7904 < measured.dense_ns("embedding", 3000) < 7904 * 3000 / 2048
    for layer in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        half, last, beyond = (measured.dense_ns(layer, tokens) for tokens in (1024, 2048, 3072))
        assert beyond - last == pytest.approx(last - half, rel=0.15)


def test_short_contexts_where_a_row_starts_at_512(measured: ProfileTimer) -> None:
    """Rows at chunk 273 start at context 512; at 256 they start at 16. Between the two nothing may jump threefold."""
    at_256, at_273 = measured.attention_ns(256, 0, 64, 128), measured.attention_ns(273, 0, 64, 128)
    assert at_273 == pytest.approx(at_256, rel=0.15)


def test_worked_example(measured: ProfileTimer) -> None:
    """32 decodes on 1000 tokens beside a prefill of 512: 30 770 652 ns in LLMServingSim's own trace."""
    step = shape([(512, 0)], [1000] * 32)
    assert measured.step_ns(step) == 30_770_652


def test_skew_lies_between_mean_and_longest(measured: ProfileTimer, vectors: dict[str, Any]) -> None:
    for chunk, history, decodes, mean, longest, shortest, _, _ in vectors["attention_skew"]:
        prefills = [(chunk, history)] if chunk else []
        step = shape(prefills, [mean] * decodes)._replace(decode_max=longest, decode_min=shortest)
        ns = next(ns for name, ns, _ in measured.explain(step) if name == "attention") // 32
        assert measured.attention_ns(chunk, history, decodes, mean) <= ns
        assert ns <= max(measured.attention_ns(chunk, history, decodes, x) for x in (mean, longest))


def test_a_chunk_that_misses_a_bucket_does_not_jump(measured: ProfileTimer) -> None:
    """12 tokens off a measured chunk changed LLMServingSim's time by 6 %."""
    skewed = [shape([(chunk, 0)], [1000] * 32)._replace(decode_max=2600, decode_min=100) for chunk in (500, 512)]
    near, exact = (next(ns for name, ns, _ in measured.explain(s) if name == "attention") for s in skewed)
    assert near == pytest.approx(exact, rel=0.01)


def test_skew_errors(measured: ProfileTimer) -> None:
    """On shots left out of the fit: half the error of equal contexts, and of the order of a table of 3982 factors."""
    fit = measured.profile.data["skew"][1]["fit"]
    assert fit["scale"] == 3.0, "a skew shot of this bundle is the sum of three repetitions"
    assert fit["holdout"]["p50"] < 0.025 < fit["equal_contexts"]["p50"]
    assert fit["holdout"]["p90"] < 0.12 < fit["equal_contexts"]["p90"]
    assert abs(fit["holdout"]["signed_mean"]) < 0.02
