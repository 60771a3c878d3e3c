"""What to simulate: the typed form of a scenario file.

Names are those that users of vLLM and `vllm bench serve` type. Quantities are base units inside the program: bytes,
bytes per second, nanoseconds. `load.load` reads a file into these classes; `resolve.resolve` writes out the defaults.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from servetwin.scenario.experts import ExpertChoices
from servetwin.scenario.hardware import Network, Nic, Node, Topology
from servetwin.scenario.quantities import LARGEST, Bytes, Count, Duration, Fraction, Rate, Whole
from servetwin.scenario.routing import Routing
from servetwin.scenario.workload import (
    Arrivals,
    Empirical,
    ExponentialTime,
    FanOut,
    Fixed,
    Lengths,
    Lognormal,
    LognormalTime,
    Prefixes,
    RangeRatio,
    Section,
    SessionWorkload,
    SyntheticWorkload,
    Times,
    TraceWorkload,
    Uniform,
    UniformTime,
    Workload,
    Zipf,
    ZipfPopularity,
    wrong,
)

__all__ = [
    "Arrivals",
    "DeviceOverrides",
    "Empirical",
    "EngineOptions",
    "ExpertChoices",
    "ExponentialTime",
    "FanOut",
    "Fixed",
    "Lengths",
    "Link",
    "Lognormal",
    "LognormalTime",
    "Network",
    "Nic",
    "Node",
    "Parallelism",
    "Pool",
    "Prefixes",
    "RangeRatio",
    "Routing",
    "Scenario",
    "SessionWorkload",
    "Slo",
    "SyntheticWorkload",
    "Times",
    "Timing",
    "Topology",
    "TraceWorkload",
    "Uniform",
    "UniformTime",
    "Workload",
    "Zipf",
    "ZipfPopularity",
]


class EngineOptions(Section):
    """Options of one engine, named as in vLLM; None stands for the default, which `resolve` fills in."""

    version: str | None = Field(
        default=None, description="engine whose rules hold, such as vllm-0.33; default: the newest"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["fp8", "int8", "int4", "nvfp4", "mxfp4"] | None = Field(
        default=None, description="of the weights"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8"] = "auto"
    moe_backend: Literal["auto", "marlin", "triton"] = Field(
        default="auto", description="kernel of the experts; auto: what vLLM chose when the kernel tables were measured"
    )
    max_model_len: Count | None = Field(default=None, description="longest prompt + output, tokens")
    max_num_seqs: Count | None = Field(default=None, description="most requests in one step")
    max_num_batched_tokens: Count | None = Field(default=None, description="most tokens in one step")
    max_num_active_seqs: Count | None = Field(default=None, description="most running requests; default: max_num_seqs")
    block_size: Count | None = Field(default=None, description="tokens in one KV block")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    num_gpu_blocks_override: Count | None = Field(default=None, description="number of KV blocks, instead of what fits")
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    long_prefill_token_threshold: Whole | None = Field(
        default=None, description="most tokens of a chunk of a prompt; 0 = off"
    )
    long_prefill_token_threshold_adaptive: bool | None = None
    scheduling_policy: Literal["fcfs", "priority"] | None = None
    async_scheduling: bool | None = None
    watermark: Annotated[float, Field(ge=0, lt=1)] | None = Field(default=None, description="share of blocks kept free")
    scheduler_reserve_full_isl: bool | None = None
    prefill_schedule_interval: Count | None = Field(default=None, description="admit prefills every so many steps")
    num_speculative_tokens: Whole | None = None
    spec_acceptance_rate: Fraction | None = Field(default=None, description="chance that a drafted token is accepted")
    enforce_eager: bool | None = Field(default=None, description="true: no CUDA graphs")


class Parallelism(Section):
    """Degrees of parallelism of one replica, which takes tensor * pipeline * data devices. `context` ranks of each
    tensor group deal out the KV of every sequence (vLLM's --decode-context-parallel-size)."""

    tensor: Count = 1
    pipeline: Count = 1
    data: Count = 1
    expert: Count = 1
    context: Count = 1


class DeviceOverrides(Section):
    """Facts of the device that differ from the catalogue's."""

    memory_size: Bytes | None = None
    memory_bandwidth: Rate | None = None


class Link(Section):
    """A link between two devices: bytes/s in one direction, and ns before the first byte arrives."""

    bandwidth: Rate
    latency: Duration


class Pool(Section):
    """`replicas` equal engines that share a role."""

    name: str = Field(default="", description="default: pool0, pool1, …")
    role: Literal["unified", "prefill", "decode"] = "unified"
    replicas: Count = 1
    model: str | None = Field(default=None, description="the model it serves; default: the scenario's", min_length=1)
    device: str = Field(description="a device of the catalogue (servetwin list devices)")
    device_overrides: DeviceOverrides | None = None
    parallelism: Parallelism = Field(default_factory=Parallelism.model_construct)
    link: Link | None = Field(
        default=None, description="between the devices of a replica; default: the device's own scale-up link"
    )
    placement: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, description="devices of the nodes, replica after replica, such as node0:0-3", min_length=1
    )
    engine: EngineOptions = Field(default_factory=EngineOptions.model_construct)
    experts: ExpertChoices | None = Field(default=None, description="of a mixture of experts; default: as vLLM, even")


