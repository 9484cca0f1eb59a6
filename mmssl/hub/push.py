"""Publish a run: card, recipe, weights, tokenizers, metrics, pictures and native files, to the Hub or to a folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from mmssl.errors import RunError
from mmssl.hub.bounds import check_finite
from mmssl.hub.card import model_card, read_probes
from mmssl.hub.classifier import FILE, Classifier, DenseClassifier, load_saved
from mmssl.hub.classifier_card import PUBLISHED, TRAINED, classifier_card
from mmssl.hub.client import explain
from mmssl.hub.export import export, fill
from mmssl.hub.export_classifier import export_classifier, leaves_whole
from mmssl.hub.markdown import one_line
from mmssl.hub.privacy import public_table, publishable
from mmssl.hub.pull import WEIGHTS, check_folder
from mmssl.run_directory import AUDIT, MACHINES

if TYPE_CHECKING:
    from mmssl.run_directory import Run

CONTENT = {
    "README.md",
    "recipe.yaml",
    FILE,
    WEIGHTS,
    "tokenizers",
    "metrics.jsonl",
    "probes.json",
    AUDIT,
    MACHINES,
    "figures",
    "native",
}
MADE = "pretrained without labels by the pretext task"  # words of every card of a run
# What a later push of the same run no longer has is removed from the repository; other files there are left alone.
OURS = ["native/*", "tokenizers/*", "figures/*", "probes.json", AUDIT, MACHINES]


def push(
    run: Run, repo: str, *, dry_run: str | Path | None = None, private: bool = False, token: str | None = None
) -> str:
    """Write the model card and upload the run, or write the same files to a folder.

    Optimizer state, logs of undecodable rows and tracker files stay here. Local paths in the recipe and in probes.json
    are reduced to their last part, URLs lose passwords and query strings.

    Args:
        run: finished or loaded.
        repo: `user/name`; made where it does not exist.
        dry_run: folder to write to instead; nothing is sent.
        private: for a repository that is made.
        token: with write access; the stored one or HF_TOKEN where left out.

    Returns:
        Address of the repository, or path of the folder.

    Raises:
        RunError: where weights are not finite, the folder is in use, the name is not valid, the token may not write or
            the Hub is not reached.
    """
    return _publish(lambda folder: assemble(run, folder, repo), repo, f"Step {run.step}", MADE, dry_run, private, token)


def push_classifier(
    source: str | Path,
    repo: str,
    *,
    dry_run: str | Path | None = None,
    private: bool = False,
    token: str | None = None,
    trust: bool = False,
) -> str:
    """Write the card of a classifier or a head for places and upload it, or write the same files to a folder.

    Args:
        source: folder that `mmssl.adapt(..., save=folder)` wrote.
        repo: see `push`.
        dry_run: see `push`.
        private: see `push`.
        token: see `push`.
        trust: let the folder name an encoder of your own, whose code is then imported.

    Returns:
        Address of the repository, or path of the folder.

    Raises:
        RunError: as `push`, and for a folder that holds no classifier or a damaged one.
    """
    classifier = load_saved(source, trust=trust)
    dense = isinstance(classifier, DenseClassifier)

    def write(folder: Path) -> None:
        _assemble_classifier(Path(source), classifier, folder, repo)

    message, mark = f"Classifier of {one_line(classifier.label)}", TRAINED if dense else PUBLISHED
    return _publish(write, repo, message, mark, dry_run, private, token)


def _publish(
    write: Callable[[Path], None],
    repo: str,
    message: str,
    mark: str,
    dry_run: str | Path | None,
    private: bool,
    token: str | None,
) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with explain(f"'{repo}' is not a name for a repository (expected user/name)"):
        validate_repo_id(repo)
    if dry_run is not None:
        return str(fill(Path(dry_run), write, CONTENT, mark))
    if "/" not in repo:
        raise RunError(f"'{repo}' is not a name for a repository: expected user/name")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        api = HfApi(token=token)
        with explain(f"cannot push to '{repo}'"):
            address = api.create_repo(repo, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=OURS)
    return str(address)


def _assemble_classifier(source: Path, classifier: Classifier | DenseClassifier, folder: Path, repo: str) -> None:
    check_finite(classifier.objective.state_dict().items(), source / WEIGHTS)
    tree = json.loads((source / FILE).read_text(encoding="utf-8"))
    tree["table"] = public_table(tree["table"])
    (folder / FILE).write_text(json.dumps(tree, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
    if (source / "tokenizers").is_dir():
        shutil.copytree(source / "tokenizers", folder / "tokenizers")
    native = False
    names: tuple[str | int, ...]
    if isinstance(classifier, DenseClassifier):
        names = classifier.objective.built.names
    else:
        names, native = classifier.target.names, leaves_whole(classifier.encoder)
        if native:
            export_classifier(classifier, folder / "native")
    license = tree["origin"].get("license")
    card = classifier_card(repo, tree, names, license=license, published=True, native=native)
    (folder / "README.md").write_text(card, encoding="utf-8")


def assemble(run: Run, folder: Path, repo: str | None = None) -> None:
    """Everything that is published, in an existing empty folder, checked as `mmssl.load` checks it."""
    weights = run.directory / WEIGHTS
    if not weights.is_file():
        raise RunError(f"{run.directory}: {WEIGHTS} is missing: nothing to publish before the first checkpoint")
    with safe_open(weights, framework="pt") as file:
        stored = {*file.keys()}
        trained = (name for name, _ in run.objective.named_parameters() if name in stored)
        check_finite(((name, file.get_tensor(name)) for name in trained), weights)
    shutil.copyfile(weights, folder / WEIGHTS)
    (folder / "recipe.yaml").write_text(publishable(run.recipe).dump(), encoding="utf-8")
    for name, encoder in run.encoders.items():
        tokenizer = getattr(encoder, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizers" / name)
    for name in ("metrics.jsonl", AUDIT, MACHINES):
        if (run.directory / name).exists():
            shutil.copyfile(run.directory / name, folder / name)
    probes = read_probes(run)
    if probes:
        (folder / "probes.json").write_text(json.dumps(probes, indent=1), encoding="utf-8")
    for figure in sorted((run.directory / "figures").glob("*.png")):
        (folder / "figures").mkdir(exist_ok=True)
        shutil.copyfile(figure, folder / "figures" / figure.name)
    export(run, folder / "native")
    (folder / "README.md").write_text(model_card(run, repo), encoding="utf-8")
    check_folder(folder, trust=True)
