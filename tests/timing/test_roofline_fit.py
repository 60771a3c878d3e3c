"""The shipped laws are what the fitting tool makes of the shipped tables."""

from __future__ import annotations

import numpy as np
import pytest

from servetwin.catalog.fields import read_yaml
from servetwin.measure.fit_efficiency import CHIPS, by_chip, errors, fit, least_squares, load, tables_hash
from servetwin.measure.kernel_points import fitted_devices
from servetwin.measure.roofline_steps import compare
from servetwin.timing.efficiency import FILE, kinds, laws
from servetwin.timing.efficiency import errors as shipped_errors


def test_fitted_on_the_tables_that_are_shipped() -> None:
    """Fails when tables change: fit again and bring docs/roofline.md up to date."""
    assert read_yaml(FILE)["fitted"]["on"] == {name: tables_hash(name) for name in fitted_devices()}
    assert sorted(CHIPS) == fitted_devices()


def test_leaving_out_a_chip_gives_the_shipped_error() -> None:
    """One kind, one fit: A100 is not in the fit whose error on A100 is shipped, and fitting on all gives the law."""
    kind = "generation_attention_16bit"
    data = load([kind])
    law = fit(data, without=by_chip()["GA100"])[kind]
    found = errors(law, None, "a100_sxm", kind, data[kind]["a100_sxm"])
    shipped = shipped_errors()[kind]["chip_out"]["devices"]["a100_sxm"]
    assert found.keys() == shipped.keys()
    for group, summary in found.items():
        assert summary == pytest.approx(shipped[group], abs=0.003), group
    whole = fit(data)[kind]
    assert (whole.memory, whole.fixed_ns) == pytest.approx((laws()[kind].memory, laws()[kind].fixed_ns), rel=0.01)
    assert abs(law.fixed_ns / whole.fixed_ns - 1) > 0.001  # A100 was in the one and not in the other


def test_every_kind_has_errors_by_device() -> None:
    for kind in kinds():
        for which in ("device_out", "chip_out"):
            assert shipped_errors()[kind][which]["devices"].keys() <= set(fitted_devices()), kind


def test_least_squares_finds_a_known_law() -> None:
    x = np.linspace(0.1, 5, 40)
    found = least_squares(lambda p: np.exp(p[0]) + np.exp(p[1]) * x - (2 + 0.5 * x), np.array([3.0, 3.0]))
    assert np.exp(found) == pytest.approx([2, 0.5], rel=1e-4)


def test_steps_of_a_device_that_the_fit_has_not_seen() -> None:
    """A dense model on A100, whose tables the laws for it do not know: within a quarter (docs/roofline.md)."""
    rows = list(
        compare(
            [("meta-llama/Llama-3.1-8B", None, 1, "a100_sxm")],
            ("small", "cast", "gemm_16bit", "context_attention_16bit", "generation_attention_16bit"),
        )
    )
    assert len(rows) == 7
    assert max(abs(row.error) for row in rows) < 0.25
