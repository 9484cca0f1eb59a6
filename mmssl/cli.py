"""The command line: run, adapt, compare, audit, embed, predict, show, check, list, export, push, doctor.

Only light modules are imported here; torch comes in with the verb that needs it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from glob import glob
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mmssl import cli_asking, cli_rows
from mmssl.cli_options import RunPath, Set, Trust, columns_in, overrides
from mmssl.errors import Interrupted, MmsslError, RecipeError
from mmssl.version import __version__

app = typer.Typer(
    name="mmssl",
    help="Pretext tasks for image, text, audio and video: pretrain a recipe, then see what its encoder is worth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; an error that the user can mend is one line and exit code 2."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a bar a split that is opened; workers inherit it
    logging.getLogger("mmssl").setLevel(logging.INFO)  # how far something is; from Python only warnings are said
    if logging.lastResort is not None:  # writes what nobody has set up another way for
        logging.lastResort.setLevel(logging.INFO)
    try:
        _refuse_slips(sys.argv)
        app(prog_name="mmssl")
    except (MmsslError, OSError) as error:  # the latter of a disk that is full, or a folder that nobody may write
        if "--debug" in sys.argv:
            raise
        stopped = isinstance(error, Interrupted)
        says = str(error) if stopped else f"[red]error:[/red] {escape(str(error))}"
        Console(stderr=True, highlight=False, soft_wrap=True).print(says)
        sys.exit(130 if stopped else 2)


def _refuse_slips(arguments: Sequence[str]) -> None:
    """Raise RecipeError for what would be taken for a path: an empty argument, the folder one is in; a setting."""
    for before, one in pairwise(arguments):
        if re.match(r"[a-z_][\w.]*=", one) and not before.startswith("-") and not glob(one):
            raise RecipeError(f"{one}: each setting takes its own --set, here: --set {one}")
        if not one or re.fullmatch("--[a-z-]+=", one):
            raise RecipeError(
                f"{one or before}: an argument is empty, as of a variable that is not set; write what is meant, or "
                "leave it out"
            )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmssl {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every verb, written before it."""


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; `mmssl list` names those that come along.")],
    set_: Set = None,
    out_: Annotated[Path | None, typer.Option("--out", help="Run directory; runs/<recipe> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    changed_data: Annotated[bool, typer.Option("--changed-data", help="Resume although the data has changed.")] = False,
) -> None:
    """Pretrain a recipe, probe the encoder, write the run directory.

    On several processes: torchrun --nproc_per_node 4 -m mmssl run RECIPE
    """
    from mmssl.recipe import load

    changes = overrides(set_)
    load(recipe, changes)  # errors in the recipe's own keys come before torch is imported

    from mmssl import runs
    from mmssl.adaptation.table import Table
    from mmssl.ops.gather import process_share

    result = runs.run(recipe, set=changes, out=out_, resume=resume, changed_data=changed_data)
    if process_share()[0]:
        return
    for table in map(Table.from_json, result.probes):
        out.print(f"\n{table.summary()}")
        for warning in table.warnings:
            out.print(f"warning: {escape(warning)}")
    out.print(f"\nrun directory   {result.directory}")
    out.print(f"report          {result.directory / 'report.html'}")
    out.print(f"pictures        {result.directory / 'figures'}")
    for line in runs.next_calls(result, str(recipe), any(key.endswith("source") for key in changes)):
        out.print(line, markup=False)


@app.command()
def adapt(
    run: RunPath,
    data: Annotated[
        str | None, typer.Option(help="Labeled rows: anything that a recipe's data.source may be; its own by default.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of the labels; label by default, mask and boxes of those two probes.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Classes, labels, values, masks, boxes, events or tags; by the cells by default.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Test rows; the test split of --data by default.")] = None,
    probe: Annotated[
        str,
        typer.Option(
            help="knn, ridge, logistic, svm, mlp, attentive, finetune, segmentation, detection, frames, "
            "separation; retrieval, zero_shot, localization, offset."
        ),
    ] = "knn",
    layers: Annotated[bool, typer.Option("--layers", help="Probe every depth.")] = False,
    baseline: Annotated[bool, typer.Option(help="Score the same network, random-initialized, as well.")] = True,
    encoder: Annotated[str | None, typer.Option(help="Name of the encoder; the first one by default.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="Column that a split must not divide; of retrieval: of what belongs together.")
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="Learn from only so many rows a class, or pictures; or a share of all, as 1%.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many rows.")] = None,
    seed: Annotated[int, typer.Option(help="First of the seeds.")] = 0,
    seeds: Annotated[int, typer.Option(help="Random-initialized encoders; trainings of a head or of finetune.")] = 3,
    workers: Annotated[int, typer.Option(help="Processes that decode.")] = 0,
    cache: Annotated[bool, typer.Option(help="Keep features in the run's directory, for the next probe.")] = True,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A hyper-parameter of the probe, a column that is read (columns.image=img), or max_bad=0.1, the share "
            "of rows that may be undecodable.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Folder for what finetune, segmentation or detection trained; see `mmssl predict`."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG to write: the score by depth, with --layers.")] = None,
    trust: Trust = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Score a run's encoder on labeled rows, or its task on pairs, with its baselines; the run keeps the table.

    Fine-tuning on several processes: torchrun --nproc_per_node 4 -m mmssl adapt RUN --probe finetune
    """
    import yaml

    import mmssl
    from mmssl.errors import RecipeError
    from mmssl.ops.gather import process_share

    if figure is not None and not layers:
        raise RecipeError(f"{figure} would show the score by depth; add --layers")
    columns, others = columns_in(overrides(set_, "data."))
    options = {key: yaml.safe_load(value) for key, value in others.items()}
    for key in options.keys() & set(signature(mmssl.adapt).parameters) - {"max_bad", "batch_size"}:
        raise RecipeError(f"--set {key} is no hyper-parameter of a probe, but an option: mmssl adapt --help lists them")
    table = mmssl.adapt(
        run,
        data,
        test,
        encoder=encoder,
        label=label,
        target=target,
        probe=probe,
        layers=layers,
        baseline=baseline,
        groups=groups,
        shots=shots,
        limit=limit,
        seed=seed,
        seeds=seeds,
        workers=workers,
        cache=cache,
        save=save,
        trust=trust,
        **(options | ({"columns": columns} if columns else {})),
    )
    if process_share()[0]:
        return
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        table.figure(figure)
    if json_:
        import json

        typer.echo(json.dumps(table.to_json(), indent=1))
    else:
        typer.echo(str(table))
        if save is not None:
            to = "masks" if probe == "segmentation" else "answers.csv"
            out.print(f"\nnext, its answers for other rows:\n  mmssl predict {save} path/to/files --to {to}")


app.command("embed")(cli_rows.embed)
app.command("predict")(cli_rows.predict)
app.command("compare")(cli_asking.compare)
app.command("audit")(cli_asking.audit)


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, or a run directory.")],
    out_: Annotated[Path | None, typer.Option("--out", help="PNG to write; <recipe>.png by default.")] = None,
    set_: Set = None,
    rows: Annotated[int, typer.Option(help="Samples to draw.")] = 6,
    trust: Trust = False,
) -> None:
    """Draw what the task feeds the network, the target and the prediction."""
    from mmssl.recipe import load

    target = out_ or Path(f"{recipe.resolve().stem}.png")
    trained = recipe.is_dir()
    resolved = load(recipe / "recipe.yaml" if trained else recipe, overrides(set_))
    from mmssl import hub, runs
    from mmssl.build import build
    from mmssl.objectives.base import Step
    from mmssl.report.figures import check_kind, draw_panels
    from mmssl.training.loop import whole_data

    check_kind(target)

    objective, loader = build(resolved, recipe if trained else None, where=str(recipe))
    if trained:
        objective = hub.load(recipe, trust=trust).objective
    else:
        objective.before_step(Step(0, data=lambda: whole_data(loader, "cpu")))
    state = "trained" if trained else "untrained"
    draw_panels(
        runs.preview(objective, loader, rows=rows), target, title=f"{resolved.objective['name']}, {state}", rows=rows
    )
    out.print(str(target))


@app.command("check")
def check_command(
    data: Annotated[str, typer.Argument(help="Anything that a recipe's data.source may be.")],
    split: Annotated[str | None, typer.Option(help="Whose rows are sampled; train, or the first there is.")] = None,
    rows: Annotated[int, typer.Option(help="Size of the sample.", min=1)] = 200,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another key of a data section, such as columns.image=img."),
    ] = None,
) -> None:
    """Read a sample of a source: splits, columns, sizes, durations, broken rows, labels, likely traps."""
    from mmssl.data.check import check
    from mmssl.recipe import data_section

    typer.echo(check(data_section(data, overrides(set_, "data.")), split=split, rows=rows).text())


@app.command("list")
def list_command(
    name: Annotated[
        str | None, typer.Argument(help="An objective, encoder, probe or recipe, for all about it.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Name objectives by family, encoders, probes and recipes; with NAME, tell all about one."""
    from mmssl import catalog

    if name is not None:
        typer.echo(catalog.describe(name, as_json=json_))
    elif json_:
        import json

        typer.echo(json.dumps(catalog.everything(), indent=1))
    else:
        typer.echo(catalog.table())


@app.command()
def export(
    run: RunPath,
    to: Annotated[Path, typer.Option("--to", help="Directory to write.")],
    trust: Trust = False,
) -> None:
    """Write encoders as native files of timm, torchvision, open_clip or transformers, a classifier with its head."""
    from mmssl import hub

    if hub.is_classifier(run):
        hub.export_classifier(hub.load_classifier(run, trust=trust), to)
    else:
        hub.export(hub.load(run, trust=trust), to)
    out.print(f"{to}: see README.md there for the line that loads each encoder without mmssl")


@app.command()
def push(
    run: RunPath,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hub.")],
    dry_run: Annotated[Path | None, typer.Option(help="Write the same files to this folder instead.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    trust: Trust = False,
) -> None:
    """Upload card, weights and recipe of a run, or a fine-tuned classifier, to the Hub."""
    from mmssl import hub

    if hub.is_classifier(run):
        address = hub.push_classifier(run, repo, dry_run=dry_run, private=private, trust=trust)
    else:
        address = hub.push(hub.load(run, trust=trust), repo, dry_run=dry_run, private=private)
    out.print(address)


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run directory, to be examined instead.")
    ] = None,
    media: Annotated[
        bool, typer.Option("--media", help="Try the clocks of all containers and codecs instead; half a minute.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Versions, devices and codecs: what does not work here, and how to mend it. With RUN, the same of a run."""
    if run is not None:
        from mmssl.run_doctor import examine_run

        report, usable = examine_run(run, trust=trust)
    elif media:
        from mmssl.doctor import media as clocks

        typer.echo(clocks())
        return
    else:
        from mmssl.doctor import examine

        report, usable = examine()
    typer.echo(report)
    raise typer.Exit(0 if usable else 1)
