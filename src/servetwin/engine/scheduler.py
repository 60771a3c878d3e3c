"""Which requests run in the next step: vLLM's V1 scheduler.

There is no prefill or decode phase. Every request has tokens that are known and tokens that are computed, and a step
gives each, within one budget, as many tokens as it needs to catch up: running requests first, in the order in which
they were admitted, then waiting ones. When the KV cache is full, running requests are preempted and recomputed later.

Invariants (numbered; tested as properties in tests/engine):
  S1  tokens of a step <= max_num_batched_tokens; running requests <= max_num_seqs;
  S2  a request is in exactly one of: running, waiting, holding (waiting with blocks), finished;
  S3  computed <= known + placeholders, at the end of every schedule();
  S4  nobody is admitted in a step that preempted somebody;
  S5  a request ends exactly once.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable

from servetwin.engine.batch import Batch
from servetwin.engine.options import SchedulerOptions
from servetwin.engine.queues import ByPriority, Fcfs, WaitingQueue
from servetwin.engine.request import Request, Status
from servetwin.engine.riding import Riding, new_lanes
from servetwin.engine.transfer import KVConnector
from servetwin.memory.counted import CountedKV
from servetwin.memory.full import FullKV
from servetwin.memory.kv import KVCache

CIRCLES = 3
"""How often requests may give way to each other in the same state before that counts as for ever."""

AcceptedDrafts = Callable[[Request, int], int]
"""How many of so many draft tokens of a request the model accepts."""


class Scheduler:
    """State is three containers: `running`, `waiting`, and `holding` (waiting requests that own KV blocks)."""

    def __init__(
        self,
        options: SchedulerOptions,
        kv: KVCache | FullKV | CountedKV,
        connector: KVConnector | None = None,
        accepted: AcceptedDrafts | None = None,
        rides: bool = False,
    ) -> None:
        """`rides`: requests that only decode may ride (same results, less work; see `Riders`)."""
        self.options, self.kv, self.connector, self.accepted = options, kv, connector, accepted
        new_queue = ByPriority if options.priority else Fcfs
        self.running: list[Request] = []
        drawn = options.speculative_tokens and options.accepted_drafts is None
        cut = 0 < options.long_prefill_token_threshold < options.decode_width
        overlaps = options.pipeline > 1 and (options.async_scheduling or options.speculative_tokens)
        self.rides = rides and not (drawn or cut or overlaps)
        """whether any request may ride: where all steps of its decode are alike, one for each of its outputs"""
        self.lanes = new_lanes(options, kv, self.running, self.rides)
        self.riding = self.lanes[0]
        """the lane of the batch that is scheduled next, or was last"""
        self._turns = len(self.lanes) > 1
        self.waiting: WaitingQueue = new_queue()
        self.holding: WaitingQueue = new_queue()
        self.pinned: set[Request] = set()
        """ended requests whose blocks a copy still reads or writes"""
        self.holds_prefills: bool | None = None
        """whether prefills wait in the next step; None: the scheduler counts its own steps since the last prefill"""
        self.prefix_queries = self.prefix_hits = 0
        self.preemptions = 0
        self.max_active = min(options.max_num_active_seqs or options.max_num_seqs, options.max_num_seqs)
        self.watermark = int(options.watermark * (options.usable_blocks + 1))
        self._partial: dict[Request, None] = {}
        """requests that hold blocks for part of a prompt or for a load: they will need more"""
        self._deferred: set[Request] = set()
        """waiting requests that were passed over because of their own state, not for want of room"""
        self.hopeless: dict[Request, str] = {}
        """requests that would give way for ever, and why: to themselves with the whole cache free, getting no further
        than the time before; or to each other in turn"""
        self._progress = self._circling_at = 0
        """batches that gave an output to somebody, but for those of riders alone"""
        self._circles: Counter[tuple[tuple[int, int], ...]] = Counter()
        """how often a request has given way in each state since then, as far as that is being counted"""
        self._unflushed = False
        """a request has ended since the last schedule(): the workers must still be told"""
        # With several batches in flight a copy into a freed block could overtake a step that still writes it.
        self._defer_frees = options.kv_consumer and options.max_batches > 1
        self._deferred_frees: deque[tuple[int, list[int]]] = deque()
        self._admissions = 0
        self._executed_steps = 0
        self._last_prefill_step = -options.prefill_schedule_interval
        self._capacity_bound = False

    # What the engine asks ------------------------------------------------------------------------------------------

    @property
    def waiting_count(self) -> int:
        return len(self.waiting) + len(self.holding)

    @property
    def unfinished(self) -> int:
        return len(self.running) + self.waiting_count

    @property
    def has_work(self) -> bool:
        """Whether a schedule() call is due, if only to tell the workers which requests have ended."""
        return bool(self.running) or self.waiting_count > 0 or self._unflushed or bool(self.pinned)

    def add(self, request: Request) -> None:
        if request.token_ns is not None and self.riding.output_ns is None:
            for lane in self.lanes:
                lane.output_ns = array("q", [0]) * lane.processed
        self.waiting.push(request)

    def resume(self, running: list[Request], waiting: list[Request], unflushed: bool) -> None:
        """Go on from this state, which an idle scheduler takes over; `unflushed`: somebody has ended last."""
        for request in running:
            self._admissions += 1
            request.order = self._admissions
            request.quiet = self._quiet(request)
            if request.prefilling:
                self._partial[request] = None
        self.running += running
        if self.rides:
            self.riding.plain += running
        for request in waiting:
            self.waiting.push(request)
        self._executed_steps, self._unflushed = self.riding.scheduled, unflushed

    def abort(self, request: Request, now: int) -> None:
        """End a request because its client went away."""
        if not request.finished:
            self._end_early(request, Status.ABORTED, "aborted by the client", now)

    def fail_hopeless(self, now: int) -> list[Request]:
        """End the `hopeless` requests."""
        ended, self.hopeless = self.hopeless, {}
        for request, why in ended.items():
            self.fail(request, f"the engine's {self.options.usable_blocks} KV blocks do not hold it{why}", now)
        return list(ended)

    def fail(self, request: Request, reason: str, now: int) -> None:
        """End a request that can never be served."""
        if not request.finished:
            self._end_early(request, Status.FAILED, reason, now)

    @property
    def copying(self) -> bool:
        """Whether a copy is under way, or blocks wait for a step to end."""
        return bool(self._deferred_frees) or (self.connector is not None and self.connector.next_end_ns is not None)

    @property
    def loading(self) -> list[Request]:
        """Waiting requests that own blocks which a copy fills or has filled."""
        return [request for request in self._partial if request.status == Status.LOADING]

    def unservable(self) -> tuple[Request, str] | None:
        """When nothing runs: the request at the head of the queue, and why it can never be admitted, if so."""
        if self.running or not len(self.waiting) or len(self.holding) or self.pinned:
            return None
        if any(request.stale for request in self._deferred):  # its outputs are on their way
            return None
        request, options = self.waiting.peek(), self.options
        if not options.enable_chunked_prefill and request.known > options.max_num_batched_tokens:
            return request, (
                f"its {request.known} tokens exceed max_num_batched_tokens {options.max_num_batched_tokens} "
                "and chunked prefill is off"
            )
        needed = self.kv.blocks_needed(request.row, request.known, 0, self.kv.miss, admission=True)
        if needed <= options.usable_blocks and self.kv.pool.used:
            return None
        return request, f"it needs {needed} KV blocks and the engine has {options.usable_blocks}"

    def _end_early(self, request: Request, status: Status, reason: str, now: int) -> None:
        if request.status == Status.RUNNING:
            if request.joined:
                self.lanes[request.lane].leave(request)
            self._stop_running(request)
        else:
            self._remove_waiting({request})
        copying = request.status == Status.LOADING and not request.loaded
        request.reason, request.finish_ns = reason, now
        self._end(request, status, pin=copying)

    # One step ------------------------------------------------------------------------------------------------------

    def schedule(self, now: int) -> Batch:
        """The next batch (perhaps empty). Computed tokens advance here, so that the next chunk can follow at once."""
        batch = Batch(now)
        budget = self.options.max_num_batched_tokens
        if self.take_turn() if self._turns else self.riding.riders.count:
            budget = self.riding.ride(batch, budget)
            if not (self.riding.plain or len(self.waiting) or len(self.holding)):
                self._schedule_riders(batch)
                return batch
        threshold = self._prefill_threshold()
        hold_prefills = self._holds_prefills()
        if self.riding.plain:
            budget = self._continue_running(batch, budget, threshold, hold_prefills)
        # Only these two rules ask whether a running request was still at its prompt.
        asked = self.options.speculative_tokens or self.options.prefill_schedule_interval > 1
        prefilled = bool(asked) and any(request.prefilling for request in batch.requests)
        continued = len(batch.requests)
        if not batch.preempted and budget > 0 and self.waiting_count:
            self._admit(batch, budget, threshold, hold_prefills, prefilled)
        if not batch.preempted and not hold_prefills:
            self._capacity_bound = self.waiting_count > len(self._deferred)
        if batch.requests or batch.riders:
            self._executed_steps += 1
            if self.options.prefill_schedule_interval > 1:
                admitted = range(continued, len(batch.requests))
                if prefilled or any(batch.before[i] < batch.requests[i].known - 1 for i in admitted):
                    self._last_prefill_step = self._executed_steps
            self.riding.launch(batch)
            if batch.requests:
                self._advance(batch)
        batch.running, batch.waiting, batch.free = len(self.running), self.waiting_count, self.kv.pool.free
        self._unflushed = False
        return batch

    def turns_to_riders(self) -> bool:
        """Choose the lane of the next batch, where there are several: whether somebody rides in it, and nobody runs who
        does not ride."""
        if self._turns:
            self.take_turn()
        riding = self.riding
        return riding.riders.count > 0 and not riding.plain

    def take_turn(self) -> bool:
        """Choose the lane of the batch to be scheduled: one that has none in flight. Whether anybody rides, in any."""
        anybody, chosen = 0, None
        for lane in self.lanes:
            count = lane.riders.count
            anybody += count
            if lane.flying:
                continue
            if chosen is None or (count and not chosen.riders.count):
                chosen = lane
            elif count:  # they would all be in the same batch
                lane.dissolve()
        assert chosen is not None
        self.riding = chosen
        return anybody > 0

    def _schedule_riders(self, batch: Batch) -> None:
        """The rest of `schedule` where there is nobody but riders, in this lane or another one."""
        self._capacity_bound = False
        if batch.riders:
            self._executed_steps += 1
            self.riding.launch(batch)
        batch.running, batch.free = len(self.running), self.kv.pool.free
        self._unflushed = False

    def _prefill_threshold(self) -> int:
        """Most tokens that one request may take in this step; 0 = no limit. Nobody is starved by a lone request."""
        options = self.options
        if not options.long_prefill_token_threshold:
            return 0
        others = self.unfinished
        if others <= 1 and options.lone_prefill_unlimited:
            return 0
        if options.long_prefill_token_threshold_adaptive:
            return max(options.long_prefill_token_threshold, options.max_num_batched_tokens // max(1, others))
        return options.long_prefill_token_threshold

    def _holds_prefills(self) -> bool:
        """With a prefill interval, decodes run alone until so many steps have passed since the last prefill."""
        interval, holds = self.options.prefill_schedule_interval, self.holds_prefills
        if holds is None:
            holds = interval > 1 and self._executed_steps + 1 - self._last_prefill_step < interval
        return holds and not self._capacity_bound and any(not request.prefilling for request in self.running)

    def _continue_running(self, batch: Batch, budget: int, threshold: int, hold_prefills: bool) -> int:
        running, longest = self.riding.plain, self.options.max_model_len - 1
        add = batch.add
        i = 0
        while i < len(running) and budget > 0:
            request = running[i]
            computed, placeholders = request.computed, request.placeholders
            if placeholders and computed + 2 - placeholders >= request.prompt + request.max_tokens:
                i += 1  # a step in flight is sure to produce its last token
                continue
            if hold_prefills and request.prefilling:
                i += 1
                continue
            tokens = request.known + request.drafts + placeholders - computed
            if 0 < threshold < tokens:
                tokens = threshold
            if tokens > budget:
                tokens = budget
            if computed + tokens > longest:
                tokens = longest - computed
            if tokens <= 0:
                i += 1  # all of it is in flight already
                continue
            if computed + tokens > request.quiet:
                room, i, budget = self._make_room(batch, request, tokens, i, budget)
                if not room:
                    if request.status == Status.PREEMPTED and self._tries_on_after_self_preemption:
                        continue
                    break
            drafts = 0
            if request.drafts:
                drafts = max(0, min(request.drafts, tokens + computed - request.known - placeholders))
                request.drafts = 0
            add(request, tokens, computed, drafts)
            budget -= tokens
            i += 1
        return budget

    @property
    def _tries_on_after_self_preemption(self) -> bool:
        return self.options.priority and self.options.priority_self_preemption_continues

    def _make_room(self, batch: Batch, request: Request, tokens: int, i: int, budget: int) -> tuple[bool, int, int]:
        """Allocate slots for running request `i`, preempting others (or itself) as long as that helps.

        Returns whether it has its slots, its index (which moves when an earlier one goes) and the budget (which grows
        when a preempted request had been given tokens in this step).
        """
        running = self.running
        while not self._extend(request, tokens):
            victim = max(running, key=lambda r: (r.priority, r.arrival_ns)) if self.options.priority else running[-1]
            if not self._frees_at_once(victim):
                return False, i, budget
            place = running.index(victim) if self.options.priority else len(running) - 1
            del running[place]
            if self.rides:
                del self.riding.plain[place]  # nobody rides: both lists are the same
            if place < i:
                i -= 1
            if self.options.priority:
                budget += batch.withdraw(victim)
            reached = victim.computed
            if self._in_circles(victim):
                self.hopeless[victim] = " and others: they give way to each other for ever"
            self._preempt(victim)
            batch.preempted.append(victim)
            if victim is request:
                if not self.kv.pool.used:  # it had the whole cache to itself
                    if reached <= request.farthest:
                        self.hopeless[request] = ", though it had all of them"
                    request.farthest = max(request.farthest, reached)
                return False, i, budget
        return True, i, budget

    def _in_circles(self, victim: Request) -> bool:
        """Whether `victim` has given way to the same requests, all as far as they are now, for several times, and
        nobody had an output in between: without one they do so again."""
        if self._progress != self._circling_at:
            self._circling_at = self._progress
            self._circles.clear()
        state = tuple((request.row, request.computed) for request in (victim, *self.running))
        self._circles[state] += 1
        return self._circles[state] > CIRCLES

    def _quiet(self, request: Request) -> int:
        """Slots for drafts run ahead of what may be cached: with them the cache is asked in every step."""
        return 0 if self.options.speculative_tokens else self.kv.quiet_tokens(request.row)

    def count_scheduled(self, batches: int, lane: Riding | None = None) -> None:
        """Account for so many batches that nobody but the riders of `lane` (None: the only one) takes part in."""
        self._executed_steps += batches
        (lane or self.riding).scheduled += batches
        due = self._executed_steps - self._last_prefill_step >= self.options.prefill_schedule_interval
        self._capacity_bound = self.waiting_count > len(self._deferred) and (self._capacity_bound or due)

    def _extend(self, request: Request, tokens: int) -> bool:
        done = self.kv.allocate(
            request.row,
            computed=request.computed,
            new=tokens,
            known=request.known,
            prompt=request.prompt,
            chain=request.chain,
            in_flight=request.in_flight,
            lookahead=self.options.lookahead_tokens,
        )
        if done:
            request.quiet = self._quiet(request)
        return done

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue, all KV lost. Outputs in flight still count when they arrive."""
        if isinstance(self.kv, CountedKV) and self.kv.caching:
            # It may find its own blocks again. Nobody rides in a step that preempts.
            self.kv = self.kv.told_apart()
            for lane in self.lanes:
                lane.told_apart(self.kv)
        self._free(request)
        self._partial.pop(request, None)
        request.status = Status.PREEMPTED
        request.computed = request.quiet = request.drafts = 0
        # A prefill engine must not hand out a token whose KV is gone.
        request.drop_stale = self.options.kv_producer or (request.drop_stale and request.stale > 0)
        request.stale = request.in_flight
        request.placeholders = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.push_front([request])

    def _admit(self, batch: Batch, budget: int, threshold: int, hold_prefills: bool, prefilled: bool) -> None:
        options, kv = self.options, self.kv
        continued = len(batch) > 0
        passed_over: dict[bool, list[Request]] = {False: [], True: []}
        # Most of those who come to the head of the queue wait there for many steps.
        asks_again = isinstance(kv, FullKV) and options.scheduler_reserve_full_isl and self.connector is None

        def pass_over() -> None:
            request = queue.pop()
            self._deferred.add(request)
            passed_over[request.holds_blocks].append(request)

        while budget > 0 and len(self.running) < self.max_active:
            queue = self.holding if len(self.holding) else self.waiting
            if not len(queue):
                break
            request = queue.peek()
            if request.status == Status.LOADING:
                if not request.loaded:
                    pass_over()
                    continue
                self._take_over_loaded(request)
            if request.stale and not request.drop_stale:
                pass_over()  # its outputs in flight must arrive before it may produce others
                continue
            if self._deferred:
                self._deferred.discard(request)  # whatever it waited for has come
            hit, load, computed = kv.miss, 0, request.computed
            if computed == 0:
                if asks_again and request.chain is not None:
                    assert isinstance(kv, FullKV)
                    if kv.refuses(request.chain, request.known, self.watermark if self.running else 0):
                        break
                if options.enable_prefix_caching and request.chain is not None:
                    hit = kv.lookup(request.chain, request.known - 1)
                if self.connector is not None and options.kv_consumer:
                    load = self.connector.tokens_to_load(request, hit.tokens)
                computed = hit.tokens + load
            drafts = tokens = 0
            if not load:
                if hold_prefills and computed < request.known - 1:
                    break
                tokens = request.known - computed
                if tokens == 1 and options.speculative_tokens and not prefilled and (continued or computed):
                    # Kept as wide as the decodes around it, so that the whole batch stays uniform.
                    padded = 1 + options.speculative_tokens
                    if computed + padded + 1 <= options.max_model_len:
                        if padded > budget:
                            break
                        tokens, drafts = padded, options.speculative_tokens
                if 0 < threshold < tokens:
                    tokens = threshold
                if not options.enable_chunked_prefill and tokens > budget:
                    break
                tokens = min(tokens, budget)
            admitted = kv.allocate(
                request.row,
                computed=request.computed,
                new=tokens,
                known=request.known,
                prompt=request.prompt,
                chain=request.chain,
                in_flight=request.in_flight,
                lookahead=0 if load else options.lookahead_tokens,
                hit=hit,
                external=load,
                whole_sequence=options.scheduler_reserve_full_isl,
                watermark=self.watermark if self.running else 0,
                reserved=self._reserved_blocks() if load else 0,
                cache=not load,
            )
            if not admitted:
                break
            if request.computed == 0:
                self.prefix_queries += request.known
                self.prefix_hits += hit.tokens
            if load:
                assert self.connector is not None
                self.connector.start(request, load, batch.scheduled_ns)
                request.remote_prefill = False
                request.status, request.computed = Status.LOADING, computed
                self._partial[request] = None
                pass_over()
                continue
            queue.pop()
            self._deferred.discard(request)
            self.running.append(request)
            self._admissions += 1
            request.order = self._admissions
            if self.rides:
                self.riding.plain.append(request)
            request.status, request.computed = Status.RUNNING, computed
            request.quiet = self._quiet(request)
            if computed + tokens < request.known:
                self._partial[request] = None
            if request.scheduled_ns < 0:
                request.scheduled_ns, request.cached_tokens = batch.scheduled_ns, computed
            batch.add(request, tokens, computed, drafts)
            budget -= tokens
        self.holding.push_front(passed_over[True])
        self.waiting.push_front(passed_over[False])

    def refused(self) -> int | None:
        """Where the request at the head of the queue is sure to be refused for want of blocks: the first block of its
        prompt that nobody has cached. None: it may be admitted, or it is not blocks that it waits for.

        It goes on being refused while requests run that only take blocks: each lowers what is free by one, and by at
        most one what the head of the queue needs, as it may have been a block that it would have adopted. Once somebody
        caches the block that it lacks, or gives back any, it must be asked for again.
        """
        options, kv = self.options, self.kv
        whole = options.scheduler_reserve_full_isl and kv.uniform
        if not whole or self.connector is not None or self._deferred or not len(self.waiting):
            return None
        request, hit = self.waiting.peek(), kv.miss
        if request.stale:
            return None
        if options.enable_prefix_caching and request.chain is not None:
            hit = kv.lookup(request.chain, request.known - 1)
        tokens = min(request.known, options.max_model_len)
        needed = kv.blocks_needed(request.row, tokens, hit.tokens, hit, admission=True)
        return len(hit.blocks[0]) if needed + self.watermark > kv.pool.free else None

    def _take_over_loaded(self, request: Request) -> None:
        """A load has ended: its blocks become findable, and the last prompt token is computed here for its logits."""
        assert request.chain is not None or not self.options.enable_prefix_caching
        if request.chain is not None:
            self.kv.commit(request.row, request.computed, request.chain)
        if request.computed == request.known:
            request.computed -= 1
        request.status = Status.PREEMPTED if request.preemptions else Status.WAITING

    def _reserved_blocks(self) -> int:
        """Blocks that partly computed prompts still need: a load may not take them, as it cannot be preempted."""
        options, extra = self.options, 0
        if options.speculative_tokens:
            extra = 1 + options.speculative_tokens + options.lookahead_tokens
        step = -(-extra // options.block_size) * len(self.kv.groups)
        return step + sum(
            self.kv.blocks_needed(
                request.row,
                min(request.known, options.max_model_len) + extra,
                request.computed,
                self.kv.miss,
                admission=True,
            )
            for request in self._partial
        )

    def _advance(self, batch: Batch) -> None:
        asynchronous, speculative = self.options.async_scheduling, self.options.speculative_tokens
        samples = batch.samples
        for request, tokens, drafts in zip(batch.requests, batch.tokens, batch.drafts, strict=True):
            request.computed += tokens
            request.in_flight += tokens
            prefilling = request.computed < request.known + request.placeholders
            request.prefilling = prefilling
            samples.append(not prefilling)
            if not prefilling:
                if self._partial:
                    self._partial.pop(request, None)
                if asynchronous:
                    request.placeholders += 1 + drafts
                    request.drafts = speculative
                if self.rides:
                    self.riding.join(request, batch, drafts)
        if batch.joined:
            plain = self.riding.plain
            plain[:] = [request for request in plain if not request.joined]

    # The end of a step ---------------------------------------------------------------------------------------------

    def update(self, batch: Batch, now: int) -> list[Request]:
        """Give the outputs of an ended step to its requests; those that ended with it, in batch order."""
        riding = self.lanes[batch.lane]
        usual_gap, usual = now - riding.last_outputs_ns, 0
        if batch.number:
            riding.land(batch, now)
            while self._deferred_frees and self._deferred_frees[0][0] <= sum(lane.processed for lane in self.lanes):
                assert isinstance(self.kv, KVCache)
                self.kv.pool.release(reversed(self._deferred_frees.popleft()[1]))
        ended: list[Request] = []
        speculative = self.options.speculative_tokens
        longest, size = self.options.max_model_len, self.options.block_size
        commits_drafts = speculative and self.options.commits_drafts_at_output
        if not batch.requests:
            return self._end_copies(now)
        if True in batch.samples:
            self._progress += 1
        gaps = riding.gaps
        for request, tokens, drafts, samples in zip(
            batch.requests, batch.tokens, batch.drafts, batch.samples, strict=True
        ):
            request.in_flight -= tokens
            stale = request.stale > 0
            if stale:
                request.stale -= tokens
            if not samples or request.status >= Status.FINISHED or (stale and request.drop_stale):
                continue
            produced = 1
            if drafts:
                assert self.accepted is not None
                produced += self.accepted(request, drafts)
                if not stale:
                    rejected = drafts + 1 - produced
                    if request.computed > 0:
                        request.computed -= rejected
                    if request.placeholders > 0:
                        request.placeholders -= rejected
            was_running, had_placeholders = request.status == Status.RUNNING, request.placeholders > 0
            kept, reason = produced, ""
            left, space = request.max_tokens - request.outputs, longest - request.known
            if space < left:
                left = space
            if left <= kept:
                kept, reason = max(left, 1), "length"
            if request.stop_after is not None and request.stop_after - request.outputs <= kept:
                kept, reason = max(request.stop_after - request.outputs, 1), "stop"
            request.outputs += kept
            request.known += kept
            if not stale:
                request.computed -= produced - kept
                if had_placeholders:
                    request.placeholders -= produced
            if request.first_token_ns < 0:
                request.first_token_ns = now
            elif now - request.last_token_ns == usual_gap:
                usual += 1
            else:
                gaps.add(now - request.last_token_ns, 1)
            if kept > 1:
                gaps.add(0, kept - 1)
            request.last_token_ns = now
            if request.token_ns is not None:
                assert riding.output_ns is not None
                request.token_ns.add(riding.output_ns, riding.processed - 1, riding.processed, kept)
            if not stale and was_running and (had_placeholders or commits_drafts) and request.chain is not None:
                certain = request.computed - request.in_flight
                if speculative or certain % size == 0:
                    self.kv.commit(request.row, certain, request.chain)
            if reason:
                ended.append(request)
                request.reason, request.finish_ns = reason, now
                if was_running:
                    self._stop_running(request)
                else:
                    self._remove_waiting({request})
                self._end(request, Status.FINISHED, pin=False)
        if usual:
            gaps.add(usual_gap, usual)
        if speculative and not self.options.async_scheduling:
            for request in batch.requests:
                if not request.finished:
                    request.drafts = 0 if request.prefilling else speculative
        self._end_copies(now)
        return ended

    def _end_copies(self, now: int) -> list[Request]:
        """Look which copies have ended; nobody ends with that."""
        if self.connector is not None:
            for request in self.connector.ended(now):
                self._copied(request)
        return []

    def _copied(self, request: Request) -> None:
        if request.status == Status.LOADING:
            request.loaded = True
        else:
            self.pinned.discard(request)
            self._free(request)

    def _end(self, request: Request, status: Status, pin: bool) -> None:
        request.status = status
        self._partial.pop(request, None)
        self._unflushed = True
        if request.remote_decode and status == Status.FINISHED and self.connector is not None:
            self.connector.start(request, request.prompt, request.finish_ns)
            pin = True
        if pin:
            self.pinned.add(request)
        else:
            self._free(request)

    def _stop_running(self, request: Request) -> None:
        self.running.remove(request)
        if self.rides:
            self.riding.plain.remove(request)

    def _remove_waiting(self, requests: set[Request]) -> None:
        self.waiting.remove(requests)
        self.holding.remove(requests)
        self._deferred -= requests

    def _frees_at_once(self, request: Request) -> bool:
        return not self._defer_frees or not request.in_flight

    def _free(self, request: Request) -> None:
        if self._frees_at_once(request):
            self.kv.free(request.row)
            return
        assert isinstance(self.kv, KVCache)
        blocks = [block for table in self.kv.pop(request.row) for block in table]
        if blocks:
            self._deferred_frees.append((sum(lane.scheduled for lane in self.lanes), blocks))
