"""The audit of a recipe on a user's own kind of files: every arm that holds for the task, with what mends it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, JpegImagePlugin

from mmssl import recipe as recipes
from mmssl.audit.arms import asked_of, tokenizers_by_name
from mmssl.audit.clip_rows import MOVING, MUTE, POSITION, RECODED, STILL, SWAPPED, clip_kinds
from mmssl.audit.clips import audit_clips
from mmssl.audit.edges import BLURRED, edges
from mmssl.audit.gradients import Leak, leaks
from mmssl.audit.nulls import FILES, UNLIKE, Arm
from mmssl.audit.nulls import planted as planted_arm
from mmssl.audit.pairs import STRANGERS, audit_pairs
from mmssl.audit.shortcuts import Finding, audit
from mmssl.audit.sounds import HISS, OCTAVES, audit_sounds, sound_kinds
from mmssl.audit.texts import audit_texts
from mmssl.audit.twins import TWINS, audit_twins
from mmssl.batch import count_rows
from mmssl.build import build
from mmssl.data.base import MapSource
from mmssl.data.columns import find_column
from mmssl.data.sources import open_source
from mmssl.errors import DataError, RecipeError
from mmssl.media.image import open_image
from mmssl.ops.draws import Draws
from mmssl.recipe import Data, Recipe

SAMPLE = 200
SOUNDS = 4  # pictures that make one sound in `rows`, of which a task hears several windows
CLIPS = 8  # pictures that make one clip in `rows`: writing and reading a clip takes so much longer, and more
LONGER = 2  # of clips, as a planted clock was found late by `playback_speed`, which jitters colors frame by frame
PLANTED = ("green shift", "red-blue shift", "vignetting", "watermark", "squash", "resaved 4:2:2")
SAMPLINGS = {0: "jpeg 4:4:4", 1: "jpeg 4:2:2", 2: "jpeg 4:2:0"}
EDGES = "edges that continue each other, by hand"
OWN_ROWS = " or rows of your own"
GRADIENTS = "clean by gradients"
"""The verdict where no other arm holds for a task."""
REMEDIES = {
    "blurred": "a gap of some pixels between tiles: gap of jigsaw and relative_position",
    "green shift": "drop or projection hide it where the task has them",
    "red-blue shift": "one channel hides it: drop=1 of jigsaw, color=drop of relative_position",
    "vignetting": "flat_field=true of jigsaw and relative_position",
    "watermark": "views.margin=0.2, or as much as the mark is wide",
    "squash": "decode with fit: crop or squeeze, never with the aspect lost",
    MOVING: "video.fps lower than the files', or frames farther apart, so that fewer lie between two key frames",
    STILL: "what a codec does tells it: start: random or middle, away from where it begins, and frames farther apart",
    MUTE: "what is seen tells it: frames farther apart, or start: random",
    SWAPPED: "clips tell it by how long their tracks are, or where they begin: start: random, and clips of full length",
    POSITION: "where it cuts tells it: one draw of the place for all answers, and clips much longer than what is cut",
    RECODED: "no codec tells it, since it is told in files of another: where the task cuts, or how it crops",
    **dict.fromkeys(
        (HISS, OCTAVES),
        "what a codec cuts off tells it: a data.audio.rate that ends below that, or lossless files",
    ),
    STRANGERS.null: "both sides share a draw, or know the row's number: draw each side on its own",
    TWINS.null: "both views share a draw: draw each on its own",
    "resaved 4:2:2": "read the JPEG files, whose colors are then made even, or save pictures as 4:2:0 or 4:4:4",
}


@dataclass
class Audit:
    """What was found.

    Attributes:
        task: its name.
        files: kind of file -> how many rows of the sample are such.
        findings: of data without structure, controls among them.
        edges: of the solver by hand; None where the task lays no tiles.
        leaks: what answers depend on, of what they should not: other rows, what is hidden, later tokens.
        notes: what could not be asked, a sentence each.
        unasked: whether there are data without structure for the task, and none of them could be asked about.
    """

    task: str
    files: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    edges: Finding | None = None
    leaks: list[Leak] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unasked: bool = False

    @property
    def answered(self) -> list[Finding]:
        """Arms that are answered above chance, without the control, which should be."""
        found = [one for one in self.findings if one.verdict == "leaks" and not one.arm.is_control]
        return found + ([self.edges] if self.edges and self.edges.verdict == "leaks" else [])

    @property
    def seen(self) -> list[Leak]:
        """What answers depend on and should not."""
        return [leak for leak in self.leaks if leak.leaks]

    def __str__(self) -> str:
        """Plain text."""
        lines = [f"audit of {self.task}"]
        if self.files:
            lines.append(f"  files     {', '.join(f'{name} {count}' for name, count in self.files.items())}")
        for one in self.findings:
            lines.append(f"  {verdict_of(one):<18}{_words(one.arm):<58}{_numbers(one)}{self._remedy(one)}")
        if self.edges is not None:
            lines.append(f"  {self.edges.verdict:<18}{EDGES:<58}{_numbers(self.edges)}{self._remedy(self.edges)}")
        lines += [f"  {leak.verdict:<18}{leak.text}" for leak in self.leaks]
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join([*lines, self.sentence])

    @property
    def verdict(self) -> str:
        """In a few words: `leaks`, `no power`, `at chance`, or `GRADIENTS`."""
        if self.answered or self.seen:
            return "leaks"
        if self.unasked or any(one.verdict == "no power" for one in self.findings):
            return "no power"
        return "at chance" if self.findings else GRADIENTS

    @property
    def sentence(self) -> str:
        """The verdict on all arms."""
        parts = []
        if self.answered:
            parts.append(f"can be answered without seeing anything: {'; '.join(_words(o.arm) for o in self.answered)}")
        if self.seen:
            parts.append("; ".join(leak.text for leak in self.seen))
        if parts:
            return f"{self.task} leaks: {'; and '.join(parts)}"
        arms = [one for one in self.findings if not one.arm.is_control]
        if blind := [one.arm for one in arms if one.verdict == "no power"]:
            where = "; ".join(map(_words, blind))
            where = f" in {len(blind)} of {len(arms)} arms ({where})" if len(blind) < len(arms) else ""
            few = {SWAPPED: " or clips of your own", STRANGERS.null: OWN_ROWS, TWINS.null: OWN_ROWS}
            own = next((few[arm.null] for arm in blind if arm.null in few), "")
            nothing = f"{self.task}: nothing was found, and the control was not either{where}"
            return f"{nothing}, which says little; mmssl audit with more --steps or --rows{own}"
        if not arms:
            none = "there are no data without structure to ask it about, as the note says"
            some = f"data without structure could not be asked about, see the note{'s' * (len(self.notes) > 1)}"
            exact = f"{self.task}: no answer depends on what it should not, by gradients"
            return f"{exact}; {some if self.unasked else none}"
        where = f"in all {len(arms)} arms" if len(arms) > 1 else "in its arm"
        least = max(arms, key=lambda one: one.high - one.chance)  # that leaves most open
        bound = f"at most {least.high:.1%} right, chance {least.chance:.1%}"
        return f"{self.task}: at chance {where} ({bound}), and what was planted in the same data is found"

    def _remedy(self, one: Finding) -> str:
        known = REMEDIES.get(one.arm.artifact) or REMEDIES.get(one.arm.null)
        return f"  -> {known}" if one.verdict == "leaks" and known and not one.arm.is_control else ""


def verdict_of(one: Finding) -> str:
    """What an arm says of the task; of a control whether it was found, as it should be."""
    control = f"control {'found' if one.verdict == 'leaks' else 'not found'}"
    return control if one.arm.is_control else one.verdict


def line_of(one: Finding) -> str:
    """What is said of an arm as soon as it was asked."""
    return f"{_words(one.arm)}: {verdict_of(one)}, {_numbers(one)}"


def _words(arm: Arm) -> str:
    if arm == BLURRED:
        return EDGES
    if arm.artifact == UNLIKE:
        return "own rows that differ"
    planted = f", {arm.artifact} planted" if arm.artifact != "none" else ""
    null = {
        "constant": "one color",
        "natural": "1/f² noise",
        "phases": "own pictures, random phases",
        "words": "own words in random order",
        STRANGERS.null: STRANGERS.null,
        TWINS.null: TWINS.null,
        HISS: "white noise",
        OCTAVES: OCTAVES,
        **{name: name for name in (MOVING, STILL, MUTE, SWAPPED, POSITION, RECODED)},
    }
    file = f", {arm.file}{' larger' if arm.scale > 1 else ''}" if arm.null not in (STRANGERS.null, TWINS.null) else ""
    return f"{null.get(arm.null, 'white noise')}{file}{planted}"


def _numbers(one: Finding) -> str:
    return f"{one.accuracy:.1%} right ({one.low:.1%} to {one.high:.1%}), chance {one.chance:.1%}"


def audit_recipe(
    recipe: str | Path | Recipe,
    data: Data | None = None,
    *,
    planted: bool = False,
    steps: int = 150,
    rows: int = 1024,
    seed: int = 0,
    report: Callable[[Finding], None] = lambda finding: None,
) -> Audit:
    """Every arm that holds for the task of a recipe or of a run's directory.

    Which data without structure a task is asked about is in `mmssl.audit.arms`. Of a task on the order of sentences
    they are the user's own words in random order: see `mmssl.audit.texts`. Of tasks on sounds they are noise in files
    of the user's kinds: see `mmssl.audit.sounds`. Of tasks on clips and their sound they are clips of noise, and the
    user's own with each other's sound: see `mmssl.audit.clips`. Of pairs they are the user's own, each side from
    another row, and of views one row many times: see `mmssl.audit.pairs` and `mmssl.audit.twins`.
    Structure-free pictures go through files of the kinds that the source has, decoder, crop and transform; a small
    network must stay at chance on them, and find rings that are planted. Tiles are also compared edge by edge, and
    gradients tell, exactly, whether an answer depends on other rows of the batch, on what is hidden or on later tokens.

    Args:
        recipe: a name, a file, a run's directory, or the recipe.
        data: rows in place of the recipe's.
        planted: plant lens and file artifacts as well, which the task should resist.
        steps: of each small training; of clips twice as many.
        rows: pictures of each arm, or texts; of sounds a quarter as many, and of clips an eighth; of own rows at most.
        seed: of all.
        report: is called with each finding as soon as it is there.

    Raises:
        RecipeError: for a recipe that cannot be built.
        DataError: for a source that cannot be read.
    """
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        recipe = recipes.load(path / "recipe.yaml" if path.is_dir() else path)
    if data is not None:
        if len(recipe.sources()) > 1:
            raise RecipeError("the recipe has several sources; audit it with its own")
        own = next(iter(recipe.sources().values()))
        given = data.model_dump(include={"source", "split", "config", "columns", "limit"})
        recipe = recipe.model_copy(update={"data": own.model_copy(update=given)})
    few = recipes.load(
        recipe.model_dump(mode="json", exclude_none=True), {"training.batch_size": 4, "training.workers": 0}
    )
    objective, loader = build(few)
    found = Audit(recipe.objective["name"])
    batch = next(loader.batches(0, 1))
    objective.eval()
    inputs = objective.transform(batch, Draws(seed, 0, count_rows(batch)))
    asked = asked_of(objective, recipe, inputs)
    source = next(iter(recipe.sources().values()))
    if asked.why:
        found.notes.append(f"there are no data without structure to ask about: {asked.why}")
    if "image" in objective.needs:
        found.files = kinds_of(source)
    elif asked.null in ("clips", "sounds"):
        found.files = clip_kinds(source) if asked.null == "clips" else sound_kinds(source)
    kinds = [kind for kind in found.files if kind in FILES] or ["png"]
    if asked.null == "pictures":
        others = [kind for kind in found.files if kind not in FILES]
        found.notes += [f"no arm has files of the kind {kind}, which are not written here" for kind in others]
    arms = [Arm("constant", kinds[0]), *(Arm(file=kind) for kind in kinds), Arm("natural", kinds[0])]
    arms += [Arm("phases", kinds[0])] + [planted_arm(name) for name in PLANTED if planted]
    small = {"steps": steps, "rows": rows}
    try:
        match asked.null:
            case "pictures":
                found.findings = audit(recipe, arms, **small, seed=seed, report=report)
            case "texts":
                found.findings = audit_texts(recipe, tokenizers_by_name(objective), **small, seed=seed, report=report)
            case "pairs":
                found.findings = audit_pairs(
                    recipe, objective.needs, tokenizers_by_name(objective), **small, seed=seed, report=report
                )
            case "twins":
                found.findings = audit_twins(recipe, objective.needs, **small, seed=seed, report=report)
            case "sounds":
                found.findings, notes = audit_sounds(
                    recipe, found.files, planted=planted, steps=steps, rows=rows // SOUNDS, seed=seed, report=report
                )
                found.notes += notes
            case "clips":
                longer = {"steps": LONGER * steps, "rows": rows // CLIPS}
                found.findings, notes = audit_clips(
                    recipe, found.files, planted=planted, **longer, seed=seed, report=report
                )
                found.notes += notes
        if asked.edges:
            found.edges = edges(recipe, rows=rows, seed=seed)
    except RecipeError as error:
        found.notes.append(str(error))
    found.unasked = asked.null != "none" and not found.findings
    found.leaks = leaks(objective, batch)
    return found


def kinds_of(data: Data) -> dict[str, int]:
    """How a sample of a source's pictures is stored, the most frequent first, in the words of `FILES` if possible."""
    source = open_source(data)
    try:
        column = find_column(data, "image", source.columns)
    except DataError:
        return {}
    if not isinstance(source, MapSource):
        return {}
    counts: Counter[str] = Counter()
    total = len(source)
    chosen = source.select([column])
    for place in range(0, total, max(1, total // SAMPLE)):
        try:
            picture, _ = open_image(chosen.row(place)[column])
        except DataError:
            continue
        counts[_kind(picture)] += 1
    return dict(counts.most_common())


def _kind(picture: Image.Image) -> str:
    if isinstance(picture, JpegImagePlugin.JpegImageFile):
        return SAMPLINGS.get(JpegImagePlugin.get_sampling(picture), "jpeg")
    if picture.mode == "P":
        return "palette"
    if "A" in picture.mode:
        return "alpha"
    return "png" if picture.format in (None, "PNG", "BMP", "TIFF") else str(picture.format).lower()
