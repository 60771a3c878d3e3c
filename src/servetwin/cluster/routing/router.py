"""The router of a cluster: for each model a policy of its own, over the engines that serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index

from servetwin.cluster.routing.candidates import Candidates, Chains
from servetwin.cluster.routing.policies import Policy
from servetwin.engine.engine import Engine
from servetwin.engine.request import Request
from servetwin.errors import InputError

NewPolicy = Callable[[str], Policy]
"""A new object of the scenario's policy, for a model."""


@dataclass(frozen=True)
class Limits:
    """How many requests are let in, and how long they may wait; None = no limit."""

    max_waiting: int | None = None
    """requests that wait in one engine, those on their way included"""
    max_in_flight: int | None = None
    """requests in all engines together"""
    rejects: bool = False
    """beyond `max_in_flight`: whether requests are refused, or wait in the router, first come, first served"""
    queue_timeout: int | None = None
    """ns from a request's arrival to the first step that works on it"""


class Router:
    """Sends requests to engines. `connect` has to be called once, when the engines are there."""

    def __init__(self, name: str, new_policy: NewPolicy, refresh: int = 0, limits: Limits | None = None) -> None:
        """`name`: of the policy, for errors; `refresh`: see `Candidates`."""
        self.limits = limits or Limits()
        self.in_flight = 0
        self._name, self._new_policy, self.refresh = name, new_policy, refresh
        self._served: dict[str, tuple[Policy, Candidates]] = {}
        self._place: list[tuple[Candidates, int]] = []
        """the column and position of each engine"""

    def connect(self, engines: Sequence[Engine], models: Sequence[str], chains: Chains) -> None:
        """The engines, by number, and the model that each one serves."""
        for model in dict.fromkeys(models):
            group = [engine for engine, served in zip(engines, models, strict=True) if served == model]
            self._served[model] = self._new_policy(model), Candidates(group, self.refresh, chains)
        places = {
            engine.number: (candidates, position)
            for _, candidates in self._served.values()
            for position, engine in enumerate(candidates.engines)
        }
        self._place = [places[engine.number] for engine in engines]

    @property
    def policies(self) -> list[Policy]:
        """One for each model."""
        return [policy for policy, _ in self._served.values()]

    def serves(self, model: str) -> bool:
        return model in self._served

    @property
    def full(self) -> bool:
        return self.limits.max_in_flight is not None and self.in_flight >= self.limits.max_in_flight

    def choose(self, request: Request, model: str, now: int, woken: int = -1) -> Engine:
        """The engine for `request`, among those that serve `model` (there is one).

        Engines up to number `woken` have been woken at `now` already, the others have not.

        Raises:
            InputError: a policy of the user's own chose none of them.
        """
        policy, candidates = self._served[model]
        candidates.at(now, woken)
        chosen = policy.choose(request, candidates, now)
        try:
            position = index(chosen)
        except TypeError:
            position = -1
        if not 0 <= position < len(candidates):
            message, allowed = f"policy {self._name!r} chose no engine", f"a position from 0 to {len(candidates) - 1}"
            raise InputError(message, field="routing.policy", found=repr(chosen), allowed=allowed)
        return candidates.engines[position]

    def refusal(self, engine: Engine) -> str:
        """Why `engine` would not take one more request now; empty when it would."""
        most = self.limits.max_waiting
        if most is None:
            return ""
        candidates, position = self._place[engine.number]
        waiting = int(candidates.in_flight[position]) - len(engine.scheduler.running)
        if waiting < most:
            return ""
        return f"rejected: {waiting} requests wait in its engine, max_waiting is {most}"

    def touch(self, engine: int, now: int) -> None:
        """An engine is about to run."""
        candidates, position = self._place[engine]
        candidates.touch(position, now)

    def sent(self, engine: int, now: int) -> None:
        """A request was sent to an engine."""
        candidates, position = self._place[engine]
        candidates.sent(position, now)
        self.in_flight += 1

    def ended(self, engine: int) -> None:
        """A request that was sent to an engine has ended."""
        candidates, position = self._place[engine]
        candidates.ended(position)
        self.in_flight -= 1

    def boundary(self, now: int, chosen_at: int | None) -> int | None:
        """The next moment after `now` that the stale signals may show; None when there is none.

        `chosen_at`: when the next choice is made; None: any time from now on.
        """
        if not self.refresh:
            return None
        if chosen_at is None:
            return now - now % self.refresh + self.refresh
        shown = chosen_at - chosen_at % self.refresh
        return shown if shown > now else None
