"""Who asks: the `workload` section of a scenario."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from servetwin.scenario.quantities import LARGEST, Count, Duration, Positive, Whole


class Section(BaseModel):
    """A part of a scenario: immutable, no unknown keys, no silent conversions (`true` is not 1, NaN is refused)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


def wrong(
    field: str, message: str, *, allowed: str | None = None, found: object = None, hint: str | None = None
) -> PydanticCustomError:
    """An error about `field` of the section being checked; `load` turns it into an InputError."""
    context = {"field": field, "message": message, "allowed": allowed, "found": found, "hint": hint}
    return PydanticCustomError("section", "{message}", context)


class Arrivals(Section):
    """When requests come. Open loop at a mean `rate` (requests/s), or a closed loop of `concurrency` users."""

    process: Literal["poisson", "gamma", "constant", "all_at_once", "closed_loop"] = Field(
        description="poisson, gamma (with burstiness) and constant need a rate; closed_loop needs a concurrency"
    )
    rate: Positive | None = Field(default=None, description="mean requests per second")
    burstiness: Positive | None = Field(
        default=None, description="gamma: its shape; 1 (the default) = Poisson, less = burstier, as in vllm bench serve"
    )
    concurrency: Count | None = Field(default=None, description="requests in the system at any time, of a closed loop")

    @model_validator(mode="after")
    def _of_the_process(self) -> Arrivals:
        paced_by = {"all_at_once": None, "closed_loop": "concurrency"}.get(self.process, "rate")
        for name in ("rate", "burstiness", "concurrency"):
            value = getattr(self, name)
            if name == paced_by and value is None:
                raise wrong(name, f"missing: process {self.process!r} needs it")
            fits = name == paced_by or (name == "burstiness" and self.process == "gamma")
            if value is not None and not fits:
                raise wrong(name, f"does not go with process {self.process!r}", found=value)
        return self


