"""Placeholder until the fitted law lands."""


def roofline_error(kind: str) -> tuple[float, float]:
    """Median and p90."""
    return 0.2, 0.5
