"""What steps cost: the linear law, the ledger, the host, the roofline, and the choice between sources."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from running import LINEAR, scenario_of
from servetwin import catalog
from servetwin.fabric.collectives import exchange_ns, ring_allreduce_ns, ring_gather_ns, transfer_ns
from servetwin.timing.choose import pricing_for
from servetwin.timing.host import HostOverhead
from servetwin.timing.ledger import Ledger
from servetwin.timing.linear import LinearTimer
from servetwin.timing.protocol import StepTimer
from servetwin.timing.shape import StepShape

counts = st.integers(0, 400)


@st.composite
def shapes(draw: st.DrawFn, prefills: bool = True) -> StepShape:
    chunks = draw(st.lists(st.tuples(st.integers(2, 900), st.integers(0, 4000)), max_size=3)) if prefills else []
    contexts = draw(st.lists(st.integers(1, 5000), min_size=0 if chunks else 1, max_size=12))
    return StepShape(
        len(chunks),
        sum(q for q, _ in chunks),
        sum(c for _, c in chunks),
        sum(q * c + q * (q + 1) // 2 for q, c in chunks),
        len(contexts),
        len(contexts),
        sum(contexts),
        max(contexts, default=0),
        min(contexts, default=0),
    )


def timer_for(timing: dict[str, Any], **pool: Any) -> StepTimer:
    scenario = scenario_of(timing=timing, **pool)
    return pricing_for(scenario, scenario.pools[0], Path()).new_timer()


@given(shapes(), st.integers(1, 10**9), counts, counts, counts)
def test_the_linear_law(shape: StepShape, base: int, prefill: int, decode: int, context: int) -> None:
    timer = LinearTimer(base, prefill, decode, context)
    whole = shape.prefill_context + shape.prefill_tokens + shape.decode_context + shape.decode_tokens
    assert timer.step_ns(shape) == (
        base + prefill * shape.prefill_tokens + decode * shape.decode_seqs + context * whole
    )
    assert astuple(timer.ledger) == (0, 0, 0, timer.ledger.analytic, 0)


def test_drafts_in_the_linear_law() -> None:
    """Two decodes with three drafts each: two sequences and six prefill tokens."""
    shape = StepShape(0, 0, 0, 0, 2, 8, 100, 60, 40)
    assert LinearTimer(1000, 10, 100, 1).step_ns(shape) == 1000 + 60 + 200 + 108


SOURCES = [LINEAR, {"source": "roofline"}, {"source": "auto"}]


@pytest.mark.parametrize("timing", SOURCES, ids=lambda timing: timing["source"])
def test_a_run_is_its_steps(timing: dict[str, Any]) -> None:
    at_once, singly = timer_for(timing), timer_for(timing)

    @settings(max_examples=40, deadline=None, database=None)
    @given(shapes(prefills=False), st.one_of(st.integers(0, 40), st.integers(40, 300)))
    def check(shape: StepShape, steps: int) -> None:
        assert at_once.run_ns(shape, steps) == [singly.step_ns(shape.later(i)) for i in range(steps)]
        assert at_once.ledger == singly.ledger

    check()


def test_any_steps_of_a_run_can_be_taken_out_of_the_ledger_again() -> None:
    whole, part = timer_for({"source": "auto"}), timer_for({"source": "auto"})

    @settings(max_examples=60, deadline=None, database=None)
    @given(shapes(prefills=False), st.integers(1, 79), st.data())
    def check(shape: StepShape, steps: int, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, steps))
        last = data.draw(st.integers(first, steps))
        whole.run_ns(shape, steps)
        before = part.ledger.copy()
        part.run_ns(shape.later(first), last - first)
        assert whole.booked is not None
        assert whole.booked.between(first, last) == list(astuple(part.ledger.less(before)))

    check()


@pytest.mark.parametrize("timing", SOURCES, ids=lambda timing: timing["source"])
def test_the_ledger_holds_what_was_priced(timing: dict[str, Any]) -> None:
    timer = timer_for(timing)

    @settings(max_examples=40, deadline=None, database=None)
    @given(shapes())
    def check(shape: StepShape) -> None:
        before = sum(astuple(timer.ledger))
        ns = timer.step_ns(shape)
        assert isinstance(ns, int)
        assert ns >= 1
        assert sum(astuple(timer.ledger)) - before == ns

    check()


def test_the_ledger_goes_back() -> None:
    ledger = Ledger(1, 2, 3, 4, 5)
    saved = ledger.copy()
    ledger.add((10, 20, 30), 3)
    assert ledger == Ledger(31, 62, 93, 4, 5)
    assert saved == Ledger(1, 2, 3, 4, 5)
    ledger.restore(saved)
    assert ledger == saved


def test_host_time() -> None:
    host = HostOverhead(step_ns=500, seq_ns=3, gap_ns=70, gap_seq_ns=2)
    assert (host.before(10), host.gap(10)) == (530, 90)


class TestRoofline:
    def decode(self, seqs: int, context: int) -> StepShape:
        return StepShape(0, 0, 0, 0, seqs, seqs, seqs * context, context, context)

    def test_one_decode_takes_reading_the_weights(self) -> None:
        """At least 15 GB (7.5e9 parameters beside the embedding, of 2 bytes) at full bandwidth; at most twice that."""
        timer, device = timer_for({"source": "roofline"}), catalog.device("h100_sxm")
        reading = 15e9 / device.memory_bandwidth * 1e9
        assert reading < timer.step_ns(self.decode(1, 100)) < 2 * reading

    def test_a_long_prompt_takes_its_flops(self) -> None:
        """At least 2 x 7e9 FLOPs a token at the dense peak of 16-bit formats; at most 2.5 times that."""
        timer, device = timer_for({"source": "roofline"}), catalog.device("h100_sxm")
        n = 8192
        shape = StepShape(1, n, 0, n * (n + 1) // 2, 0, 0, 0, 0, 0)
        least = 2 * 7e9 * n / device.peak["bf16"] * 1e9
        assert least < timer.step_ns(shape) < 2.5 * least

    def test_more_work_never_takes_less(self) -> None:
        timer = timer_for({"source": "roofline"})
        for seqs in (1, 8, 64, 256):
            assert timer.step_ns(self.decode(seqs, 4000)) > timer.step_ns(self.decode(seqs, 400))
            assert timer.step_ns(self.decode(4 * seqs, 400)) >= timer.step_ns(self.decode(seqs, 400))


class TestCollectives:
    """By hand: 4 ranks, 8 MB, 100 GB/s, 1 us."""

    def test_values(self) -> None:
        assert ring_allreduce_ns(4, 8e6, 100e9, 1000) == pytest.approx(6 * (1000 + 20_000))
        assert ring_gather_ns(4, 8e6, 100e9, 1000) == pytest.approx(3 * (1000 + 20_000))
        assert exchange_ns(4, 8e6, 100e9, 1000) == pytest.approx(1000 + 60_000)
        assert transfer_ns(8e6, 100e9, 1000) == pytest.approx(1000 + 80_000)

    def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(self) -> None:
        for ranks in (1, 2, 8):
            assert ring_allreduce_ns(ranks, 5e6, 50e9, 700) == 2 * ring_gather_ns(ranks, 5e6, 50e9, 700)

    def test_alone_there_is_nothing_to_exchange(self) -> None:
        assert ring_allreduce_ns(1, 5e6, 50e9, 700) == 0
