"""What a check of a source found, as lines of text."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 5  # broken rows that are told


@dataclass
class Check:
    """What was found.

    Attributes:
        source: as it was named.
        splits: name -> rows; None where only reading all of it would tell.
        columns: name -> the batch key that it feeds, or an empty string.
        rows: number of rows of the sample.
        facts: key -> what the sample has of it, a line each.
        broken: rows of the sample that cannot be decoded, with the reason.
        traps: what may make a number wrong or a task too easy, a sentence each.
        notes: what was read differently from what a user may think.
    """

    source: str
    splits: dict[str, int | None]
    columns: dict[str, str]
    rows: int = 0
    facts: dict[str, list[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    traps: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The whole as lines of text."""
        sizes = (f"{name} {'?' if rows is None else f'{rows:,}'}" for name, rows in self.splits.items())
        used = (f"{name} ({key})" if key else name for name, key in self.columns.items())
        lines = [self.source, f"  rows      {', '.join(sizes)}", f"  columns   {', '.join(used)}"]
        lines += [
            f"  {key if n == 0 else '':<9} {line}" for key, own in self.facts.items() for n, line in enumerate(own)
        ]
        more = [f"and {len(self.broken) - SHOWN} more"] if len(self.broken) > SHOWN else []
        broken = [*self.broken[:SHOWN], *more] or ([f"none of {self.rows} rows"] if self.facts else [])
        for title, own in (("broken", broken), ("note", self.notes), ("trap", self.traps)):
            lines += [f"  {title:<9} {line}" for line in own]
        return "\n".join(lines)
