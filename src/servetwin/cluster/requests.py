"""Requests of the runtime loop, made from the rows of the workload when they arrive."""

from __future__ import annotations

import numpy as np

from servetwin.engine.engine import Engine
from servetwin.engine.request import Request
from servetwin.engine.tokens import TokenTimes
from servetwin.memory.kv import Chain
from servetwin.memory.prefix import OwnChain, PrefixChain, SegmentChain
from servetwin.workload.identity import keys_of, prompt_of, shares_prompts
from servetwin.workload.table import Ints, RequestTable


class RequestMaker:
    """Turns rows of the workload into requests when they arrive, so that memory holds only those in the system."""

    def __init__(self, table: RequestTable, record_tokens: bool) -> None:
        self._table, self._record, self._shared = table, record_tokens, shares_prompts(table)
        self._input, self._output = _numbers(table.input_tokens), _numbers(table.output_tokens)
        self._priority = None if table.priority is None else _numbers(table.priority)
        self._session = None if table.session is None else _numbers(table.session)
        self._abort = None if table.abort_ns is None else _numbers(table.abort_ns)
        self._arrival = _numbers(table.arrival_ns) if self._abort else []
        self._chains: dict[tuple[int, int], Chain] = {}

    def new(self, row: int, time: int) -> Request:
        """Request `row`, which has come at `time`."""
        prompt, output = self._input[row], self._output[row]
        request = Request(
            row,
            time,
            prompt,
            output,
            stop_after=None if self._table.output_known else output,
            priority=self._priority[row] if self._priority else 0,
            session=self._session[row] if self._session else -1,
            # Where a request is released later than the table says, its client's patience keeps its length.
            abort_ns=time + self._abort[row] - self._arrival[row] if self._abort and self._abort[row] >= 0 else -1,
        )
        if self._record:
            request.token_ns = TokenTimes()
        return request

    def place(self, request: Request, engine: Engine) -> None:
        """Fill in what depends on the engine that it goes to."""
        options, row = engine.scheduler.options, request.row
        if not self._table.output_known:
            request.max_tokens = max(1, options.max_model_len - request.prompt)
        if options.enable_prefix_caching:
            chain = self.chain(row, options.block_size)
            request.chain = OwnChain(row) if chain is None else chain
        self._chains.clear()

    def chain(self, row: int, block_size: int) -> Chain | None:
        """Names of the prefixes of a prompt that may be shared; the request that is routed takes over what was made to
        look it up."""
        if not self._shared:
            return None
        chain = self._chains.get((row, block_size))
        if chain is None:
            chain = self._chains[row, block_size] = _chain(self._table, row, block_size)
        return chain


def _chain(table: RequestTable, row: int, block_size: int) -> Chain:
    if table.token_ids is not None:
        return PrefixChain(keys_of(table, row, block_size).key)
    return SegmentChain(prompt_of(table, row), table.output_seed(row), block_size)


def _numbers(column: Ints) -> memoryview:
    """A column, to be read item by item: as fast as a list, in a fifth of the room."""
    return np.ascontiguousarray(column, np.int64).data
