"""Which pretext task, on these rows, gives the encoder that transfers best: one call, one table, one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mmssl.atomic import writing
from mmssl.comparison.cells import alone, fill
from mmssl.comparison.comparison import Comparison
from mmssl.comparison.files import keep_audits, write_table
from mmssl.comparison.measure import check_labels
from mmssl.comparison.page import write_page
from mmssl.comparison.plan import PLAN, make_plan
from mmssl.comparison.plan_of_runs import plan_of_runs
from mmssl.comparison.settings import is_settings, read_settings
from mmssl.comparison.tasks import Task
from mmssl.errors import RecipeError
from mmssl.recipe import Data
from mmssl.registry import check_keywords, find
from mmssl.shots import read_shots
from mmssl.way_on import repeated

P = ParamSpec("P")
T = TypeVar("T")


def _from_file(call: Callable[P, T]) -> Callable[P, T]:
    """The same function, whose first argument may be a file that holds its arguments; those that are given win."""

    @wraps(call)
    def called(*args: P.args, **given: P.kwargs) -> T:
        if len(args) == 1 and is_settings(args[0]):
            return call(**{**read_settings(str(args[0]), call), **given})  # type: ignore[call-arg]
        return call(*args, **given)

    return called


@_from_file
def compare(
    data: str | Data | None = None,
    *,
    runs: Sequence[str | Path] | None = None,
    label: str | None = None,
    tasks: Sequence[str | Task] | None = None,
    modality: str | None = None,
    encoder: str | Mapping[str, Any] | None = None,
    budget: str | None = None,
    seeds: int = 3,
    test: str | None = None,
    out: str | Path = "comparison",
    size: int | None = None,
    seconds: float | None = None,
    batch: int | None = None,
    probe: str = "logistic",
    shots: Sequence[int | str] = (10, 100),
    rates: Sequence[float] = (0.3, 1.0, 3.0),
    finetune: bool = False,
    supervised: bool = True,
    audit: bool = True,
    pretrained: str | Mapping[str, Any] | None = None,
    target: str | None = None,
    groups: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = 10000,
    jobs: int = 1,
    quiet: bool = False,
) -> Comparison:
    """Train tasks on the same rows with the same budget, and see whose encoder knows most, next to baselines.

    Every line is next to the same network before training, the raw input, and the network trained on the labels with
    the same budget. Rates and depths are chosen on held-out training rows; test rows are looked at once. A call that
    was killed goes on where it was when it is repeated, and several processes may share the work of one folder.

    Args:
        data: rows to train on, and their labels: anything that a recipe's `data.source` may be. None goes on with the
            comparison that `out` holds. The first argument may also be a YAML file (`compare("comparison.yaml")`) that
            holds these arguments, `data` as one of them; those of the call win.
        runs: directories, or names on the Hub, of runs to compare in place of tasks; `x-0` and `x-1` are seeds of one
            line, and the rows are those of the first run where `data` is left out. Baselines have the network and the
            budget of most of them.
        label: column; `label` where there is one, such as that of class folders. Without labels tasks are ranked by
            the effective rank of their features (RankMe), next to LiDAR and alpha-ReQ, which is said to be little.
        tasks: names of tasks or recipes, or a `Task` with changes of its own (in a file {recipe: simclr, name: cold,
            set: {objective.temperature: 0.05}}); where left out, every task with a recipe for own files that fits the
            columns and the encoder.
        modality: of the encoder that is compared; what is seen where rows hold pictures or clips, else what is heard.
            The other side of a pair keeps its recipe's encoder.
        encoder: `library/name`, or the arguments of `mmssl.encoder`, for all tasks; that of most recipes where left
            out.
        budget: of each task: `steps=800` (where left out), `samples=1e6` through the encoder, or `minutes=5` of this
            machine.
        seeds: of each line, from 0.
        test: rows to be scored on; the source's own test split, or else a fifth of the rows.
        out: folder of the comparison.
        size: side to which pictures and clips are decoded; tasks that cut tiles keep theirs in proportion.
        seconds: of each sound, that tasks and probes hear; a task hears those of its recipe where left out, which short
            sounds do not fill.
        batch: encoder samples of a step; 256 where left out.
        probe: that learns from few labels; `logistic`, `ridge`, `knn`, `svm`.
        shots: labels a class, or a share of the labeled training rows (of each class its own, at least one), as `1%`;
            none for all labels.
        rates: factors of each recipe's learning rate, one of which is chosen; of runs only of the supervised network's.
        finetune: tune the encoder on the fewest labels as well.
        supervised: train the network on all labels as well.
        audit: ask each task where there is nothing to see as well; see `mmssl audit`.
        pretrained: an encoder of others that becomes a line, as `encoder`.
        target: see `mmssl.adapt`.
        groups: column of what no split may divide, by which intervals are drawn as well.
        columns: batch key -> column, as in a recipe.
        limit: rows of training and of test that probes read, each.
        jobs: processes side by side.
        quiet: print nothing.

    Returns:
        The table; printing it gives text, and `out` holds it as text, Markdown, CSV and parquet.

    Raises:
        RecipeError: for arguments that do not fit, before anything is trained.
        DataError: for rows or labels that cannot be read.
        RunError: where `out` holds another comparison.
    """
    out = Path(out)
    alone()
    if data is not None or runs:
        numbers = {"seeds": seeds, "batch": batch, "jobs": jobs, "size": size, "limit": limit}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise RecipeError(f"{name} = {value}: expected at least 1")
        if seconds is not None and not seconds > 0:
            raise RecipeError(f"seconds = {seconds}: expected more than 0")
        if not rates or min(rates) <= 0:
            raise RecipeError(f"rates = {list(rates)} should be above 0")
        check_keywords(find("probe", probe), {}, f"probe {probe}")
        asked: dict[str, Any] = {
            "test": test,
            "target": target,
            "groups": groups,
            "batch": batch or 256,
            "seeds": tuple(range(seeds)),
            "rates": tuple(map(float, rates)),
            "probe": probe,
            "shots": tuple(map(_shots, shots)),
            "finetune": finetune,
            "audit": audit,
            "limit": limit,
            "pretrained": {"model": pretrained} if isinstance(pretrained, str) else pretrained,
        }
        given = Data(source=data) if isinstance(data, str) else data
        if given is not None and columns:
            given = given.model_copy(update={"columns": {**given.columns, **columns}})
        if runs:
            own = {
                "tasks": tasks,
                "encoder": encoder,
                "seconds": seconds,
                "budget": budget,
                "batch": batch,
                "size": size,
            }
            if besides := [name for name, value in own.items() if value]:
                raise RecipeError(f"runs are compared as they are; leave {', '.join(besides)} out")
            kinds: dict[str, Any] = {"label": label, "modality": modality, "supervised": supervised}
            plan = plan_of_runs([str(one) for one in runs], given, **kinds, **asked)
        else:
            assert given is not None  # there are rows or runs
            trained: dict[str, Any] = {
                "tasks": tasks,
                "modality": modality,
                "encoder": encoder,
                "budget": budget or "steps=800",
                "size": size,
                "seconds": seconds,
                "supervised": supervised,
            }
            plan = make_plan(given, label=label, **trained, **asked)
        check_labels(plan).write(out)
    elif not (out / PLAN).exists():
        raise RecipeError(f"{out} holds no comparison to go on with; name the rows, as in data='path/to/files'")
    with repeated(), writing(out):
        fill(out, jobs=jobs, quiet=quiet)
        found = Comparison.read(out)
        write_table(found)
        write_page(found)
        keep_audits(found)
    return found


def _shots(given: int | str) -> int | str:
    try:
        return read_shots(given)
    except ValueError as error:
        raise RecipeError(f"shots = {given!r} {error}") from None
