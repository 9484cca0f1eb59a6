"""The verbs that ask more than one run can say: compare, audit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from mmssl.cli_options import Set, overrides
from mmssl.errors import RecipeError


def compare(
    ctx: typer.Context,
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE|RUN",
            help="A *.yaml that says what to compare, with these options as keys; or runs, in place of tasks.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to train on, as data.source; left out, --out is gone on with.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels; 'label' where there is one.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks or recipes, as in rotation,simclr; all that fit by default.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Whose encoder is compared, as video or audio of clips; what is seen by default.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="library/name, or '{model: library/name, ...}', for all tasks.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Of each task: steps=800, samples=1e6 or minutes=5.")] = "steps=800",
    seeds: Annotated[int, typer.Option(help="Of each line.")] = 3,
    test: Annotated[str | None, typer.Option(help="Rows to be scored on; the source's own by default.")] = None,
    out_: Annotated[Path, typer.Option("--out", help="Folder of the comparison.")] = Path("comparison"),
    size: Annotated[int | None, typer.Option(help="Side to which pictures are decoded.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Of each sound that is heard; the recipes' by default.")] = None,
    batch: Annotated[int, typer.Option(help="Encoder samples of a step.")] = 256,
    probe: Annotated[str, typer.Option(help="That learns from few labels: logistic, ridge, knn, svm.")] = "logistic",
    shots: Annotated[
        str, typer.Option(help="Labels a class, or a share of all, as in 10,100 or 1%,10%; 0 for all.")
    ] = "10,100",
    rates: Annotated[str, typer.Option(help="Factors of each recipe's learning rate to choose from.")] = "0.3,1,3",
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Tune the encoder on the fewest labels as well.")
    ] = False,
    supervised: Annotated[
        bool, typer.Option(help="Train the network on all labels as well, also next to runs.")
    ] = True,
    audit: Annotated[bool, typer.Option(help="Ask each task where there is nothing to see as well.")] = True,
    pretrained: Annotated[str | None, typer.Option(help="An encoder of others, as a line.")] = None,
    target: Annotated[str | None, typer.Option(help="What the labels are: classes, labels, values.")] = None,
    groups: Annotated[str | None, typer.Option(help="Column that no split may divide.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of training and of test that probes read, each.")] = 10000,
    jobs: Annotated[int, typer.Option(help="Processes side by side.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the data section: columns.image=img."),
    ] = None,
) -> None:
    """Say which pretext task, on these rows, gives the encoder that transfers best; a killed call goes on.

    A file holds the same keys, and tasks with changes: mmssl compare comparison.yaml --seeds 1
    """
    import yaml

    import mmssl
    from mmssl.comparison.settings import is_settings, read_settings
    from mmssl.recipe import data_section

    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}  # an enumeration that typer does not name
    written = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    given: dict[str, Any] = {name: value for name, value in ctx.params.items() if name in written - {"runs", "set_"}}
    if "out_" in given:
        given["out"] = given.pop("out_")
    if tasks is not None:
        given["tasks"] = [task for task in tasks.split(",") if task]
    if "shots" in written:
        given["shots"] = [k for k in shots.replace(" ", "").split(",") if k not in ("", "0")]
    if "rates" in written:
        try:
            given["rates"] = [float(part) for part in rates.split(",") if part.strip()]
        except ValueError:
            raise RecipeError(f"rates = {rates!r}: expected numbers with commas between them, as 0.3,1,3") from None
    if pretrained is not None:
        given["pretrained"] = yaml.safe_load(pretrained)
    files = [one for one in runs or [] if is_settings(one)]
    if len(files) > 1:
        raise RecipeError(f"{' and '.join(files)}: one file says what is compared")
    if directories := [one for one in runs or [] if one not in files]:
        given["runs"] = directories
    settings = (read_settings(files[0], mmssl.compare) if files else {}) | given
    if set_:
        if settings.get("data") is None:
            raise RecipeError("--set changes how rows are read; name them with --data")
        settings["data"] = data_section(settings["data"], overrides(set_, "data."))
    first = os.environ.get("RANK", "0") == "0"  # of processes that share the work
    found = mmssl.compare(**settings)
    if first:
        typer.echo(f"\n{found}")


def audit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, or a run directory.")],
    data: Annotated[
        str | None, typer.Option(help="Rows whose kinds of files are audited; the recipe's by default.")
    ] = None,
    planted: Annotated[bool, typer.Option("--planted", help="Plant lens and file artifacts as well.")] = False,
    steps: Annotated[int, typer.Option(help="Of each small training.", min=1)] = 150,
    rows: Annotated[int, typer.Option(help="Rows of each arm; of sounds a quarter, clips an eighth.", min=64)] = 1024,
    seed: Annotated[int, typer.Option(help="Of pictures, weights and draws.")] = 0,
    set_: Set = None,
) -> None:
    """Ask whether the task can be answered where there is nothing to see; exit code 1 where it leaks."""
    from mmssl.audit.own_files import audit_recipe
    from mmssl.recipe import Data, load
    from mmssl.run_directory import Audited, keep_audit

    resolved = load(recipe / "recipe.yaml" if recipe.is_dir() else recipe, overrides(set_))
    found = audit_recipe(
        resolved, None if data is None else Data(source=data), planted=planted, steps=steps, rows=rows, seed=seed
    )
    typer.echo(str(found))
    if recipe.is_dir() and not set_:
        keep_audit(recipe, Audited(found.verdict, str(found)))
    raise typer.Exit(1 if found.verdict == "leaks" else 0)
