"""How tokens meet their experts: the `experts` section of a pool (docs/experts.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from servetwin.scenario.quantities import Count, Whole
from servetwin.scenario.workload import Section, wrong


class ExpertChoices(Section):
    """Which experts the tokens pick, where those are, and how tokens get there."""

    routing: str = Field(
        default="balanced",
        min_length=1,
        description="balanced (expected even load), random (even, with its spread), zipf, measured, or a law of an"
        " installed package",
    )
    exponent: Annotated[float, Field(ge=0, le=5)] | None = Field(
        default=None, description="zipf: the r-th most popular expert is drawn with weight r^-exponent"
    )
    popularity: str | None = Field(
        default=None,
        min_length=1,
        description="measured: JSON or YAML file with a count for each expert, or a list of them for each expert layer",
    )
    per_layer: bool = Field(default=False, description="zipf and own laws: every layer has popular experts of its own")
    redundant_experts: Whole = Field(default=0, description="copies of the most popular experts (vLLM EPLB)")
    rebalance_interval: Count | None = Field(
        default=None, description="steps between two rearrangements of experts by load; default: none, as placed"
    )
    communication: Literal["auto", "allgather_reducescatter", "alltoall", "allreduce"] = Field(
        default="auto", description="auto: all-reduce without, all-gather and reduce-scatter with data parallelism"
    )

    @model_validator(mode="after")
    def _of_the_law(self) -> ExpertChoices:
        for name, law in (("exponent", "zipf"), ("popularity", "measured")):
            value = getattr(self, name)
            if self.routing == law and value is None:
                allowed = "a number from 0 (even) to 5" if name == "exponent" else "a file with a count for each expert"
                raise wrong(name, f"missing: routing {law!r} needs it", allowed=allowed)
            if self.routing != law and value is not None:
                raise wrong(name, f"does not go with routing {self.routing!r}", found=value)
        if self.per_layer and self.routing in ("balanced", "random", "measured"):
            raise wrong("per_layer", f"does not go with routing {self.routing!r}", found=True)
        return self
