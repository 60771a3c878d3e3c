"""Step traces: what a real vLLM scheduler decided, step by step, and the comparison of our own decisions with it.

A trace is JSON lines (`.jsonl` or `.jsonl.gz`): a `header` (engine options, the integer law that prices a step), one
`req` a request, and, where a real scheduler wrote it, one `step` an engine step and one `out` a request.
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servetwin.engine.batch import Batch
from servetwin.engine.engine import Engine
from servetwin.engine.options import SchedulerOptions
from servetwin.engine.request import Request, Status
from servetwin.engine.scheduler import Scheduler
from servetwin.engine.transfer import KVConnector
from servetwin.errors import InputError
from servetwin.interop.steptrace_check import check_header, check_request
from servetwin.memory.prefix import SegmentChain
from servetwin.timing.linear import LinearTimer

COMPARED = ("t", "b", "e", "s", "p", "run", "wait", "free")
_MASK = (1 << 64) - 1
_OUTPUT_SEED = 1_000_000

# Header keys of a trace -> scheduler options. Other keys are vLLM's own names.
_NAMES = {
    "budget": "max_num_batched_tokens",
    "max_seqs": "max_num_seqs",
    "prefix": "enable_prefix_caching",
    "chunked": "enable_chunked_prefill",
    "async": "async_scheduling",
    "pp": "pipeline",
    "num_spec": "speculative_tokens",
    "long_prefill_token_threshold": "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive": "long_prefill_token_threshold_adaptive",
    "adaptive_long_prefill_threshold": "long_prefill_token_threshold_adaptive",
    "max_num_active_seqs": "max_num_active_seqs",
    "scheduler_reserve_full_isl": "scheduler_reserve_full_isl",
    "watermark": "watermark",
    "prefill_schedule_interval": "prefill_schedule_interval",
    "max_model_len": "max_model_len",
    "block_size": "block_size",
}


def splitmix64(x: int) -> int:
    """One step of the SplitMix64 generator (Steele, Lea, Flood 2014): the traces' source of fixed 'random' numbers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass
class StepTrace:
    """A trace file: its header, its requests, and the steps that a real scheduler took (empty: none recorded)."""

    path: Path
    header: dict[str, Any]
    requests: list[dict[str, Any]]
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.header.get("scenario") or self.path.name.split(".")[0])


@dataclass
class Outcome:
    """What came of one file: `exact` None when the file holds no steps to compare with."""

    trace: StepTrace
    steps: list[dict[str, Any]]
    exact: bool | None
    line: str


def read_trace(path: Path) -> StepTrace:
    """Read a step trace.

    Raises:
        InputError: the file is missing, is not JSON lines, or lacks a header or a request's fields.
    """
    trace = StepTrace(path, {}, [])
    rows: set[int] = set()
    for number, record in _records(path):
        kind = record.get("kind")
        if kind == "header":
            trace.header = record
        elif kind == "req":
            try:
                check_request(record)
            except InputError as error:
                error.field = f"line {number}: {error.field}" if error.field else f"line {number}"
                raise error.at(str(path)) from None
            if record["r"] in rows:
                message = "second request of this number"
                raise InputError(message, where=str(path), field=f"line {number}", found=record["r"])
            rows.add(record["r"])
            trace.requests.append(record)
        elif kind == "step":
            trace.steps.append(record)
        elif kind != "out":
            raise InputError(
                "unknown kind of record",
                where=str(path),
                field=f"line {number}",
                found=kind,
                allowed="header, req, step, out",
            )
    if not trace.header:
        raise InputError("no header record", where=str(path), allowed="a step trace starts with a header")
    return trace


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise InputError("not a JSON object", where=str(path), field=f"line {number}")
                    yield number, record
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", where=str(path), field=f"line {number}") from error
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from error


def _options(trace: StepTrace) -> SchedulerOptions:
    try:
        check_header(trace.header)
    except InputError as error:
        raise error.at(str(trace.path)) from None
    config = trace.header["config"]
    values: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": 4096}
    values |= {_NAMES[key]: value for key, value in config.items() if key in _NAMES}
    window = config.get("window")
    windows = {"full": (None,), "swa": (window,), "hybrid": (window, None)}[config.get("attn", "full")]
    version = [int(part) for part in str(trace.header.get("vllm", "0.33.0")).split(".")[:2]]
    role = config.get("kv_role")
    return SchedulerOptions(
        usable_blocks=config["num_blocks"] - 1,
        priority=(config.get("scheduling_policy") or config.get("policy")) == "priority",
        windows=windows,
        kv_consumer=role in ("kv_consumer", "kv_both"),
        kv_producer=role in ("kv_producer", "kv_both"),
        priority_self_preemption_continues=version >= [0, 33],
        commits_drafts_at_output=version >= [0, 33],
        **values,
    )


