"""The card of a classifier, or of a head that answers for places: what it answers, how well, and how it is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmssl.adaptation.table import Table
from mmssl.hub.card import license_of
from mmssl.hub.markdown import code, fence, markdown, one_line
from mmssl.hub.privacy import public_table
from mmssl.hub.scores import eval_results, probe_table, task_type
from mmssl.version import __version__

TEMPLATE = Path(__file__).with_name("classifier.md.jinja")
HEADING = "# A classifier, fine-tuned by mmssl"
PUBLISHED = "fine-tuned and published by mmssl"
DENSE = {
    "segmentation": ("A segmentation network", "a head on its feature maps, trained on the masks of the column"),
    "detection": ("A detector", "a feature pyramid and a detector of torchvision, trained on the boxes of the column"),
}
TRAINED = "trained and published by mmssl"
FINETUNED = "a linear head on its normalized pooled features, trained together on the column"
SHOWN = 50  # names that are spelled out


def heading_of(tree: Mapping[str, Any]) -> str:
    """The first line of the card of what classifier.json describes."""
    return f"# {DENSE[tree['head']['probe']][0]}, trained by mmssl" if tree.get("head") else HEADING


def published_by(tree: Mapping[str, Any]) -> str:
    """Words that the card of what is published has."""
    return TRAINED if tree.get("head") else PUBLISHED


def classifier_card(
    name: str,
    tree: Mapping[str, Any],
    names: Sequence[str | int],
    *,
    license: str | None = None,
    published: bool = False,
    native: bool = False,
) -> str:
    """README.md of a classifier's folder, with YAML front matter.

    Args:
        name: of the folder, or `user/name` on the Hub, for the lines that load it.
        tree: what classifier.json holds.
        names: of classes or labels; empty for values.
        license: of the weights, where it is known.
        published: whether it is for the Hub.
        native: whether the folder `native` is there.

    Returns:
        Markdown. Strings of the user's are put in code spans and fences that they cannot close.
    """
    from huggingface_hub import ModelCard, ModelCardData

    table = Table.from_json(public_table(tree["table"]))
    probe = tree["head"]["probe"] if tree.get("head") else None
    kind, head = DENSE[probe] if probe else ("a classifier", FINETUNED)
    to = "masks" if probe == "segmentation" else "answers.csv"
    modality = tree["encoder"]["modality"]
    title = one_line(name.rpartition("/")[2])
    own, own_name = license_of(license)
    data = ModelCardData(
        library_name="mmssl",
        license=own,
        license_name=own_name,
        pipeline_tag=task_type(table, modality),
        tags=[probe or "fine-tuned", one_line(modality)],
        model_name=title,
        eval_results=eval_results(table, modality),
    )
    shown = ", ".join(map(code, names[:SHOWN])) + (" ..." if len(names) > SHOWN else "")
    origin = "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in tree["origin"].items())
    decoding = {key: value for key, value in tree["decoding"].items() if key != "source"}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        heading=f"# {markdown(title)}, {kind[0].lower()}{kind[1:]} {published_by(tree)}"
        if published
        else heading_of(tree),
        head=head,
        dense=probe is not None,
        network=code(tree["encoder"]["model"]),
        label=code(tree["label"]),
        target=markdown(table.target),
        names=shown,
        origin=markdown(origin) or "not stated",
        decoding=code(json.dumps(decoding)),
        scores=probe_table(table),
        seed=table.seeds[0],
        version=__version__,
        predict=fence(f"mmssl predict {shlex.quote(one_line(name))} DATA --to {to}", "bash"),
        calling=fence(f'import mmssl\n\nmmssl.predict({one_line(name)!r}, "path/to/files", "{to}")', "python"),
        native=native,
        license=code(license) if license else "Not stated.",
    )
    return str(card.content)
