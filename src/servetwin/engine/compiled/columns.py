"""What the columns of a fleet's arrays mean. All are int64 but where it is said; -1 in a link or a time: none."""

from __future__ import annotations

from typing import Final

import numpy as np

NEVER: Final = np.iinfo(np.int64).max
"""A time that does not come."""

# One row an engine. Options first (see `SchedulerOptions`, `HostOverhead`):
(
    TIMER,  # which timer's prices
    ROOM,  # batches in flight
    BUDGET,
    MAX_ACTIVE,
    MAX_MODEL_LEN,
    BLOCK_SIZE,
    USABLE,
    WATERMARK,
    THRESHOLD,
    ADAPTIVE,
    LONE_UNLIMITED,
    CHUNKED,
    RESERVES_ALL,
    ASYNCHRONOUS,
    CACHING,
    STEP_NS,
    SEQ_NS,
    GAP_NS,
    GAP_SEQ_NS,
    # ... then the state of scheduler and loop:
    FREE,  # KV blocks
    RUNNING,  # how many run
    WAITING,  # how many wait, the first and the last of them
    WAITING_HEAD,
    WAITING_TAIL,
    INBOX_HEAD,  # requests on their way to the engine, by time and row
    INBOX_TAIL,
    UNFLUSHED,
    SCHEDULED,  # batches, as in `Riding`
    PROCESSED,
    LAST_OUTPUTS_NS,
    QUERIES,  # prefix_queries
    AWAITING,
    OLDEST,  # place of the oldest batch in flight among the ROOM places
    FLYING,  # batches in flight
    UNPRICED,  # a batch is scheduled, but the loop waits for a price of it
    DEVICE_FREE,
    LAST_END,
    STEPS,
    ENGINE_COLUMNS,
) = range(39)

# One row a request in the system (a slot):
(
    ROW,
    PROMPT,
    MOST,  # max_tokens
    STOP,  # outputs after which it stops
    AT,  # when it reaches its engine
    NEXT,  # the slot behind it in the list that it is in
    KNOWN,
    COMPUTED,
    PLACEHOLDERS,
    IN_FLIGHT,
    OUTPUTS,
    HELD,  # KV blocks
    CACHED,  # of them, blocks that could be found
    QUIET,  # tokens up to which the cache has nothing to do
    SCHEDULED_NS,
    FIRST_NS,
    LAST_NS,
    ENDED,
    SLOT_COLUMNS,
) = range(19)

# One row a batch in flight, and one an entry of it:
NUMBER, ENTRIES, BEGIN_NS, END_NS, INDEX, SCHEDULED_AT, BATCH_COLUMNS = range(7)
SLOT, TOKENS, BEFORE, SAMPLES, ENTRY_COLUMNS = range(5)

# One row an ended request:
END_ROW, END_SCHEDULED, END_FIRST, END_FINISH, END_OUTPUTS, END_STOPPED, END_COLUMNS = range(7)

# What fills up while a fleet runs, and where it stands:
ROWS, GAPS, ENDS, FREE_SLOT, CURRENT, COUNTERS = range(6)

# How a call ends:
(
    DONE,  # nothing is left to do before the limit
    ONE_ENDED,  # a request has, in the wake of engine CURRENT
    PRICE,  # engine CURRENT waits for a price that the tables lack
    LEAVE,  # engine CURRENT is about to do what only Python's form can
    FULL,  # what was gathered has to be taken away
) = range(5)

# One row a timer:
KIND, BASE, A_PREFILL_TOKEN, A_DECODE, A_CONTEXT_TOKEN, DECODE_PARTS, PREFILL_PARTS, TIMER_COLUMNS = range(8)
LINEAR, BY_OPERATOR = range(2)
MEASURED_KIND, EXTRAPOLATED_KIND, ANALYTIC_KIND = 0, 2, 3
"""Places in `Ledger`'s KINDS."""