class _Recorder:
    """Writes executed steps in the trace's own record format."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._grown: dict[int, int] = {}
        self.keeps_entries = True

    def step(self, engine: int, batch: Batch, used: int) -> None:
        entries: list[Any] = []
        shape = batch.shape
        assert shape is not None
        for request, n, c, k in batch.entries():
            r = request.row
            if n == 1 and not k and self._grown.get(r) == c:
                entries.append(r)
            else:
                entries.append([r, n, c, k] if k else [r, n, c])
            self._grown[r] = c + n
        step: dict[str, Any] = {"kind": "step", "i": batch.index, "t": batch.scheduled_ns}
        if batch.begin_ns != batch.scheduled_ns:
            step["b"] = batch.begin_ns
        step |= {"e": batch.end_ns, "s": entries}
        if batch.preempted:
            step["p"] = [request.row for request in batch.preempted]
        step |= {"run": batch.running, "wait": batch.waiting, "free": batch.free}
        drafts = shape.decode_tokens - shape.decode_seqs
        step |= {"pf": shape.prefill_tokens + drafts, "dc": shape.decode_seqs, "ctx": shape.context}
        self.steps.append(step)

    def run(self, *run: object) -> None:
        raise NotImplementedError("traces are compared step by step: steps are not coalesced")


def replay(trace: StepTrace, rides: bool = True) -> tuple[list[dict[str, Any]], list[Request]]:
    """The steps that our engine takes on a trace's requests, and the requests as they ended."""
    options = _options(trace)
    law = trace.header.get("latency_ns", {})
    timer = LinearTimer(
        law.get("base", 0),
        law.get("per_prefill_token", 0),
        law.get("per_decode_seq", 0),
        law.get("per_context_token", 0),
        options.pipeline,
    )
    kv = options.new_kv_cache()
    connector = KVConnector(lambda tokens: 2_000_000 + 500 * tokens)
    scheduler = Scheduler(
        options,
        kv,
        connector if options.kv_consumer or options.kv_producer else None,
        lambda request, drafts: splitmix64((request.row << 20) + request.outputs) % (drafts + 1),
        rides=rides,
    )
    recorder = _Recorder()
    engine = Engine(0, scheduler, timer, recorder, lambda request, now: None)
    requests = [_request(trace, record, options) for record in trace.requests]
    events = [(request.arrival_ns, 0, request.row, request) for request in requests]
    aborted = (request for request in requests if request.abort_ns >= 0)
    events += [(max(request.abort_ns, request.arrival_ns), 1, request.row, request) for request in aborted]
    heapq.heapify(events)
    wake: int | None = None
    now = 0
    while events or wake is not None or scheduler.unfinished:
        if events and (wake is None or events[0][0] <= wake):
            now, kind, _, request = heapq.heappop(events)
            engine.inbox.append((request, Status.ABORTED if kind == 1 else None))
            if engine.awaiting or (events and events[0][0] == now):
                continue
        elif wake is not None:
            now = wake
        # else: nothing will happen any more, but a copy was reported whose request has not been looked at since.
        wake = engine.wake(now)
    return recorder.steps, requests


def _request(trace: StepTrace, record: dict[str, Any], options: SchedulerOptions) -> Request:
    segments = [(int(seed), int(length)) for seed, length in record["prompt"]]
    prompt = sum(length for _, length in segments)
    row = int(record["r"])
    chain = SegmentChain(segments, _OUTPUT_SEED + row, options.block_size)
    return Request(
        row,
        int(record["at"]),
        prompt,
        int(record["max_tokens"]),
        stop_after=record.get("stop"),
        priority=int(record.get("prio", 0)),
        chain=chain,
        remote_prefill=record.get("kv") == "do_remote_prefill",
        remote_decode=record.get("kv") == "do_remote_decode",
        abort_ns=int(record.get("abort_at", -1)),
    )


def conformance(files: list[Path], out: Path | None = None) -> list[Outcome]:
    """Replay each trace, write our steps to `out`/<scenario>.jsonl, and compare where the trace holds steps."""
    outcomes = []
    for path in files:
        trace = read_trace(Path(path))
        steps, requests = replay(trace)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            _write(trace, steps, requests, out / f"{trace.name}.jsonl")
        outcomes.append(_compare(trace, steps))
    return outcomes


def _compare(trace: StepTrace, steps: list[dict[str, Any]]) -> Outcome:
    if not trace.steps:
        return Outcome(trace, steps, None, f"{trace.name}: {len(steps)} steps written, none recorded to compare with")
    for i in range(max(len(steps), len(trace.steps))):
        ours = steps[i] if i < len(steps) else {}
        theirs = trace.steps[i] if i < len(trace.steps) else {}
        wrong = [key for key in COMPARED if ours.get(key) != theirs.get(key)]
        if wrong:
            rows = [f"{trace.name}: differs at step {i} in {', '.join(wrong)}", f"  {'':5} {'real':<40} ours"]
            rows += [f"  {key:5} {_short(theirs.get(key)):<40} {_short(ours.get(key))}" for key in wrong]
            return Outcome(trace, steps, False, "\n".join(rows))
    return Outcome(trace, steps, True, f"{trace.name}: exact over {len(steps)} steps")


def _short(value: Any, width: int = 400) -> str:
    text = json.dumps(value, separators=(",", ":")) if value is not None else "-"
    return text if len(text) <= width else text[: width - 1] + "…"


def _write(trace: StepTrace, steps: list[dict[str, Any]], requests: list[Request], path: Path) -> None:
    header = dict(trace.header) | {"n_requests": len(requests), "n_steps": len(steps)}
    with path.open("w") as lines:
        for record in (header, *trace.requests, *steps, *map(_out, requests)):
            lines.write(json.dumps(record, separators=(",", ":")) + "\n")


def _out(request: Request) -> dict[str, Any]:
    def seen(ns: int) -> int | None:
        return ns if ns >= 0 else None

    return {
        "kind": "out",
        "r": request.row,
        "cached": request.cached_tokens if request.scheduled_ns >= 0 else None,
        "sched": seen(request.scheduled_ns),
        "first": seen(request.first_token_ns),
        "last": seen(request.last_token_ns),
        "n": request.outputs,
        "preempt": request.preemptions,
        "fin": request.reason if request.status == Status.FINISHED else None,
    }
