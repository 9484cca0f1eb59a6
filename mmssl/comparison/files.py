"""What a comparison leaves: its table as Markdown, text, CSV and parquet, and in each run what its audit said."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from mmssl.atomic import write_text
from mmssl.comparison.comparison import Comparison
from mmssl.comparison.measure import Cell
from mmssl.run_directory import AUDIT, Audited, keep_audit


def csv_of(found: Comparison) -> str:
    """`records_of` as text."""
    text = io.StringIO()
    records = records_of(found)
    writer = csv.DictWriter(text, fieldnames=list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def records_of(found: Comparison) -> list[dict[str, Any]]:
    """A row for each line, seed, measure and depth, with every number in full."""
    records = []
    for line, cells in found.cells.items():
        for seed, cell in enumerate(cells):
            cost = cell.get("cost", {})
            base = {
                "line": line,
                "seed": found.plan.seeds[seed] if line not in found.plan.runs else seed,
                "effective_rank": cell["monitors"]["effective_rank"],
                "lidar": cell["monitors"].get("lidar"),
                "spectrum_decay": cell["monitors"]["spectrum_decay"],
                "samples": cost.get("samples"),
                "seconds": cost.get("seconds"),
                "learning_rate": cell.get("lr"),
            }
            asked = cell.get("scores", {})
            records += [
                base
                | {"measure": measure, "depth": depth, "score": score}
                | {"validation": cell["validation"][measure][depth], "constant": cell["constant"][measure]}
                for measure, depths in asked.items()
                for depth, score in depths.items()
            ] or [base]
    return records


def write_table(found: Comparison) -> None:
    """table.md, table.txt, table.csv and table.parquet into the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_text(found.out / "table.md", f"{found.markdown()}\n\n{found.sentence}\n")
    write_text(found.out / "table.txt", f"{found}\n")
    write_text(found.out / "table.csv", csv_of(found))
    pq.write_table(pa.Table.from_pylist(records_of(found)), found.out / "table.parquet")


def keep_audits(found: Comparison) -> None:
    """Write what the audit of a line said into the runs that it is about, for their cards; an audit there stays."""
    for line, audit in found.audits.items():
        runs = [found.out / "runs" / Cell(line, seed).name for seed in found.plan.seeds]
        if line in found.plan.runs:  # of those only the first was audited, and others may differ in more than the seed
            runs = [Path(found.plan.runs[line][0])]
        for run in runs:
            if run.is_dir() and os.access(run, os.W_OK) and not (run / AUDIT).exists():
                keep_audit(run, Audited(audit["verdict"], audit["text"]))
