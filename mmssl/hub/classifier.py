"""What a probe trained, as a folder: the encoder with its head, and all that it takes to answer for new rows.

    classifier.json      encoder, target or head, how rows are decoded, the table of scores
    model.safetensors    encoder and head
    tokenizers/          of an encoder of texts
    README.md            what it is

As of a run, nothing in such a folder is unpickled, imported or fetched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from mmssl.adaptation.features import inputs_of
from mmssl.adaptation.probes._dense import Built, DenseTask
from mmssl.adaptation.probes._unfinished import Trained
from mmssl.adaptation.probes.detection import Detecting
from mmssl.adaptation.probes.finetune import Supervised
from mmssl.adaptation.probes.segmentation import Pixels
from mmssl.adaptation.rows import SourceSplit
from mmssl.adaptation.table import Table
from mmssl.adaptation.targets.base import Target
from mmssl.batch import Batch, to_device
from mmssl.encoders import create
from mmssl.encoders.base import Encoder
from mmssl.errors import MmsslError, RecipeError, RunError
from mmssl.hub.bounds import check_finite, check_numbers, no_larger_than
from mmssl.hub.classifier_card import classifier_card, heading_of
from mmssl.hub.export import fill
from mmssl.hub.privacy import public_table
from mmssl.hub.pull import WEIGHTS, check_arguments, check_files, download
from mmssl.hub.scores import HUB_NAME
from mmssl.media.text import Tokenizer
from mmssl.modules.mode import evaluating
from mmssl.objectives.base import Objective
from mmssl.recipe import Data
from mmssl.registry import components, find
from mmssl.schema import Section
from mmssl.schema import fill as filled
from mmssl.training.checkpoint import load_weights, tensors
from mmssl.version import __version__

FILE = "classifier.json"
TOKENIZER = "tokenizers/encoder"
HEADS: dict[str, type[Built]] = {"segmentation": Pixels, "detection": Detecting}
LARGEST = 1 << 26
UNDECODED = "batches do not say how rows are decoded for it; give a source, or a recipe's data section (data=)"


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned encoder with its head.

    Attributes:
        objective: both, in evaluation mode.
        decoding: how rows are decoded.
        label: the column that it learned.
        table: its scores, on rows that it did not learn from.
    """

    objective: Supervised
    decoding: Data
    label: str
    table: Table

    @property
    def encoder(self) -> Encoder:
        """The one that was tuned."""
        (encoder,) = self.objective.exported.values()
        return encoder

    @property
    def target(self) -> Target:
        """What the answers are; `target.decode(answers)` puts them in words."""
        return self.objective.target

    def answer(self, batch: Batch) -> Tensor:
        """Chances of classes or labels, or values in their units, float32 (B, width) on the CPU.

        Args:
            batch: with the key of the encoder's modality and, where some of it is padding, its mask; on any device.
        """
        keys = [key for key in inputs_of(self.encoder) if key in batch]
        with evaluating(self.objective), torch.no_grad():
            device = next(self.objective.parameters()).device
            return self.objective.answer(to_device({key: batch[key] for key in keys}, device)).float().cpu()


@dataclass(frozen=True)
class DenseClassifier:
    """An encoder with a head that answers for places of a picture.

    Attributes:
        objective: both, in evaluation mode.
        decoding: how pictures are decoded.
        label: the column that it learned.
        table: its scores, on rows that it did not learn from.
    """

    objective: DenseTask
    decoding: Data
    label: str
    table: Table

    @property
    def encoder(self) -> Encoder:
        """The one that the head is on."""
        encoder = self.objective.reads
        assert encoder is not None  # what is saved reads pictures
        return encoder

    def answer(self, batch: Batch) -> Tensor:
        """Class numbers of pixels, uint8 (B, H, W), or boxes, float32 (B, 100, 6), see `Boxes`; on the CPU.

        Args:
            batch: with the key `image`; on any device. Answers are about the square that it holds.
        """
        with evaluating(self.objective), torch.no_grad():
            device = next(self.objective.parameters()).device
            inputs = {key: batch[key] for key in self.objective.inputs}
            return self.objective.answer(to_device(inputs, device)).cpu()


