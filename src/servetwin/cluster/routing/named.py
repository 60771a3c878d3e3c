"""The policy that a scenario names."""

from __future__ import annotations

from importlib.metadata import entry_points

import numpy as np

from servetwin.cluster.routing.policies import (
    ConsistentHash,
    JoinShortestQueue,
    LeastKVUsage,
    LeastLoaded,
    LLMServingSimLoad,
    Policy,
    PowerOfTwo,
    Random,
    RoundRobin,
    SessionAffinity,
    VllmDataParallel,
)
from servetwin.cluster.routing.prefix import PrefixAware
from servetwin.cluster.routing.weighted import Weighted
from servetwin.errors import InputError
from servetwin.scenario.routing import ENTRY_POINTS, Routing

_PLAIN: dict[str, type[Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "join_shortest_queue": JoinShortestQueue,
    "least_kv_usage": LeastKVUsage,
    "llmservingsim_load": LLMServingSimLoad,
    "vllm_dp": VllmDataParallel,
    "consistent_hash": ConsistentHash,
}


def new_policy(routing: Routing, stream: np.random.Generator) -> Policy:
    """A new object of the policy of a resolved scenario, which draws from `stream` if it is a random one.

    Raises:
        InputError: a policy of another package cannot be loaded.
    """
    match routing.policy:
        case "session_affinity":
            return SessionAffinity(_simple(routing.fallback or "least_loaded", stream))
        case "prefix_aware":
            weight = 1.0 if routing.overlap_weight is None else routing.overlap_weight
            return PrefixAware(weight, routing.prefix_index or "exact")
        case "weighted":
            assert routing.scorers is not None
            return Weighted(routing.scorers.weights, routing.prefix_index or "exact")
        case name:
            return _simple(name, stream)


def _simple(name: str, stream: np.random.Generator) -> Policy:
    match name:
        case "random":
            return Random(stream)
        case "power_of_two":
            return PowerOfTwo(stream)
    return _PLAIN[name]() if name in _PLAIN else _loaded(name)


def _loaded(name: str) -> Policy:
    """An object of the class that another package registers as `name`."""

    def wrong(message: str, found: object) -> InputError:
        allowed = "a class whose objects have choose(request, candidates, now), and that needs no arguments"
        return InputError(message, field="routing.policy", found=found, allowed=allowed)

    point = next((point for point in entry_points(group=ENTRY_POINTS) if point.name == name), None)
    if point is None:
        raise wrong(f"no installed package registers this policy under {ENTRY_POINTS}", name)
    try:
        policy: Policy = point.load()()
    except Exception as error:  # whatever a stranger's module raises
        raise wrong(f"the policy {name!r} cannot be loaded ({type(error).__name__}: {error})", point.value) from error
    if not callable(getattr(policy, "choose", None)):
        raise wrong(f"the policy {name!r} has no method choose", point.value)
    return policy