def _ordered(low: float | None, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise wrong("max", "is less than min", found=high, allowed=f"at least {low}")


class Fixed(Section):
    """Every length is `value`."""

    distribution: Literal["fixed"] = "fixed"
    value: Count


class Uniform(Section):
    """Whole numbers from `min` to `max`, both included, equally likely."""

    distribution: Literal["uniform"] = "uniform"
    min: Count
    max: Count

    @model_validator(mode="after")
    def _check(self) -> Uniform:
        _ordered(self.min, self.max)
        return self


class RangeRatio(Section):
    """Uniform from `ratio * max` to `max` (the form in which InferenceX states its lengths)."""

    distribution: Literal["range_ratio"] = "range_ratio"
    max: Count
    ratio: Annotated[float, Field(gt=0, le=1)]


class Lognormal(Section):
    """exp(N(ln median, sigma²)), rounded, clipped to [min, max]."""

    distribution: Literal["lognormal"] = "lognormal"
    median: Annotated[float, Field(gt=0, le=LARGEST)]
    sigma: Annotated[float, Field(ge=0)]
    min: Count | None = None
    max: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Lognormal:
        _ordered(self.min, self.max)
        return self


class Zipf(Section):
    """P(n) proportional to n**-alpha on the whole numbers from `min` to `max`."""

    distribution: Literal["zipf"] = "zipf"
    alpha: Annotated[float, Field(gt=1)]
    min: Count
    max: Count

    @model_validator(mode="after")
    def _check(self) -> Zipf:
        _ordered(self.min, self.max)
        return self


class Empirical(Section):
    """Lengths drawn with replacement from `file`, one whole number a line."""

    distribution: Literal["empirical"] = "empirical"
    file: Annotated[str, Field(min_length=1)]


def _lengths_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        kind = value.get("distribution")
        return kind if isinstance(kind, str) else None
    if isinstance(value, int | float):
        return "number"
    return getattr(value, "distribution", None)


Lengths = Annotated[
    Annotated[Count, Tag("number")]
    | Annotated[Fixed, Tag("fixed")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[RangeRatio, Tag("range_ratio")]
    | Annotated[Lognormal, Tag("lognormal")]
    | Annotated[Zipf, Tag("zipf")]
    | Annotated[Empirical, Tag("empirical")],
    Discriminator(_lengths_kind),
]
"""Numbers of tokens: a whole number, or a distribution of them."""


class UniformTime(Section):
    """Any time from `min` to `max`, equally likely."""

    distribution: Literal["uniform"] = "uniform"
    min: Duration
    max: Duration

    @model_validator(mode="after")
    def _check(self) -> UniformTime:
        if self.min > self.max:
            raise wrong("max", "is less than min", allowed="at least min")
        return self


class ExponentialTime(Section):
    """Memoryless times with this mean."""

    distribution: Literal["exponential"] = "exponential"
    mean: Duration


class LognormalTime(Section):
    """median * exp(N(0, sigma²))."""

    distribution: Literal["lognormal"] = "lognormal"
    median: Duration
    sigma: Annotated[float, Field(ge=0)]


def _times_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        kind = value.get("distribution")
        return kind if isinstance(kind, str) else None
    return "number" if isinstance(value, str | int | float) else getattr(value, "distribution", None)


Times = Annotated[
    Annotated[Duration, Tag("number")]
    | Annotated[UniformTime, Tag("uniform")]
    | Annotated[ExponentialTime, Tag("exponential")]
    | Annotated[LognormalTime, Tag("lognormal")],
    Discriminator(_times_kind),
]
"""Times: one for all, or a distribution of them."""


class ZipfPopularity(Section):
    """Group k (from 1) is asked for in proportion to k**-zipf."""

    zipf: Positive


def _popularity_kind(value: Any) -> str | None:
    if isinstance(value, dict | ZipfPopularity):
        return "zipf"
    return "uniform" if value == "uniform" else None


class Prefixes(Section):
    """Prompts start with one of `groups` shared prefixes of `tokens` tokens."""

    groups: Count
    tokens: Lengths
    popularity: Annotated[
        Annotated[Literal["uniform"], Tag("uniform")] | Annotated[ZipfPopularity, Tag("zipf")],
        Discriminator(_popularity_kind),
    ] = "uniform"


Ends = Annotated[
    Literal["length", "stop"],
    Field(description="whether the scheduler foresees the end of an output (length) or not (a stop token)"),
]


class SyntheticWorkload(Section):
    """`requests` requests drawn from distributions."""

    arrivals: Arrivals
    requests: Count = Field(description="how many requests")
    input_tokens: Lengths = Field(description="prompt lengths")
    output_tokens: Lengths = Field(description="output lengths")
    prefixes: Prefixes | None = Field(default=None, description="prompts that start alike")
    priorities: list[Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="relative weights of the priorities 0, 1, 2, …; 0 is served first", min_length=1
    )
    patience: Times | None = Field(
        default=None, description="a client gives up when its request has not finished after so long"
    )
    output_ends: Ends = "length"

    @model_validator(mode="after")
    def _some_weight(self) -> SyntheticWorkload:
        if self.priorities is not None and not sum(self.priorities) > 0:
            raise wrong("priorities", "no priority has a weight", found=self.priorities, allowed="at least one above 0")
        return self


class TraceWorkload(Section):
    """Requests read from a file, replayed `rate_scale` times as fast as they came."""

    trace: str = Field(description="file to read, relative to the scenario", min_length=1)
    format: Literal["auto", "servetwin", "llmservingsim", "azure", "mooncake", "vidur", "burstgpt"] = "auto"
    rate_scale: Positive = Field(default=1.0, description="the trace is replayed so many times as fast")
    limit: Count | None = Field(default=None, description="read so many requests at most")
    skip: Whole = Field(default=0, description="leave out so many requests at the start of the trace")
    repeat: Count = Field(default=1, description="play what is left so many times, back to back at the trace's pace")
    arrivals_at: Literal["client", "engine"] = Field(
        default="client", description="engine: arrivals are when the engine queued the request, after its front end"
    )
    output_ends: Ends = "length"


def _workload_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return "trace" if "trace" in value else "arrivals"
    if isinstance(value, TraceWorkload):
        return "trace"
    return "arrivals" if isinstance(value, SyntheticWorkload) else None


Workload = Annotated[
    Annotated[SyntheticWorkload, Tag("arrivals")] | Annotated[TraceWorkload, Tag("trace")],
    Discriminator(_workload_kind),
]
"""The requests: drawn from distributions, or read from a trace; never both."""
