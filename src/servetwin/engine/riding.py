"""Who of an engine's running requests rides: entry, exit, and their part in each batch (see `Riders`).

Requests ride in batches that are numbered, so the batches in flight are kept here too, with what became of those that
were processed: from these alone follows what the fields of a request that leaves would be had it not ridden.

In a pipeline of stages, batches of different requests take turns, as a request waits for its token before it goes on.
Each of them is a *lane*: to the requests in it, it is as if every batch was awaited before the next is scheduled.
"""

from __future__ import annotations

from array import array
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
        self.output_ns: array[int] | None = None
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
        self.width, self.growth = options.decode_width, options.decode_growth
        """tokens of a rider that a batch computes, and keeps"""
        self.last_rides = options.async_scheduling and self.width == 1
        """whether riders still ride in the batch of their last token"""
        self.riders = self._new_riders()

    def _new_riders(self) -> Riders:
        """Nobody rides yet. Where KV blocks have names, riders are listed by the contexts with which they must call on
        the cache."""
        options, ahead = self.options, self._ahead * self.width
        groups, calls = sum(window != "state" for window in options.windows), []
        slots = self.width + options.lookahead_tokens
        if not isinstance(self.kv, CountedKV):
            calls.append(1 - slots)  # a block to take
            if self.kv.caching:
                calls.append(ahead - 1)  # one to make findable (scheduling ahead, the last tokens are not known yet)
            # One that slides out of a window, once the tokens in flight are left out.
            calls += [window - 1 + ahead for window in self._windows]
        return Riders(options.block_size, groups, calls, self.growth, slots)

    def told_apart(self, kv: KVCache | FullKV) -> None:
        """KV blocks have names from now on; nobody rides."""
        self.kv = kv
        self.riders = self._new_riders()

    def resume(self, flying: Sequence[Batch], scheduled: int, processed: int, last_outputs_ns: int) -> None:
        """Go on from this state, in which nobody rides."""
        self.flying.extend(batch for batch in flying if batch.number)
        self.scheduled, self.processed, self.last_outputs_ns = scheduled, processed, last_outputs_ns

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
            if self.growth > 1:
                self.gaps.add(0, handing * (self.growth - 1))
        self.riders.handing = handing + batch.joined
        self.last_outputs_ns = now

    def count_processed(self, outputs_ns: Sequence[int]) -> None:
        """Account for such batches that have ended, with outputs handed out at `outputs_ns`."""
        self.processed += len(outputs_ns)
        if outputs_ns:
            self.gaps.add_all(self.last_outputs_ns, outputs_ns, self.riders.count)
            if self.growth > 1:
                self.gaps.add(0, self.riders.count * (self.growth - 1) * len(outputs_ns))
            self.last_outputs_ns = outputs_ns[-1]
        if self.output_ns is not None:
            self.output_ns.extend(outputs_ns)

    def join(self, request: Request, batch: Batch, drafts: int) -> None:
        """From the batch after this one on, in which it has `drafts`, `request` rides, if it goes on for long enough
        and as riders do."""
        options, width, growth, batches = self.options, self.width, self.growth, 1 + self._ahead
        left = space = options.max_model_len - request.prompt
        if request.max_tokens < left:
            left = request.max_tokens
        if request.stop_after is not None and request.stop_after < left:
            left = request.stop_after
        lost = width - growth
        if lost and (drafts < width - 1 or (self._ahead and request.placeholders != width * batches)):
            return  # the batches in flight do not all lose as many drafts
        coming = growth * batches if lost else request.placeholders or 1 + drafts
        left -= request.outputs + coming
        if left < 2 or request.stale:
            return
        if self._windows and request.in_flight != width * batches:  # its windows slide by other steps
            return
        last = batch.number - (-left // growth)
        if width > 1:  # no draft may go beyond the model's length
            space -= request.outputs + coming + width * batches + options.lookahead_tokens
            last = min(last, batch.number + 2 + space // growth)
            if last < batch.number + 2:
                return
        request.joined, request.rides_to, request.lane = batch.number, last, self.lane
        request.base = request.computed - lost - growth * batch.number
        batch.joined += 1
        self.riders.add(request)

    def leave(self, request: Request) -> None:
        """Bring the fields of a rider to what they would be had it not ridden, and list it in the batches in flight."""
        riders, joined, processed, width, growth = self.riders, request.joined, self.processed, self.width, self.growth
        riders.remove(request)
        done, flying = processed - joined, self.scheduled - processed
        if done < 0:  # the batch that it joined in is in flight itself, and lists it
            done, flying = 0, self.scheduled - joined
            self.flying[-1 - flying].joined -= 1
        else:
            riders.handing -= 1
        request.joined = 0
        request.computed += done * growth + flying * width
        request.outputs += done * growth
        request.known += done * growth
        request.in_flight += flying * width
        if self.options.async_scheduling:
            request.placeholders += flying * width
        elif flying:
            request.drafts = 0
        if done:
            request.last_token_ns = self.last_outputs_ns
            if request.token_ns is not None:
                assert self.output_ns is not None
                request.token_ns.add(self.output_ns, joined, processed, growth)
        if done or flying:
            self._settle(request, done > 0)
        request.quiet = 0  # ask the cache
        for i in range(1, flying + 1):
            self.flying[-i].insert(request, width)
            self.flying[-i].riders -= 1
        plain, order = self.plain, request.order
        at = len(plain)
        while at and plain[at - 1].order > order:
            at -= 1
        plain.insert(at, request)

    def _settle(self, request: Request, processed: bool) -> None:
        """Leave the KV cache as the steps would have in which `request` rode, some of them `processed`."""
        options, kv = self.options, self.kv
        before = request.base + self.growth * (self.scheduled - 1)
        certain = before + 1 - self.width * self._ahead  # when the last of them was scheduled
        if processed and (options.async_scheduling or (self.width > 1 and options.commits_drafts_at_output)):
            certain = max(certain, request.computed - request.in_flight)
        if isinstance(kv, CountedKV):
            kv.settle(request.row, before + self.riders.slots, certain)
        elif self.width > 1 and request.chain is not None:
            kv.commit(request.row, certain, request.chain)

    def dissolve(self) -> None:
        """Nobody rides any more, until the next batch is scheduled."""
        if self.riders.count:
            for request in self.running:
                if request.joined and request.lane == self.lane:
                    self.leave(request)

    def ride(self, batch: Batch, budget: int) -> int:
        """Give the riders their tokens in a new batch; what is left of the budget.

        Those whose last token is in flight leave first (whatever else the rules have for them, they get no other). All
        leave where the order of the running requests could matter: when the budget or the blocks may not suffice. With
        the blocks those of the other lanes leave too, as any of them may have to give way.
        """
        riders, number = self.riders, self.scheduled + 1
        # Waiting for every step, the last token is not yet in flight: the step is this one.
        last = number - 1 if self.last_rides else number
        if last in riders.leaving:
            for request in list(riders.leaving[last]):
                self.leave(request)
        if (self._windows or self.width > 1) and number - 1 - self.processed != self._ahead:
            self.dissolve()
            return budget
        if self._windows and self.plain and self.plain[0] is not self.running[-len(self.plain)]:
            # Which blocks are given back before others are taken can matter to what stays findable.
            for request in riders.calling(number):
                self.leave(request)
        plain, count, needed, wanted = self.plain, riders.count, riders.blocks(number), 0
        tokens = count * self.width
        if plain:
            wanted = sum(request.known + request.drafts + request.placeholders - request.computed for request in plain)
            if wanted > 0:
                slots = min(wanted, budget) + self.options.lookahead_tokens * len(plain)
                needed += riders.groups * (slots // riders.size + len(plain))
        if needed > self.kv.pool.free:
            for lane in self.lanes:
                lane.dissolve()
            return budget
        if tokens > budget or (wanted > budget - tokens and plain[0] is not self.running[-len(plain)]):
            self.dissolve()
            return budget
        if not count:
            return budget
        self.take_blocks(number)
        batch.riders, batch.contexts, batch.width = count, riders.contexts(number), self.width
        if self.keeps_entries:
            batch.riding = self.requests()
            batch.gone = self.growth * (number - 1)
        return budget - tokens

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
        calling, before, ahead = riders.calling(number), self.growth * (number - 1), self._ahead * self.width
        width, lookahead = self.width, self.options.lookahead_tokens
        if isinstance(kv, FullKV):
            for request in calling:
                computed = request.base + before
                kv.extend(request.row, computed + width + lookahead, computed + 1 - ahead, request.chain)
            return
        if self._windows:
            calling.sort(key=_running_order)
        for request in calling:
            computed = request.base + before
            kv.allocate(
                request.row,
                computed=computed,
                new=width,
                known=computed + 1 - ahead,  # scheduling ahead, the last tokens are not known yet
                chain=request.chain,
                in_flight=ahead,
                lookahead=lookahead,
            )


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