class Stored(Section):
    """What classifier.json holds.

    `encoder`, and `target` or `head`, are the arguments that build them again: a target of what fine-tuning trained, a
    head of what answers for places.
    """

    version: str
    encoder: dict[str, Any]
    target: dict[str, Any] = Field(default_factory=dict)
    head: dict[str, Any] | None = None
    decoding: Data
    label: str
    origin: dict[str, str]
    table: dict[str, Any]


def is_classifier(folder: str | Path) -> bool:
    """Whether a folder says that it is one."""
    return (Path(folder) / FILE).is_file()


def check_room(folder: str | Path) -> None:
    """Raise RunError where `save_classifier` would refuse to write."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already; name another folder for the classifier, or remove it")


def save_classifier(folder: str | Path, trained: Trained, table: Table, decoding: Data | None = None) -> Path:
    """Write a folder that `load_saved` reads, whole or not at all.

    Args:
        folder: absent or empty.
        trained: by the probe `finetune`, `segmentation` or `detection`.
        table: its scores.
        decoding: of the rows, where they came as batches.

    Raises:
        RecipeError: for batches of which nobody said how they were decoded.
        RunError: where weights are not finite, the folder is in use, or the disk refuses.
    """
    objective, split = trained
    encoder, kind, names = _parts(objective)
    how = split.spec if isinstance(split, SourceSplit) else decoding
    if how is None:
        raise RecipeError(UNDECODED)
    if "target" in kind and kind["target"]["name"] not in components("target"):
        raise RecipeError(f"'{table.label}' is read by a target outside mmssl, of which no classifier can be saved")
    check_room(folder)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in tensors(objective).items()}
    check_finite(weights.items(), Path(folder))
    modality = encoder.modality
    decoded = how.model_dump(mode="json", include={modality, "start"}, exclude_none=True)
    columns = {key: name for key, name in how.columns.items() if key == modality}
    tree = {
        "version": __version__,
        "encoder": {key: value for key, value in encoder.spec.items() if key != "tokenizer"},
        **kind,
        "decoding": {"source": "files", "columns": columns, **decoded},
        "label": table.label,
        "origin": dict(encoder.origin),
        "table": public_table(table.to_json()),
    }

    def write(temporary: Path) -> None:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        tokenizer = getattr(encoder, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER)
        (temporary / FILE).write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
        card = classifier_card(Path(folder).name, tree, names, license=encoder.origin.get("license"))
        (temporary / "README.md").write_text(card, "utf-8")

    return fill(Path(folder), write, (), heading_of(tree))


def _parts(objective: Objective) -> tuple[Encoder, dict[str, Any], tuple[Any, ...]]:
    """The encoder, what classifier.json says of the rest, and the names of classes."""
    if isinstance(objective, DenseTask):
        assert objective.reads is not None  # as `Trained` holds it
        return objective.reads, {"head": objective.built.model_dump(mode="json")}, objective.built.names
    assert isinstance(objective, Supervised)  # nothing else is trained to be saved
    (encoder,) = objective.exported.values()
    target = objective.target
    return encoder, {"target": {"name": target.name, **target.arguments}}, target.names


def load_classifier(folder: str | Path, *, trust: bool = False) -> Classifier:
    """Read back what `save_classifier` wrote of fine-tuning; see `load_saved`."""
    found = load_saved(folder, trust=trust)
    if isinstance(found, DenseClassifier):
        raise RunError(f"{folder} holds a head of {found.table.probe}, which mmssl predict uses as it is")
    return found


def load_saved(folder: str | Path, *, trust: bool = False) -> Classifier | DenseClassifier:
    """Read back what `save_classifier` wrote.

    Args:
        folder: may be somebody else's; it is checked before anything is built from it. Or a name on the Hub, which may
            end in `@` and a branch, a tag or a commit.
        trust: let it name an encoder of your own, whose code is then imported.

    Raises:
        RunError: for a folder that is missing, damaged or not allowed.
        RecipeError: for a key or a value that no classifier has.
    """
    if not Path(folder).exists() and HUB_NAME.fullmatch(str(folder).partition("@")[0]):
        folder = download(str(folder), needed=FILE)
    folder = Path(folder)
    where = folder / FILE
    if not is_classifier(folder):
        raise RunError(
            f"{folder} holds no classifier, for {FILE} is missing; mmssl adapt RUN --probe finetune --save FOLDER "
            "writes one, and so do segmentation and detection"
        )
    check_files(folder, "classifier", (FILE, WEIGHTS))
    try:
        return _load(folder, trust)
    except MmsslError:
        raise
    except Exception as error:  # Libraries raise anything where a folder is damaged.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"{where}: no classifier can be built from it: {reason}") from error


def _load(folder: Path, trust: bool) -> Classifier | DenseClassifier:
    where = folder / FILE
    if where.stat().st_size > LARGEST:
        raise RunError(f"{where}: larger than {LARGEST >> 20} MiB, which no classifier's is")
    try:
        tree = json.loads(where.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError(f"expected an object, found {type(tree).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{where} is damaged: {error}; save the classifier again") from error
    stored = filled(Stored, tree, str(where))
    try:
        table = Table.from_json(stored.table)
    except ValueError as error:
        raise RunError(f"{where} is damaged: table: {error}; save the classifier again") from error
    encoder = _encoder(folder, stored, trust)
    objective: Supervised | DenseTask
    if stored.head is not None:
        probe = stored.head.get("probe")
        if not isinstance(probe, str) or probe not in HEADS:
            raise RunError(f"{where}: head: {probe!r} is none of {', '.join(HEADS)}")
        check_numbers({}, stored.head, folder / WEIGHTS, where)
        built = filled(HEADS[probe], stored.head, f"{where}: head")
        with no_larger_than(folder / WEIGHTS):
            objective = built.build(encoder)
    else:
        target = _target(folder, stored)
        plain = torch.zeros(target.width), torch.ones(target.width)
        with no_larger_than(folder / WEIGHTS):
            objective = Supervised(encoder, target, plain)
    load_weights(objective, folder / WEIGHTS)
    encoder.decoding, encoder.origin = stored.decoding, stored.origin
    if isinstance(objective, DenseTask):
        return DenseClassifier(objective.eval(), stored.decoding, stored.label, table)
    return Classifier(objective.eval(), stored.decoding, stored.label, table)


def _encoder(folder: Path, stored: Stored, trust: bool) -> Encoder:
    where, given = folder / FILE, stored.encoder
    if not all(isinstance(given.get(key), str) for key in ("model", "modality")) or "pretrained" in given:
        raise RunError(f"{where}: encoder: model and modality name the network, and its weights are in {WEIGHTS}")
    modality = given["modality"]
    if not trust:
        check_arguments({modality: given}, where)
    check_numbers({modality: given}, {}, folder / WEIGHTS, where)
    stored_there = (folder / TOKENIZER).is_dir()
    own = {"tokenizer": Tokenizer.load(folder / TOKENIZER)} if stored_there else {}
    try:
        with no_larger_than(folder / WEIGHTS):
            return create(**{**given, **own})
    except RecipeError as error:
        raise RunError(f"{where}: encoder: {error}") from error


def _target(folder: Path, stored: Stored) -> Target:
    where = folder / FILE
    arguments = dict(stored.target)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in components("target"):
        raise RunError(f"{where}: target {name!r} is none of {', '.join(components('target'))}")
    check_numbers({}, arguments, folder / WEIGHTS, where)
    names = arguments.get("names")
    if names is not None and not (isinstance(names, list) and all(isinstance(one, str | int) for one in names)):
        raise RunError(f"{where}: target: names should be a list of names or whole numbers")
    target: Target = find("target", name)(**arguments)
    return target
