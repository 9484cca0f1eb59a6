"""The shortcut audit: can a pretext task be solved where there is nothing to see?

A small network learns the task on pictures without structure, through everything that real pictures go through: bytes
of a file, decoder, resize, crop, the task's own transform, the loop. What it gets right above chance on pictures that
it has not seen, it knows from an artifact, and the features of any network trained on this task may be of no more use
than that. The opposite proves something only if the audit can see: rings planted in the same pictures must be found.

    audit(recipe)                                      every kind of file, white noise
    audit(recipe, [Arm(artifact="vignetting")])        does the task resist it?
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from mmssl.audit.networks import stand_in
from mmssl.audit.nulls import FILES, PLATE, Arm, write
from mmssl.batch import Batch, count_rows, to_device
from mmssl.data.loader import Loader, read
from mmssl.encoders.text import tokenizers_of
from mmssl.errors import RecipeError
from mmssl.objectives.base import Objective
from mmssl.ops.draws import Draws, mix_seed
from mmssl.ops.intervals import wilson
from mmssl.recipe import Data, Optimizer, Recipe, Schedule, Training
from mmssl.training.loop import fit

# Every kind of file as it is decoded, and two kinds of noise that are more like photographs.
ARMS = (Arm("constant"), *(Arm(file=file) for file in FILES), Arm("natural"), Arm("phases"))
CONFIDENCE = 0.99
TEXTURES = 256


@dataclass(frozen=True)
class Finding:
    """What the audit found with one kind of data.

    Attributes:
        arm: the data.
        accuracy: share of right answers on pictures that were not trained on.
        chance: of guessing.
        low, high: Wilson's 99 % interval, with one trial a picture: the views of a picture are not independent.
        z: distance from chance in standard errors of a guess.
        verdict: `leaks` where the interval is above chance; else `clean` if the control was found, and `no power` if
            not.
    """

    arm: Arm
    accuracy: float
    chance: float
    low: float
    high: float
    z: float
    verdict: Literal["clean", "leaks", "no power"]


def audit(
    recipe: Recipe,
    arms: Sequence[Arm] = ARMS,
    *,
    steps: int = 150,
    batch_size: int = 16,
    rows: int = 1024,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Measure each kind of structure-free data, and for each null and scale among them the control.

    Args:
        recipe: see `measure`.
        arms: kinds of data.
        steps: see `measure`.
        batch_size: see `measure`.
        rows: see `measure`.
        seed: see `measure`.
        report: called with each finding as soon as it is there.

    Returns:
        One finding an arm, in order, each control before the first arm that needs it.
    """
    controls: dict[Arm, Finding] = {}
    found: list[Finding] = []

    def add(finding: Finding) -> Finding:
        found.append(finding)
        report(finding)
        return finding

    for arm in arms:
        control = control_of(arm)
        if control not in controls:
            controls[control] = add(measure(recipe, control, steps=steps, batch_size=batch_size, rows=rows, seed=seed))
        one = measure(recipe, arm, steps=steps, batch_size=batch_size, rows=rows, seed=seed)
        add(with_control(one, controls[control]))
    return found


def control_of(arm: Arm) -> Arm:
    """The same pictures in lossless files, with the rings planted."""
    return Arm(null=arm.null, artifact=PLATE, scale=arm.scale)


def with_control(finding: Finding, control: Finding) -> Finding:
    """The finding, `no power` in place of `clean` where the control was not found."""
    blind = finding.verdict == "clean" and control.verdict != "leaks"
    return replace(finding, verdict="no power") if blind else finding


def measure(
    recipe: Recipe, arm: Arm, *, steps: int = 150, batch_size: int = 16, rows: int = 1024, seed: int = 0
) -> Finding:
    """Train a small network on one kind of structure-free pictures and test it on others of that kind.

    Args:
        recipe: its objective and the decode settings of its data are audited. A small network stands in for its
            encoders, and its pictures are read for the null `phases` only.
        arm: the kind of data.
        steps: of training.
        batch_size: pictures a step.
        rows: pictures that are trained on, over and over, and as many others that are tested.
        seed: of pictures, initialization and draws.

    Raises:
        RecipeError: for a task that reads something else than images of one source, or logs no accuracy.
    """
    return measure_task(small(recipe, seed), recipe, arm, steps=steps, batch_size=batch_size, rows=rows, seed=seed)


def measure_task(
    objective: Objective, recipe: Recipe, arm: Arm, *, steps: int, batch_size: int, rows: int, seed: int
) -> Finding:
    """`measure` of a task as it is, over whatever networks it has."""
    accuracy_of(objective)  # before anything is written or trained
    with tempfile.TemporaryDirectory() as folder:
        data = files(recipe, arm, Path(folder) / "train", rows, mix_seed(seed, "train"))
        train(objective, data, steps=steps, batch_size=batch_size, seed=seed)
    return judge(arm, objective, unseen(recipe, objective, arm, rows, seed))


