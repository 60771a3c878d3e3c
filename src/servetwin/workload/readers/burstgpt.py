"""BurstGPT traces: CSV `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type` (seconds).

https://github.com/HPMLL/BurstGPT: a row with 0 response tokens is a request that failed.
"""

from __future__ import annotations

from servetwin.workload.readers.csv_table import CsvTable
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable

SIGNS = ("Response tokens",)


def read(file: TraceFile) -> RequestTable:
    """Arrivals as they stand in the file; failed requests are left out and counted in `notes`."""
    rows = CsvTable(file)
    outputs = rows.tokens("Response tokens", least=0)
    prompts = rows.tokens("Request tokens", least=0)
    answered = outputs > 0
    rows.check("Request tokens", ~answered | (prompts > 0), "at least 1 where there is a response")
    failed = len(rows) - int(answered.sum())
    if failed == len(rows):
        raise file.error("no row has response tokens: all requests of this trace failed")
    return RequestTable(
        arrival_ns=rows.seconds_as_ns("Timestamp")[answered],
        input_tokens=prompts[answered],
        output_tokens=outputs[answered],
        notes=(f"{failed} rows with 0 response tokens (failed requests) left out",) if failed else (),
    )
