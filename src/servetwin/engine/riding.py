"""Who of an engine's running requests rides: entry, exit, and their part in each batch (see `Riders`).

Requests ride in batches that are numbered, so the batches in flight are kept here too, with what became of those that
were processed: from these alone follows what the fields of a request that leaves would be had it not ridden.

In a pipeline of stages, batches of different requests take turns, as a request waits for its token before it goes on.
Each of them is a *lane*: to the requests in it, it is as if every batch was awaited before the next is scheduled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from servetwin.engine.batch import Batch
from servetwin.engine.gaps import Gaps
from servetwin.engine.options import SchedulerOptions
from servetwin.engine.request import Request
from servetwin.engine.riders import Riders
from servetwin.memory.counted import CountedKV
from servetwin.memory.full import FullKV
from servetwin.memory.kv import KVCache


class Riding:
    """The running requests of a scheduler in two parts, those that ride and `plain` ones; the batches in flight.

    Of one lane: riders, batches and their numbers are its own; `plain`, `gaps` and `lanes` are those of all lanes.
    """

    def __init__(
        self,
        options: SchedulerOptions,
        kv: KVCache | FullKV | CountedKV,
        running: list[Request],
        plain: list[Request],
        gaps: Gaps,
        lanes: list[Riding],
    ) -> None:
        """Becomes the last of `lanes`. `running`: all running requests, which the scheduler goes on changing."""
        self.options, self.kv, self.running = options, kv, running
        self.lanes, self.lane = lanes, len(lanes)
        lanes.append(self)
        self.plain = plain
        """running requests that do not ride, in running order"""
        self.keeps_entries = False
        """whether batches say who rides in them"""
        self.output_ns: list[int] | None = None
        """when the outputs of each processed batch were handed out, where requests keep the times of their tokens"""
        self.gaps = gaps
        self.scheduled = self.processed = 0
        """batches"""
        self.flying: deque[Batch] = deque()
        """batches that were scheduled with something to run, and not processed yet"""
        self.last_outputs_ns = 0
        self._windows = tuple(window for window in options.windows if isinstance(window, int))
        self._ahead = options.max_batches - 1 if options.async_scheduling else 0
        """batches in flight whenever one is scheduled behind another"""
        self.riders = self._new_riders()

    def _new_riders(self) -> Riders:
        """Nobody rides yet. Where KV blocks have names, riders are listed by the contexts with which they must call on
        the cache."""
        options, size, ahead = self.options, self.options.block_size, self._ahead
        groups, calls = sum(window != "state" for window in options.windows), []
        if not isinstance(self.kv, CountedKV):
            calls.append(0)  # a block to take
            if self.kv.caching and not options.async_scheduling:
                calls.append(size - 1)  # one to make findable (scheduling ahead, its last token is not known yet)
            # One that slides out of a window, once the tokens in flight are left out.
            calls += [window - 1 + ahead for window in self._windows]
        return Riders(size, groups, calls)

    def told_apart(self, kv: KVCache | FullKV) -> None:
        """KV blocks have names from now on; nobody rides."""
        self.kv = kv
        self.riders = self._new_riders()

    def launch(self, batch: Batch) -> None:
        """A batch with something to run was scheduled."""
        self.scheduled += 1
        batch.number, batch.lane = self.scheduled, self.lane
        self.flying.append(batch)

    def land(self, batch: Batch, now: int) -> None:
        """The oldest batch in flight has ended: the riders get their tokens."""
        self.processed += 1
        self.flying.popleft()
        if self.output_ns is not None:
            self.output_ns.append(now)
        handing = self.riders.handing
        if handing:
            self.gaps.add(now - self.last_outputs_ns, handing)
        self.riders.handing = handing + batch.joined
        self.last_outputs_ns = now

    def count_processed(self, outputs_ns: Sequence[int]) -> None:
        """Account for such batches that have ended, with outputs handed out at `outputs_ns`."""
        self.processed += len(outputs_ns)
        if outputs_ns:
            self.gaps.add_all(self.last_outputs_ns, outputs_ns, self.riders.count)
            self.last_outputs_ns = outputs_ns[-1]
        if self.output_ns is not None:
            self.output_ns += outputs_ns

    def join(self, request: Request, batch: Batch) -> None:
        """From the batch after this one on `request` rides, if it goes on for long enough."""
        left = min(request.max_tokens, self.options.max_model_len - request.prompt)
        if request.stop_after is not None and request.stop_after < left:
            left = request.stop_after
        left -= request.outputs + (request.placeholders or 1)
        if left < 2 or request.stale:
            return
        if self._windows and request.in_flight != 1 + self._ahead:  # its windows slide by more than a token
            return
        request.joined, request.rides_to, request.lane = batch.number, batch.number + left, self.lane
        batch.joined += 1
        self.riders.add(request)

    def leave(self, request: Request) -> None:
        """Bring the fields of a rider to what they would be had it not ridden, and list it in the batches in flight."""
        riders, joined, processed = self.riders, request.joined, self.processed
        riders.remove(request)
        done, flying = processed - joined, self.scheduled - processed
        if done < 0:  # the batch that it joined in is in flight itself, and lists it
            done, flying = 0, self.scheduled - joined
            self.flying[-1 - flying].joined -= 1
        else:
            riders.handing -= 1
        request.joined = 0
        request.computed += done + flying
        request.outputs += done
        request.known += done
        request.in_flight += flying
        if self.options.async_scheduling:
            request.placeholders += flying
        if done:
            request.last_token_ns = self.last_outputs_ns
            if request.token_ns is not None:
                assert self.output_ns is not None
                request.token_ns += self.output_ns[joined:processed]
        if isinstance(self.kv, CountedKV):
            # Scheduling ahead, a token counts as known when the step after its own is scheduled.
            late = 1 if flying and self.options.async_scheduling else 0
            self.kv.settle(request.row, request.computed, request.computed - late if done or flying else 0)
        request.quiet = 0  # ask the cache
        for i in range(1, flying + 1):
            self.flying[-i].insert(request)
            self.flying[-i].riders -= 1
        plain, order = self.plain, request.order
        at = len(plain)
        while at and plain[at - 1].order > order:
            at -= 1
        plain.insert(at, request)

    def dissolve(self) -> None:
        """Nobody rides any more, until the next batch is scheduled."""
        if self.riders.count:
            for request in self.running:
                if request.joined and request.lane == self.lane:
                    self.leave(request)

    def ride(self, batch: Batch, budget: int) -> int:
        """Give the riders their tokens in a new batch; what is left of the budget.

        Those whose last token is in flight leave first (whatever else the rules have for them, they get no other). All
        leave where the order of the running requests could matter: when the budget or the blocks may not suffice.
        """
        riders, number = self.riders, self.scheduled + 1
        # Waiting for every step, the last token is not yet in flight: the step is this one.
        last = number - 1 if self.options.async_scheduling else number
        if last in riders.leaving:
            for request in list(riders.leaving[last]):
                self.leave(request)
        if self._windows and number - 1 - self.processed != self._ahead:
            self.dissolve()
            return budget
        if self._windows and self.plain and self.plain[0] is not self.running[-len(self.plain)]:
            # Which blocks are given back before others are taken can matter to what stays findable.
            for request in riders.calling(number):
                self.leave(request)
        count, needed = riders.count, riders.blocks(number)
        if self.plain:
            wanted = sum(request.known + request.placeholders - request.computed for request in self.plain)
            if count and wanted > budget - count and self.plain[0] is not self.running[-len(self.plain)]:
                self.dissolve()
                return budget
            if wanted > 0:
                needed += riders.groups * (min(wanted, budget) // self.options.block_size + len(self.plain))
        if needed > self.kv.pool.free:
            for lane in self.lanes:
                lane.dissolve()
            return budget
        if count > budget:
            self.dissolve()
            return budget
        if not count:
            return budget
        self.take_blocks(number)
        batch.riders, batch.contexts = count, riders.contexts(number)
        if self.keeps_entries:
            batch.riding = self.requests()
        return budget - count

    def requests(self) -> list[Request]:
        """Who rides, in running order."""
        return [request for request in self.running if request.joined and request.lane == self.lane]

    def take_blocks(self, number: int) -> None:
        """Give the riders the blocks that they need in batch `number`, take back those that they no longer need, and
        make findable those that they fill."""
        riders, kv = self.riders, self.kv
        if isinstance(kv, CountedKV):
            kv.pool.free -= riders.blocks(number)
            return
        calling, before, ahead = riders.calling(number), number - 1, self._ahead
        if self._windows:
            calling.sort(key=_running_order)
        for request in calling:
            computed = request.computed + before - request.joined
            # Scheduling ahead, the last token is not known yet.
            known = computed + 1 - ahead
            kv.allocate(request.row, computed=computed, new=1, known=known, chain=request.chain, in_flight=ahead)


def new_lanes(
    options: SchedulerOptions, kv: KVCache | FullKV | CountedKV, running: list[Request], rides: bool
) -> list[Riding]:
    """The lanes of a scheduler; one, in which nobody is to ride, where not `rides`."""
    lanes: list[Riding] = []
    plain, gaps = [] if rides else running, Gaps()
    for _ in range(options.pipeline if rides else 1):
        Riding(options, kv, running, plain, gaps, lanes)
    return lanes


def _running_order(request: Request) -> int:
    return request.order
