"""Verbs that write a line for each row of a source: embed, predict.

Only light modules are imported here, as in `mmssl.cli`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli_options import Columns, RunPath, Trust, only_columns

Source = Annotated[str, typer.Argument(metavar="DATA", help="Anything that a recipe's data.source may be.")]
Split = Annotated[str, typer.Option(help="Whose rows.")]
Limit = Annotated[int | None, typer.Option(help="Only so many rows, spread over the split.")]
BatchSize = Annotated[int, typer.Option(help="Rows that go through the encoder at a time.")]
Workers = Annotated[int, typer.Option(help="Processes that decode.")]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]


def embed(
    run: RunPath,
    data: Source,
    to: Annotated[Path, typer.Option("--to", help="File to write: *.parquet or *.npz.")],
    encoder: Annotated[str | None, typer.Option(help="Name of the encoder; the first one by default.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Depth whose mean is written; the pooled features by default.")
    ] = None,
    split: Split = "train",
    limit: Limit = None,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    force: Force = False,
    set_: Columns = None,
    trust: Trust = False,
) -> None:
    """Write the features of every row to a file, with ids and columns; a call that was killed goes on when repeated."""
    import mmssl

    written = mmssl.embed(
        run,
        data,
        to,
        encoder=encoder,
        layer=layer,
        split=split,
        limit=limit,
        columns=only_columns(set_),
        batch_size=batch_size,
        workers=workers,
        force=force,
        trust=trust,
    )
    typer.echo(str(written))


def predict(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="What `mmssl adapt RUN --probe finetune --save FOLDER` wrote; segmentation and detection do so, too.",
        ),
    ],
    data: Source,
    to: Annotated[
        Path, typer.Option("--to", help="File to write: *.csv, *.parquet, *.json or *.npz; of masks a folder.")
    ],
    scores: Annotated[bool, typer.Option("--scores", help="Write the probability of each class or label too.")] = False,
    split: Split = "train",
    limit: Limit = None,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    force: Force = False,
    set_: Columns = None,
    trust: Trust = False,
) -> None:
    """Write a saved network's answer for every row to a file, or masks to a folder; a killed call goes on."""
    import mmssl

    written = mmssl.predict(
        folder,
        data,
        to,
        scores=scores,
        split=split,
        limit=limit,
        columns=only_columns(set_),
        batch_size=batch_size,
        workers=workers,
        force=force,
        trust=trust,
    )
    typer.echo(str(written))
