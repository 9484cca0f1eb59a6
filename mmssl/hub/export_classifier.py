"""A classifier for those who have no mmssl: the class that its network's library has, or the network and the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmssl.encoders.base import Encoder
from mmssl.errors import RunError
from mmssl.hub.classifier import Classifier
from mmssl.hub.export import Native, fill
from mmssl.hub.input_lines import input_lines
from mmssl.hub.native_heads import AUTO, Unsaid, with_head
from mmssl.hub.space import over_frames, pooled_lines, resampling

HEADING = "# A native classifier, exported by mmssl"
HEAD, NAMES = "head.safetensors", "names.json"
LIBRARIES = ("timm", "torchvision", "transformers", "open_clip")
READS = ("image", "text", "audio", "video")
PADDED = (
    "Sounds shorter than {seconds:g} s are filled up with silence, which `mmssl predict` leaves out of the mean over "
    "time, and these lines do not."
)
PROGRAM = """\
import torch
{loading}
model.eval()
{constants}

@torch.no_grad()
def outputs({given}):
{body}
    return {result}
"""
MEANING = {
    "classes": "`outputs({given}).softmax(1)` are the probabilities of the classes that `names.json` lists.",
    "labels": "`outputs({given}).sigmoid()` are the probabilities of the labels that `names.json` lists.",
    "values": "`outputs({given})` are the values, in the units of the labels.",
}


def export_classifier(classifier: Classifier, directory: str | Path) -> Path:
    """Write files that the network's library loads, and README.md with the lines that give the same outputs.

    Where the library has a class for classifiers that pools as this one was trained, that holds the head, with the
    names of the classes: of timm and torchvision the network itself, of transformers `...ForImageClassification` and
    its like for texts, clips and sounds. Else the head is a file of its own, and README.md says why.

    Args:
        classifier: of pictures, texts, clips or sounds.
        directory: made; replaced where an earlier export wrote it.

    Raises:
        RunError: for a network of no other library, where the directory holds something else, or the disk refuses.
    """
    encoder = classifier.encoder
    modality, model = encoder.modality, encoder.spec["model"]
    if not leaves_whole(encoder):
        over = " with a transformer over time" if encoder.spec.get("temporal") == "transformer" else ""
        raise RunError(
            f"a classifier leaves with its head where its network is one of {', '.join(LIBRARIES)}, and this one is "
            f"{model} of {modality}{over}; mmssl predict uses it as it is"
        )

    def write(folder: Path) -> None:
        try:
            whole, about = with_head(classifier), ""
        except Unsaid as reason:
            whole, about = None, f"The head is a file of its own, for {reason}."
        (whole or encoder).export(folder / modality)
        names = list(classifier.target.names)
        (folder / NAMES).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
        if whole is None:
            weight, bias = classifier.objective.linear()
            save_file({"weight": weight, "bias": bias}, folder / HEAD)
        elif str(model).startswith("timm/") and names:
            config = json.loads((folder / modality / "config.json").read_text(encoding="utf-8"))
            config["label_names"] = list(map(str, names))
            (folder / modality / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
        given = "texts" if modality == "text" else input_lines(encoder).given
        if modality == "audio":
            about = f"{about} {PADDED.format(seconds=classifier.decoding.audio.seconds)}".strip()
        text = [
            HEADING,
            "",
            f"It answers for `{classifier.label}`; run the lines in this folder. "
            f"`{modality}/preprocessing.json` says how rows were decoded. {about}".strip(),
            "",
            f"```python\n{_program(encoder, whole)}```",
            "",
            MEANING[classifier.target.name].format(given=given),
            "",
        ]
        (folder / "README.md").write_text("\n".join(text), encoding="utf-8")

    return fill(Path(directory), write, {"README.md", modality, HEAD, NAMES}, HEADING)


def leaves_whole(encoder: Encoder) -> bool:
    """Whether a classifier on it leaves with its head: where its network is one of another library, and that alone."""
    whole = encoder.modality in READS and encoder.spec.get("temporal") != "transformer"
    return whole and str(encoder.spec["model"]).partition("/")[0] in LIBRARIES


def _program(encoder: Encoder, whole: Encoder | None) -> str:
    """The lines of README.md.

    Args:
        encoder: of the classifier.
        whole: with the head in its network; None where the head is a file.
    """
    modality = encoder.modality
    if whole is None:
        _, lines, pooled = pooled_lines(encoder, "model")
        loading, constants = Native(modality, (encoder,)).loading(modality), f'head = load_file("{HEAD}")\n'
        if "import load_file" not in loading:
            loading = f"from safetensors.torch import load_file\n{loading}"
        result = f'torch.nn.functional.linear({pooled}, head["weight"], head["bias"])'
    else:
        loading, lines, result = _whole(whole)
        constants = ""
    if modality == "text":
        return PROGRAM.format(loading=loading, constants=constants, given="texts", body=_body(lines), result=result)
    given, once, rows = input_lines(encoder)
    constants += "".join(f"{line}\n" for line in once)
    return PROGRAM.format(loading=loading, constants=constants, given=given, body=_body(rows), result=result)


def _whole(encoder: Encoder) -> tuple[str, list[str], str]:
    """Lines that load a network with its head, lines of `outputs`, and the expression that they end in."""
    backbone: Any = encoder.backbone
    network = backbone.native
    modality, call = encoder.modality, over_frames(encoder, "model(x)")
    library, _, name = str(encoder.spec["model"]).partition("/")
    if library == "torchvision":
        arguments = "".join(f", {key}={value!r}" for key, value in network.kwargs.items())
        load = f'model = torchvision.models.get_model("{name}"{arguments})'
        weights = f'model.load_state_dict(load_file("{modality}/model.safetensors"))'
        return f"import torchvision\nfrom safetensors.torch import load_file\n\n{load}\n{weights}", [], call
    if library == "timm":
        return Native(modality, (encoder,)).loading(modality), [], call
    auto = AUTO[network.reads].__name__
    load = f'model = {auto}.from_pretrained("{modality}")'
    if modality != "text":
        size = resampling(encoder) if network.reads == "pictures" else ""
        return f"from transformers import {auto}\n\n{load}", [], over_frames(encoder, f"model(x{size}).logits")
    load += f'\ntokenizer = AutoTokenizer.from_pretrained("{modality}")'
    lines = ['tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")']
    return f"from transformers import {auto}, AutoTokenizer\n\n{load}", lines, "model(**tokens).logits"


def _body(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)
