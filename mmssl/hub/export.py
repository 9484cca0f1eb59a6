"""Native files of every encoder: what timm, transformers, open_clip and torchvision load without mmssl."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from mmssl.atomic import flush, temporary_name
from mmssl.encoders.base import Encoder
from mmssl.errors import RunError
from mmssl.hub import space
from mmssl.hub.bounds import check_finite
from mmssl.objectives.base import Objective

if TYPE_CHECKING:
    from mmssl.run_directory import Run

LOADING = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:{path}", pretrained=True)',
    "transformers": (
        'from transformers import {auto}{tokenizing}\n\nmodel = {auto}.from_pretrained("{path}"{given}){tokenizer}'
    ),
    "open_clip": (
        "import open_clip\n\n"
        'model = open_clip.create_model("local-dir:{path}", require_pretrained=True){note}\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:{path}")'
    ),
    "torchvision": (
        "import torch, torchvision\n"
        "from safetensors.torch import load_file\n\n"
        "model = torchvision.models.get_model({arguments})\n"
        "model.{head} = {kept}  # the classifier was not trained\n"
        'model.load_state_dict(load_file("{path}/model.safetensors"), strict=False){pooling}'
    ),
    "fusion": (
        "import json, mmssl\n\n"
        'with open("{path}/fusion.json") as file:\n'
        '    model = mmssl.encoder(**json.load(file), pretrained="local-dir:{path}")'
    ),
}
HEADING = "# Native encoders, exported by mmssl"


@dataclass(frozen=True)
class Native:
    """One directory of native files.

    Attributes:
        directory: its name.
        encoders: of the run that are in it: one, or both towers of a CLIP.
        head: `logit_scale` and, for SigLIP, `logit_bias` of a task that compares what both towers put out; empty where
            none does so without layers of its own.
    """

    directory: str
    encoders: tuple[Encoder, ...]
    head: Mapping[str, float] = field(default_factory=dict)

    @property
    def library(self) -> str:
        """The library that loads it; `fusion` for one, which only mmssl does."""
        if self.encoders[0].modality == "fusion":
            return "fusion"
        return str(self.encoders[0].spec["model"]).partition("/")[0]

    def loading(self, path: str) -> str:
        """The Python lines that load it from `path`."""
        decodes = getattr(self.encoders[0], "decodes", False)
        details: dict[str, str] = {"note": "", "auto": "AutoModelForSeq2SeqLM" if decodes else "AutoModel"}
        reads = self.encoders[0].modality == "text"
        details["tokenizing"] = ", AutoTokenizer" if reads else ""
        details["tokenizer"] = f'\ntokenizer = AutoTokenizer.from_pretrained("{path}")' if reads else ""
        if self.library == "transformers":
            arguments = _native(self.encoders[0]).loads_with
            details["given"] = "".join(f", {key}={value!r}" for key, value in arguments.items())
        if self.library == "open_clip" and len(self.encoders) == 1:
            details["note"] = f"  # only its {self.encoders[0].modality} tower was trained"
        elif self.library == "open_clip" and not self.head:
            details["note"] = "  # what makes one space of both towers' is not in it"
        if self.library == "torchvision":
            backbone = _native(self.encoders[0])
            given = "".join(f", {key}={value!r}" for key, value in backbone.kwargs.items())
            how = self.encoders[0].reading().video
            pooling = backbone.pooling(how.frames, how.size)
            kept = getattr(backbone.net, backbone.head)
            inside = isinstance(kept, nn.Sequential)
            details |= {
                "pooling": f"\n{pooling}" if pooling else "",
                "arguments": repr(backbone.model.partition("/")[2]) + given,
                "head": backbone.head,
                "kept": f"model.{backbone.head}[:{len(kept)}]" if inside else "torch.nn.Identity()",
            }
        return LOADING[self.library].format(path=path, **details)


def plan(run: Run) -> list[Native]:
    """What `export` writes: one directory an encoder, one for both towers of a CLIP.

    Raises:
        RunError: for an encoder whose name is no name of a directory.
    """
    natives: list[Native] = []
    for name, encoder in run.encoders.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise RunError(f"encoder '{name}' cannot name a directory; use letters, digits, _ and - in the recipe")
        other = next((n for n in natives if _one_clip(*n.encoders, encoder)), None)
        if other is None:
            natives.append(Native(name, (encoder,)))
        else:
            both = (*other.encoders, encoder)
            natives[natives.index(other)] = Native(f"{other.directory}_{name}", both, _head(run.objective, both))
    return natives


def _head(objective: Objective, both: Collection[Encoder]) -> dict[str, float]:
    """The scalars of the task that compares what both towers put out, as they are."""
    for pair in objective.pairs:
        if pair.scalars and {objective.encoder(pair.a), objective.encoder(pair.b)} == {*both}:
            return {name: float(value.detach()) for name, value in pair.scalars.items()}
    return {}


def _native(encoder: Encoder) -> Any:
    """The network that `Encoder.export` writes."""
    network: Any = encoder.backbone
    return network.native


def _one_clip(*encoders: Encoder) -> bool:
    if not all(str(encoder.spec["model"]).startswith("open_clip/") for encoder in encoders):
        return False
    backbones = [_native(encoder) for encoder in encoders]
    shared = {(b.model, b.config["embed_dim"], b.config.get("quick_gelu", False)) for b in backbones}
    return len(shared) == 1 and sorted(encoder.modality for encoder in encoders) == ["image", "text"]


def export(run: Run, directory: str | Path) -> Path:
    """Write native files of every encoder, and README.md with the lines that load each.

    Args:
        run: finished or loaded.
        directory: made; replaced where an earlier export wrote it.

    Returns:
        The directory: `<encoder name>/` for each, `<image>_<text>/` for both towers of one CLIP.

    Raises:
        RunError: where weights are not finite, the directory holds something else, an encoder has no native form or the
            disk refuses.
    """
    natives = plan(run)
    for name, encoder in run.encoders.items():
        check_finite(((f"{name}.{key}", value) for key, value in encoder.state_dict().items()), run.directory)
    own = {"README.md", space.PROJECTIONS, *(native.directory for native in natives)}
    return fill(Path(directory), lambda folder: _write(run, natives, folder), own, HEADING)


def _write(run: Run, natives: list[Native], folder: Path) -> None:
    lines = [
        HEADING,
        "",
        "Each folder but that of a fusion, which reads what two encoders made of their inputs, loads without mmssl; "
        "`preprocessing.json` in it says what the network expects as input. "
        "The heads of the pretext task stay in the run, but for the projections of what it compares.",
    ]
    for native in natives:
        try:
            if len(native.encoders) == 1:
                native.encoders[0].export(folder / native.directory)
            else:
                from mmssl.encoders import export_clip_pair

                image, text = sorted(native.encoders, key=lambda encoder: encoder.modality)
                export_clip_pair(image, text, folder / native.directory, **native.head)
        except TypeError as error:
            raise RunError(f"encoder '{native.directory}' cannot be exported: {error}") from error
        lines += ["", f"## {native.directory}", "", "```python", native.loading(native.directory), "```"]
    maps = space.projections(run)
    if maps:
        check_finite(maps.items(), run.directory)
        save_file(maps, folder / space.PROJECTIONS)
        loads = {id(encoder): native.loading(native.directory) for native in natives for encoder in native.encoders}
        lines += space.explain(run, {name: loads[id(encoder)] for name, encoder in run.encoders.items()})
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fill(directory: Path, write: Callable[[Path], None], own: Collection[str], mark: str) -> Path:
    """Let `write` fill a new sibling of `directory`, then put it in its place; a failure leaves what was there.

    Args:
        directory: absent, empty, or written by an earlier call.
        write: gets the empty sibling.
        own: names that an earlier call may have left in `directory`.
        mark: words that README.md of an earlier call holds.

    Raises:
        RunError: where `directory` holds anything else, or the disk refuses.
    """
    _check_free(directory, own, mark)
    temporary = temporary_name(directory)
    old = directory.with_name(f".old_{directory.name}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        flush([temporary, *temporary.rglob("*")])
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _check_free(directory: Path, own: Collection[str], mark: str) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise RunError(f"{directory} is a file; name a directory")
    present = {path.name for path in directory.iterdir()}
    if not present:
        return
    readme = directory / "README.md"
    if present - {*own} or not readme.is_file() or mark not in readme.read_text(encoding="utf-8", errors="replace"):
        raise RunError(f"{directory} is not empty and was not written by this command; choose another directory")
