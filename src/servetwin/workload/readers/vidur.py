"""Vidur's traces: CSV with `arrived_at` (seconds), `num_prefill_tokens`, `num_decode_tokens`.

https://github.com/microsoft/vidur
"""

from __future__ import annotations

from servetwin.workload.readers.csv_table import CsvTable, folded
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable

SIGNS = ("num_prefill_tokens",)


def read(file: TraceFile) -> RequestTable:
    """Arrivals as they stand in the file. Vidur also has files of lengths alone: they are no workload, and refused."""
    rows = CsvTable(file)
    if folded("arrived_at") not in map(folded, rows.header):
        raise file.error(
            "column arrived_at is missing: this Vidur file has lengths without arrivals",
            rows.header_line,
            found=", ".join(rows.header),
            allowed="arrived_at, num_prefill_tokens, num_decode_tokens",
        )
    return RequestTable(
        arrival_ns=rows.seconds_as_ns("arrived_at"),
        input_tokens=rows.tokens("num_prefill_tokens"),
        output_tokens=rows.tokens("num_decode_tokens"),
    )