def train(objective: Objective, data: Data, *, steps: int, batch_size: int, seed: int) -> None:
    """The small training of every arm, by the one loop; see `measure`."""
    tokenizers = tokenizers_of(objective.exported)
    loader = Loader({"": data}, objective.needs, batch_size=batch_size, seed=seed, tokenizers=tokenizers)
    train_on(objective, loader, steps=steps, batch_size=batch_size, seed=seed)


def train_on(objective: Objective, loader: Loader, *, steps: int, batch_size: int, seed: int) -> None:
    """`train` with batches of a loader."""
    training = Training(
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        log_every=steps,
        optimizer=Optimizer(lr=2e-3),
        schedule=Schedule(warmup=steps // 10),
    )
    fit(objective, loader, training, quiet=True)


@torch.no_grad()
def judge(arm: Arm, objective: Objective, unseen: Iterable[Batch], *, matched: int | None = None) -> Finding:
    """What a task that was trained gets right of inputs that it was not trained on; `matched` as in `accuracy_of`.

    Raises:
        RecipeError: where it asks nothing of such inputs.
    """
    metric, chance = accuracy_of(objective, matched)
    objective.eval()
    right, count = 0.0, 0
    for inputs in unseen:
        # Of a task that asks nothing of some rows, those that it asks.
        asked = int(inputs[objective.divisors[0]]) if objective.divisors else count_rows(inputs)
        right += objective(inputs)[metric].item() * asked
        count += asked
    if not count:
        raise RecipeError(f"{arm.null} is nothing that the task asks about, so that there is no such arm")
    return finding(arm, right / count, chance, count)


def small(recipe: Recipe, seed: int) -> Objective:
    """The recipe's task over small networks, with fresh weights.

    Raises:
        RecipeError: for a recipe that does not read images of one source.
    """
    modalities = {given.get("modality", name) for name, given in recipe.encoders.items()}
    if len(recipe.sources()) > 1 or modalities != {"image"}:
        raise RecipeError("structure-free pictures stand for one source of images, and encoders that read them")
    return stand_in(recipe, seed=seed)


def unseen(recipe: Recipe, objective: Objective, arm: Arm, rows: int, seed: int) -> Iterator[Batch]:
    """What the task's transform makes of pictures that are not trained on."""
    device = next(objective.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        data = files(recipe, arm, Path(folder) / "test", rows, mix_seed(seed, "test"))
        for step, batch in enumerate(read(data, objective.needs)):
            draws = Draws(seed, step, count_rows(batch), device=device, stream="unseen")
            yield objective.transform(to_device(batch, device), draws)


def finding(arm: Arm, accuracy: float, chance: float, rows: int) -> Finding:
    """The interval and the verdict; `clean` holds only if the control is found."""
    low, high = wilson(accuracy, rows, CONFIDENCE)
    z = (accuracy - chance) / math.sqrt(chance * (1 - chance) / rows)
    return Finding(arm, accuracy, chance, low, high, z, "leaks" if low > chance else "clean")


def table(findings: Sequence[Finding]) -> str:
    """Markdown, a line a finding."""
    lines = [
        "| pictures | files | planted | right | 99 % interval | chance | z | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in findings:
        size = "" if f.arm.scale == 1 else f", {f.arm.scale:g}x the size"
        lines.append(
            f"| {f.arm.null} | {f.arm.file}{size} | {f.arm.artifact} | {f.accuracy:.1%} | {f.low:.1%} to {f.high:.1%} "
            f"| {f.chance:.1%} | {f.z:.1f} | {f.verdict} |"
        )
    return "\n".join(lines)


def accuracy_of(objective: Objective, matched: int | None = None) -> tuple[str, float]:
    """Name and level of the entry that counts right answers; `ranking` where there is one, which needs no threshold.

    Args:
        objective: the task.
        matched: rows of a batch in which a task matches two sides that have nothing to do with each other; None where
            answers must not be about other rows.

    Raises:
        RecipeError: for a task that has none, or whose answers are about other pictures.
    """
    levels = objective.chance(matched or 2).metrics
    found = [(key, level) for name in ("ranking", "accuracy") for key, level in levels.items() if key.startswith(name)]
    if (objective.meets == "loss" and matched is None) or not found:
        raise RecipeError(
            f"structure-free data ask tasks that predict what was done to them; {type(objective).__name__} "
            + ("compares rows, and two rows of noise are easily told apart" if found else "logs no accuracy")
        )
    return found[0]


def files(recipe: Recipe, arm: Arm, folder: Path, rows: int, seed: int) -> Data:
    """Write `rows` pictures; returns how to read them, with the recipe's decode settings."""
    source = next(iter(recipe.sources().values()))
    image = source.image
    textures = None
    if arm.null == "phases":
        decoded = image.model_copy(update={"size": round(image.size * arm.scale), "fit": "crop"})
        some = source.model_copy(update={"limit": TEXTURES, "image": decoded})
        textures = torch.cat([batch["image"] for batch in read(some, ("image",))]).permute(0, 2, 3, 1).numpy()
    write(folder, arm, rows, image.size, seed, textures)
    return Data(source=str(folder), image=image)
