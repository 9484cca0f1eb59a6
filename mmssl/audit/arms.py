"""Which data without structure a task is asked about, and why it is asked about none.

    python scripts/arms.py        the table of docs/results.md, of every task in every modality

A kind of null holds for a task by what the task is: what it reads, whether it has right answers, where its rows meet,
whether it has views or sides or hides something. It holds no longer where small networks cannot stand in for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from mmssl.audit.clips import reads_clips
from mmssl.audit.edges import CutsTiles
from mmssl.audit.gradients import Conceals
from mmssl.audit.networks import SmallSoundNetwork, stand_in
from mmssl.audit.pairs import compares_sides
from mmssl.audit.sounds import reads_sounds
from mmssl.audit.texts import reads_sentences
from mmssl.audit.twins import small_hearing, two_views
from mmssl.batch import Batch
from mmssl.encoders.text import TextEncoder
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.objectives.base import Objective
from mmssl.objectives.combine import Combine
from mmssl.recipe import Recipe

Null = Literal["pictures", "clips", "sounds", "texts", "pairs", "twins", "none"]
NULLS: Mapping[Null, str] = {
    "pictures": "noise and one color, in files",
    "clips": "noise in files, moving and still, where it cuts; with sound also silence, and own clips swapped",
    "sounds": "white and 1/f noise, in files",
    "texts": "own words in random order",
    "pairs": "own rows, each side from another",
    "twins": "one own row many times",
    "none": "none",
}
HIDDEN = "what is seen may tell what is hidden, which is the task; gradients ask whether an answer sees it"
SHOWN = "it is shown what it has to give back, or learns what another network says of it"
CLUSTERS = "its classes are clusters of the rows, and noise has clusters, which can be told"
WITHIN = "it compares moments of a row, which are told by how far frames of its own network overlap"
DROPOUT = "its views differ by what the network drops, and by nothing in the rows"
REMEMBERED = "it has one view of each row and remembers rows by their number; noise is told apart"
ALONE = "it is several tasks; audit each of them alone"
SEVERAL = "it has several sources; audit it with one of them"


class Asked(NamedTuple):
    """What an audit asks a task.

    Attributes:
        null: the kind of data without structure.
        why: there are none, in words; empty where there are.
        edges: whether tiles are compared edge by edge.
        hidden: whether gradients ask about what is hidden, besides other rows.
    """

    null: Null
    why: str
    edges: bool
    hidden: bool


def asked_of(objective: Objective, recipe: Recipe, inputs: Batch) -> Asked:
    """What holds for a task.

    Args:
        objective: of the recipe.
        recipe: its sources, and the encoders that small networks would stand in for.
        inputs: what its transform made of a batch.
    """
    null, why = _null_of(objective, recipe, inputs)
    if null != "none":
        try:
            hearing = small_hearing if null == "twins" else SmallSoundNetwork
            stand_in(recipe, tokenizers_by_name(objective), hearing=hearing)
        except RecipeError as error:
            null, why = "none", str(error)
    return Asked(null, why, isinstance(objective, CutsTiles), isinstance(objective, Conceals))


def _null_of(objective: Objective, recipe: Recipe, inputs: Batch) -> tuple[Null, str]:
    needs = set(objective.needs)
    levels = objective.chance(2).metrics
    told = any(name.startswith(("accuracy", "ranking")) for name in levels)
    if isinstance(objective, Combine):
        return "none", ALONE
    if len(recipe.sources()) > 1:
        return "none", SEVERAL
    if isinstance(objective, Conceals):
        return "none", HIDDEN
    if objective.drawn_together(inputs):
        if needs == {"text"}:
            return "none", DROPOUT
        return ("twins", "") if two_views(objective, inputs) is not None else ("none", REMEMBERED)
    if reads_sentences(objective):
        return "texts", ""
    if not told:
        return "none", SHOWN
    if type(objective).before_step is not Objective.before_step and objective.meets == "nowhere":
        return "none", CLUSTERS
    if reads_clips(objective) and (objective.meets != "loss" or needs == {"video", "audio"}):
        return "clips", ""
    if compares_sides(objective):
        return "pairs", ""
    if objective.meets == "loss":
        return "none", WITHIN
    if reads_sounds(objective):
        return "sounds", ""
    return ("pictures", "") if needs == {"image"} else ("none", f"no data without structure hold {' and '.join(needs)}")


def tokenizers_by_name(objective: Objective) -> dict[str, Tokenizer]:
    """Name of each text encoder -> its tokenizer."""
    encoders = {name: objective.encoder(name) for name in objective.encoders}
    return {name: one.tokenizer for name, one in encoders.items() if isinstance(one, TextEncoder)}
