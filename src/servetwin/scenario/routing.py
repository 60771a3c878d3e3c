"""Which replica a request goes to, and whether it is let in: the `routing` section of a scenario."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Literal

from pydantic import Field, model_validator

from servetwin.errors import nearest
from servetwin.scenario.quantities import LARGEST, Count, Duration
from servetwin.scenario.workload import Section, wrong

ENTRY_POINTS = "servetwin.routing"
"""Group of entry points under which other packages register policies of their own."""

Simple = Literal[
    "round_robin", "random", "least_loaded", "join_shortest_queue", "least_kv_usage", "power_of_two",
    "llmservingsim_load", "vllm_dp", "consistent_hash",
]  # fmt: skip
POLICIES = (*Simple.__args__, "session_affinity", "prefix_aware", "weighted")  # type: ignore[attr-defined]

_GOES_WITH = {
    "fallback": ("session_affinity",),
    "overlap_weight": ("prefix_aware",),
    "prefix_index": ("prefix_aware", "weighted"),
    "scorers": ("weighted",),
}

VLLM_STATS_NS = 100_000_000
"""vLLM's coordinator publishes the engines' request counts every 100 ms."""


def user_policies() -> list[str]:
    """Names of the policies that installed packages register, without loading any."""
    return sorted(point.name for point in entry_points(group=ENTRY_POINTS))


Weight = Annotated[float, Field(ge=0, le=LARGEST)]


class Scorers(Section):
    """Weights of the scores that policy `weighted` adds up; each score is from 0 to 1."""

    queue: Weight | None = Field(default=None, description="few waiting requests")
    running: Weight | None = Field(default=None, description="few running requests")
    load: Weight | None = Field(default=None, description="few requests, running and waiting")
    in_flight: Weight | None = Field(default=None, description="few requests sent and not ended; never stale")
    kv_usage: Weight | None = Field(default=None, description="few KV blocks in use")
    prefix: Weight | None = Field(default=None, description="much of the prompt in the prefix cache")
    session: Weight | None = Field(default=None, description="the engine of the session's latest request")

    @property
    def weights(self) -> dict[str, float]:
        """The weights above 0."""
        return {name: float(weight) for name, weight in self if weight}


class Routing(Section):
    """How requests are spread over the replicas that serve their model."""

    policy: str = Field(
        default="least_loaded",
        description=f"{', '.join(POLICIES)}, or a policy that an installed package registers under {ENTRY_POINTS}",
        min_length=1,
    )
    refresh: Duration | None = Field(
        default=None,
        description="policies see the engines as of multiples of this time; default: 0s (live), vllm_dp: 100ms",
    )
    fallback: Simple | None = Field(
        default=None, description="session_affinity: chooses for a session's first request; default: least_loaded"
    )
    overlap_weight: Weight | None = Field(
        default=None, description="prefix_aware: weight of a block to prefill against one in use; default: 1"
    )
    scorers: Scorers | None = Field(default=None, description="weighted: weight of each score")
    prefix_index: Literal["exact", "approximate"] | None = Field(
        default=None, description="where prefixes are looked up: in the engines (the default), or in what was sent"
    )
    max_waiting: Count | None = Field(default=None, description="an engine with so many waiting requests refuses more")
    max_in_flight: Count | None = Field(default=None, description="most requests in all engines together")
    when_full: Literal["queue", "reject"] | None = Field(
        default=None,
        description="beyond max_in_flight requests wait in the router (queue, the default), or are refused",
    )
    queue_timeout: Duration | None = Field(
        default=None, description="a request fails that no step has begun to work on after so long"
    )

    @model_validator(mode="after")
    def _of_the_policy(self) -> Routing:
        if self.policy not in POLICIES and self.policy not in (others := user_policies()):
            names = [*POLICIES, *others]
            hint = nearest(self.policy, names)
            raise wrong("policy", "unknown policy", found=self.policy, allowed=", ".join(names), hint=hint)
        for name, policies in _GOES_WITH.items():
            if getattr(self, name) is not None and self.policy not in policies:
                allowed = f"with policy: {' or '.join(policies)}"
                raise wrong(name, f"does not go with policy {self.policy!r}", allowed=allowed)
        if self.policy == "weighted" and self.scorers is None:
            example = "such as {queue: 2, kv_usage: 2, prefix: 3}"
            raise wrong("scorers", "missing: policy 'weighted' needs it", allowed=example)
        if self.scorers is not None and not self.scorers.weights:
            raise wrong("scorers", "no score has a weight", allowed=f"{', '.join(Scorers.model_fields)}: more than 0")
        if self.prefix_index and self.scorers is not None and not self.scorers.prefix:
            raise wrong("prefix_index", "does nothing without a score of the prefix", allowed="with scorers.prefix")
        if self.when_full and self.max_in_flight is None:
            raise wrong("when_full", "does nothing without max_in_flight", found=self.when_full)
        if self.queue_timeout == 0:
            raise wrong("queue_timeout", "would end every request as it comes", found="0s", allowed="more than 0s")
        return self

    def resolved(self) -> Routing:
        """With every default that has a meaning here written out."""
        changes: dict[str, object] = {}
        if self.refresh is None:
            changes["refresh"] = VLLM_STATS_NS if self.policy == "vllm_dp" else 0
        if self.policy == "session_affinity" and self.fallback is None:
            changes["fallback"] = "least_loaded"
        if self.policy == "prefix_aware" and self.overlap_weight is None:
            changes["overlap_weight"] = 1.0
        looks_up = self.policy == "prefix_aware" or (self.scorers is not None and self.scorers.prefix)
        if looks_up and self.prefix_index is None:
            changes["prefix_index"] = "exact"
        if self.max_in_flight is not None and self.when_full is None:
            changes["when_full"] = "queue"
        return self.model_copy(update=changes)
