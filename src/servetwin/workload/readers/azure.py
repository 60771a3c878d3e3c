"""Azure LLM inference traces: CSV `TIMESTAMP,ContextTokens,GeneratedTokens`.

https://github.com/Azure/AzurePublicDataset: 2023 (code and conversation, seven decimals of a second) and 2024 (time
zone `+00:00`).
"""

from __future__ import annotations

from servetwin.workload.readers.csv_table import CsvTable
from servetwin.workload.readers.source import TraceFile
from servetwin.workload.table import RequestTable

SIGNS = ("ContextTokens",)


def read(file: TraceFile) -> RequestTable:
    """Arrivals count from the earliest row (the first, where rows are in order)."""
    rows = CsvTable(file)
    times = rows.timestamps_ns("TIMESTAMP")
    return RequestTable(
        arrival_ns=times - times.min(),
        input_tokens=rows.tokens("ContextTokens"),
        output_tokens=rows.tokens("GeneratedTokens"),
    )
