"""Who asks: the `workload` section of a scenario."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from servetwin.catalog.units import format_duration
from servetwin.scenario.quantities import LARGEST, Count, Duration, Fraction, Positive, Whole


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
    concurrency: Count | None = Field(
        default=None, description="requests (or sessions) in the system at any time, of a closed loop"
    )

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
            raise wrong("max", "is less than min", found=format_duration(self.max))
        return self


class LognormalTime(Section):
    """exp(N(ln median, sigma²)), at most `max`."""

    distribution: Literal["lognormal"] = "lognormal"
    median: Duration
    sigma: Annotated[float, Field(ge=0)]
    max: Duration | None = None


class ExponentialTime(Section):
    """Exponential with this mean, at most `max`."""

    distribution: Literal["exponential"] = "exponential"
    mean: Duration
    max: Duration | None = None


def _times_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        kind = value.get("distribution")
        return kind if isinstance(kind, str) else None
    return getattr(value, "distribution", "number")


Times = Annotated[
    Annotated[Duration, Tag("number")]
    | Annotated[UniformTime, Tag("uniform")]
    | Annotated[LognormalTime, Tag("lognormal")]
    | Annotated[ExponentialTime, Tag("exponential")],
    Discriminator(_times_kind),
]
"""Lengths of time: a time with its unit, or a distribution of them."""


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


Priorities = Annotated[
    list[Annotated[float, Field(ge=0)]],
    Field(description="relative weights of the priorities 0, 1, 2, …; 0 is served first", min_length=1),
]
Models = Annotated[
    dict[str, Positive],
    Field(description="models that are asked for, each with its relative weight", min_length=1),
]


def _some_weight(priorities: list[float] | None) -> None:
    if priorities is not None and not sum(priorities) > 0:
        raise wrong("priorities", "no priority has a weight", found=priorities, allowed="at least one above 0")


class SyntheticWorkload(Section):
    """`requests` requests drawn from distributions."""

    arrivals: Arrivals
    requests: Count = Field(description="how many requests")
    input_tokens: Lengths = Field(description="prompt lengths")
    output_tokens: Lengths = Field(description="output lengths")
    prefixes: Prefixes | None = Field(default=None, description="prompts that start alike")
    models: Models | None = None
    priorities: Priorities | None = None
    patience: Times | None = Field(
        default=None, description="a client gives up when its request has not finished after so long"
    )
    output_ends: Ends = "length"

    @model_validator(mode="after")
    def _check(self) -> SyntheticWorkload:
        _some_weight(self.priorities)
        return self


class FanOut(Section):
    """After a turn (not the last) come `width` requests at once, each of which goes on from that turn by itself."""

    width: Lengths = Field(description="how many")
    chance: Fraction = Field(default=1.0, description="that a turn fans out")
    input_tokens: Lengths = Field(description="new tokens of each of them")
    output_tokens: Lengths = Field(description="output lengths of each of them")
    join: bool = Field(
        default=True,
        description="the next turn waits for all of them and reads their outputs; false: it waits only for the turn",
    )


class SessionWorkload(Section):
    """`sessions` agentic sessions: turns that each go on from the conversation so far, once a tool has run."""

    sessions: Count = Field(description="how many sessions")
    arrivals: Arrivals = Field(description="of sessions; in a closed loop, of so many at any time")
    turns: Lengths = Field(description="turns of a session")
    first_input_tokens: Lengths = Field(description="prompt lengths of first turns, shared prefixes included")
    input_tokens: Lengths = Field(description="new tokens of each later turn, beyond the conversation so far")
    output_tokens: Lengths = Field(description="output lengths of turns")
    tool_time: Times = Field(default=0, description="from the end of a turn to the release of the next")
    fan_out: FanOut | None = Field(default=None, description="requests side by side, such as those of sub-agents")
    prefixes: Prefixes | None = Field(
        default=None, description="first prompts that start alike, such as system prompts"
    )
    models: Models | None = None
    priorities: Priorities | None = None
    output_ends: Ends = "length"

    @model_validator(mode="after")
    def _check(self) -> SessionWorkload:
        _some_weight(self.priorities)
        return self


class TraceWorkload(Section):
    """Requests read from a file, replayed `rate_scale` times as fast as they came."""

    trace: str = Field(description="file to read, relative to the scenario", min_length=1)
    format: Literal["auto", "servetwin", "llmservingsim", "azure", "mooncake", "vidur", "burstgpt"] = "auto"
    rate_scale: Positive = Field(default=1.0, description="the trace is replayed so many times as fast")
    limit: Count | None = Field(default=None, description="read so many requests (or whole sessions) at most")
    skip: Whole = Field(default=0, description="leave out so many requests (or whole sessions) at the start")
    repeat: Count = Field(default=1, description="play what is left so many times, back to back at the trace's pace")
    arrivals_at: Literal["client", "engine"] = Field(
        default="client", description="engine: arrivals are when the engine queued the request, after its front end"
    )
    output_ends: Ends = "length"


def _workload_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        if "trace" in value:
            return "trace"
        return "sessions" if "sessions" in value or "turns" in value else "arrivals"
    kinds: dict[type, str] = {SyntheticWorkload: "arrivals", SessionWorkload: "sessions", TraceWorkload: "trace"}
    return kinds.get(type(value))


Workload = Annotated[
    Annotated[SyntheticWorkload, Tag("arrivals")]
    | Annotated[SessionWorkload, Tag("sessions")]
    | Annotated[TraceWorkload, Tag("trace")],
    Discriminator(_workload_kind),
]
"""The requests: drawn from distributions, one by one or in sessions, or read from a trace; never both."""
