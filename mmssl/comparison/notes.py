"""What is said under the table of a comparison: how to read it, what was left out, and what the audits say."""

from __future__ import annotations

from mmssl.audit.own_files import GRADIENTS
from mmssl.comparison.cells import cells_of
from mmssl.comparison.label_free import AGREEMENT, LIDAR, measured_elsewhere, value_of
from mmssl.comparison.measured import Measured
from mmssl.comparison.plan import RATE


def notes_of(found: Measured) -> list[str]:
    """How to read the table."""
    plan = found.plan
    cells = [cell for cells in found.cells.values() for cell in cells]
    whole = [cell for cell in cells_of(plan) if cell.whole]
    notes = [f"{len(cells)} of {len(whole)} cells are there"] if len(cells) < len(whole) else []
    if found.measures:
        train, test = cells[0]["rows"][found.measures[0]]
        if plan.test is None and cells[0]["test"].startswith("a fifth of "):
            notes.append("the tasks saw the test rows, without labels: name other rows with test (--test)")
        judge = found.judge(found.main)
        rows = "groups of test rows" if plan.groups else "test rows"
        spread, paired, over = "", "", f"{rows}, for one seed tells no spread"
        if len(plan.seeds) > 1:
            spread = f"± one standard deviation over seeds {', '.join(map(str, plan.seeds))}; "
            paired, over = ", paired by seed", f"seeds and {rows}"
        notes += [
            f"test rows: {cells[0]['test']} ({test}); probes learn from at most {train} training rows",
            f"{spread}best depths, and the order of the tasks, are chosen on validation rows"
            f"{f' of {found.named(judge)}' * (judge != found.main)}, which are training rows",
            f"over untrained: {found.asked}, each at its best depth{paired}; in brackets 95 % intervals over {over}",
        ]
        if plan.tuned:
            factors = ", ".join(f"{rate:g}" for rate in plan.rates)
            whose = (
                "learning rates: the recipe's" if plan.tasks else f"learning rate of the supervised network: {RATE:g}"
            )
            notes.append(f"{whose} times {factors}, by kNN on held-out training rows after a quarter of the budget")
        notes += sorted({warning for cell in cells for warning in cell.get("warnings", [])})
    notes += _notes_without_labels(found)
    notes += [f"audit: {audit['sentence']}" for audit in found.audits.values() if audit["verdict"] != GRADIENTS]
    if not plan.audit:
        notes.append("no task was audited: mmssl audit RUN asks whether one is answered where there is nothing to see")
    if plan.tasks:
        notes.append(
            f"{plan.batch} encoder samples a step: rows through the trained encoder, by floating-point operations"
        )
    return [*notes, *plan.notes]


def _notes_without_labels(found: Measured) -> list[str]:
    notes = ["RankMe and LiDAR: the more the better; alpha-ReQ: the nearer to 1; in brackets the place among the tasks"]
    if not any(value_of(found.cells, line, LIDAR) is not None for line in found.cells):
        notes.append(f"LiDAR compares random views of a row, and none were taken of {found.plan.modality}")
    if found.agreements:
        told = [f"{measure.title} {one}" for measure, one in found.agreements.items()]
        notes.append(f"{AGREEMENT}, Kendall's tau with the order by {found.asked}, here: {', '.join(told)}")
    elif found.measures:
        notes.append(f"{AGREEMENT} of rankings without labels takes three tasks that differ")
    else:
        notes.append(f"{AGREEMENT} where there were labels, Kendall's tau / Spearman's rho:")
        notes += map(str, measured_elsewhere())
    return notes