_LINEAR = ("base_ns", "per_prefill_token_ns", "per_decode_seq_ns", "per_context_token_ns")


class Timing(Section):
    """How a step is priced. `linear` needs base_ns >= 1, for a step of 0 ns would stop the clock."""

    source: Literal["auto", "profile", "silicon", "roofline", "linear"] = "auto"
    profile: str | None = Field(default=None, description="a measured profile (servetwin list profiles)", min_length=1)
    overlay: str | None = Field(
        default=None, description="folder or file of measurements that come first", min_length=1
    )
    strict_measured: bool = Field(default=False, description="refuse to price a step outside what was measured")
    base_ns: Annotated[int, Field(ge=1, le=LARGEST)] | None = Field(
        default=None, description="linear: time of any step"
    )
    per_prefill_token_ns: Whole | None = Field(default=None, description="linear: for each token of a prompt")
    per_decode_seq_ns: Whole | None = Field(default=None, description="linear: for each request that generates")
    per_context_token_ns: Whole | None = Field(
        default=None, description="linear: for each token computed before the step or scheduled in it"
    )

    @model_validator(mode="after")
    def _of_the_source(self) -> Timing:
        if self.source == "linear":
            if self.base_ns is None:
                raise wrong("base_ns", "missing: source 'linear' needs it", allowed="a whole number, at least 1")
            for name in ("profile", "overlay"):
                if getattr(self, name) is not None:
                    raise wrong(name, "does not go with source 'linear'", found=getattr(self, name))
            if self.strict_measured:
                raise wrong("strict_measured", "does not go with source 'linear', which measures nothing")
            return self
        for name in _LINEAR:
            if getattr(self, name) is not None:
                raise wrong(name, f"does not go with source {self.source!r}", allowed="with source: linear")
        if self.source == "roofline" and self.profile is not None:
            raise wrong("profile", "does not go with source 'roofline'", allowed="with source: profile or auto")
        return self


class Slo(Section):
    """What a request must meet to count as goodput, ns; what is left out is not asked."""

    ttft: Duration | None = Field(default=None, description="time to first token")
    tpot: Duration | None = Field(default=None, description="time per output token")
    e2el: Duration | None = Field(default=None, description="end-to-end latency")


class Scenario(Section):
    """Everything a run depends on; the same scenario gives the same tables, byte for byte."""

    name: str | None = None
    model: str = Field(
        min_length=1, description="a model of the catalogue, or the path of a Hugging Face config.json or its folder"
    )
    workload: Workload
    nodes: list[Node] | None = Field(
        default=None, description="the computers; default: as many as the pools need", min_length=1
    )
    network: Network | None = None
    pools: list[Pool] = Field(min_length=1)
    routing: Routing = Field(default_factory=Routing.model_construct)
    timing: Timing = Field(default_factory=Timing.model_construct)
    slo: Slo | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0

    @model_validator(mode="after")
    def _name_nodes(self) -> Scenario:
        for index, node in enumerate(self.nodes or ()):
            if not node.name:
                assert self.nodes is not None
                self.nodes[index] = node.model_copy(update={"name": f"node{index}"})
        names = [node.name for node in self.nodes or ()]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise wrong(f"nodes[{index}].name", "two nodes have the same name", found=name)
        return self

    @model_validator(mode="after")
    def _name_pools(self) -> Scenario:
        for index, pool in enumerate(self.pools):
            if not pool.name:
                self.pools[index] = pool.model_copy(update={"name": f"pool{index}"})
        names = [pool.name for pool in self.pools]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise wrong(f"pools[{index}].name", "two pools have the same name", found=name)
        return self
