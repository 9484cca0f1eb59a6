"""A classifier for those who have no mmssl: timm's native files, the head, and the lines that put the two together.

A classifier of timm is a linear layer; that of fine-tuning normalizes its input first, so it stays outside the network.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from mmssl.encoders.backbones.timm import TimmNetwork
from mmssl.errors import RunError
from mmssl.hub.classifier import Classifier
from mmssl.hub.export import fill

HEADING = "# A native classifier, exported by mmssl"
NETWORK, HEAD, NAMES = "image", "head.safetensors", "names.json"
LINES = """\
```python
import timm
import torch
from safetensors.torch import load_file

model = timm.create_model("local-dir:image", pretrained=True).eval()
head = load_file("head.safetensors")
mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))


@torch.no_grad()
def outputs(pictures):  # uint8 (B, {channels}, {height}, {width}) -> (B, {outputs})
    features = model.forward_features((pictures / 255 - mean) / std)
    pooled = model.forward_head(features, pre_logits=True)
    normalized = torch.nn.functional.layer_norm(pooled, pooled.shape[1:])
    return normalized @ head["weight"].T + head["bias"]
```
"""
MEANING = {
    "classes": "`outputs(pictures).softmax(1)` are the probabilities of the classes that `names.json` lists.",
    "labels": "`outputs(pictures).sigmoid()` are the probabilities of the labels that `names.json` lists.",
    "values": '`outputs(pictures) * head["scale"] + head["shift"]` are the values.',
}


def export_classifier(classifier: Classifier, directory: str | Path) -> Path:
    """Write the encoder as timm loads it, the head, and README.md with the lines that give the same answers.

    Args:
        classifier: whose encoder is an image network of timm.
        directory: made; replaced where an earlier export wrote it.

    Raises:
        RunError: for another encoder, where the directory holds something else, or the disk refuses.
    """
    encoder, objective = classifier.encoder, classifier.objective
    network = getattr(encoder, "backbone", None)
    if encoder.modality != "image" or not isinstance(network, TimmNetwork):
        raise RunError(
            f"a classifier leaves with its head where its encoder is an image network of timm, and this one is "
            f"{encoder.spec['model']} of {encoder.modality}; mmssl predict uses it as it is"
        )
    height = width = classifier.decoding.image.for_probes.size
    lines = LINES.format(channels=network.channels, height=height, width=width, outputs=classifier.target.width)

    def write(folder: Path) -> None:
        encoder.export(folder / NETWORK)
        head = {**classifier.head.state_dict(), "shift": objective.shift, "scale": objective.scale}
        save_file({key: value.detach().cpu().contiguous() for key, value in head.items()}, folder / HEAD)
        (folder / NAMES).write_text(json.dumps(list(classifier.target.names), ensure_ascii=False), encoding="utf-8")
        about = f"It answers for `{classifier.label}`; run the lines in this folder."
        how = "`image/preprocessing.json` says how pictures were decoded."
        text = [HEADING, "", f"{about} {how}", "", lines, MEANING[classifier.target.name], ""]
        (folder / "README.md").write_text("\n".join(text), encoding="utf-8")

    return fill(Path(directory), write, {"README.md", NETWORK, HEAD, NAMES}, HEADING)
