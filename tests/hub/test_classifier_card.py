"""A fine-tuned classifier says what it is as a run does, and is published like one."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from small_runs import BERT, PROBES, make_classifier
from test_card import HOSTILE, front_matter, outside_fences, strings
from typer.testing import CliRunner

import mmssl
from mmssl.cli import app
from mmssl.errors import RunError
from mmssl.hub import load_classifier, push_classifier

TEXT = {"model": "transformers/bert", "modality": "text", **{k: v for k, v in BERT.items() if k != "model"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("classifier") / "shapes", names=("dark", "light"))


def test_card_has_scores_loading_license_and_metadata(folder) -> None:
    text = (folder / "README.md").read_text()
    assert "`timm/vit_tiny_patch16_224`" in text
    assert "(classes: `dark`, `light`)" in text
    assert "| `pretrained` | `pooled` | 50.0 (40.0 – 60.0) | 50.0 |" in text
    assert "| `constant answer` |  | 12.5 (2.5 – 22.5) | 12.5 |" in text
    assert "mmssl predict shapes DATA --to answers.csv" in text
    assert "`mmssl export` writes them" in text
    assert text.endswith("## License\n\nNot stated.")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("mmssl", "image-classification", "shapes")
    first = data.eval_results[0]
    assert (first.metric_type, first.metric_value, first.dataset_name) == ("accuracy", 0.5, "a fifth of toy")


def test_dry_push_holds_native_files_and_answers_alike(folder, tmp_path) -> None:
    out = tmp_path / "out"
    push_classifier(folder, "me/shapes", dry_run=out)
    assert {path.name for path in out.iterdir()} == {"README.md", "classifier.json", "model.safetensors", "native"}
    text = (out / "README.md").read_text()
    assert "mmssl predict me/shapes DATA --to answers.csv" in text
    assert "`native/README.md` has the lines." in text
    batch = {"image": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)}
    assert torch.equal(load_classifier(out).answer(batch), load_classifier(folder).answer(batch))
    push_classifier(folder, "me/shapes", dry_run=out)  # over its own files
    with pytest.raises(RunError, match="not written by this command"):
        push_classifier(folder, "me/shapes", dry_run=folder)
    assert load_classifier(folder)
    with pytest.raises(RunError, match="holds no classifier"):
        push_classifier(out / "native", "me/shapes", dry_run=tmp_path / "new")


def test_the_verb_takes_a_classifier_as_it_takes_a_run(folder, tmp_path) -> None:
    done = CliRunner().invoke(app, ["push", str(folder), "me/shapes", "--dry-run", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "classifier.json").is_file()


def test_tokenizers_travel_along(tmp_path) -> None:
    folder = make_classifier(tmp_path / "texts", TEXT)
    push_classifier(folder, "me/texts", dry_run=tmp_path / "out")
    assert load_classifier(tmp_path / "out").encoder.tokenizer == load_classifier(folder).encoder.tokenizer


def test_a_license_that_is_known_is_said(folder, tmp_path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    tree = json.loads((copy / "classifier.json").read_text())
    (copy / "classifier.json").write_text(json.dumps(tree | {"origin": {"license": "CC-BY-4.0"}}))
    push_classifier(copy, "me/shapes", dry_run=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text)["license"] == "cc-by-4.0"
    assert text.endswith("## License\n\n`CC-BY-4.0`")


def test_places_of_this_machine_are_not_published(tmp_path) -> None:
    probes = PROBES | {"test": "/home/somebody/photos, split test", "warnings": ["2 rows of /home/somebody/x.csv"]}
    folder = make_classifier(tmp_path / "shapes", probes=probes)
    push_classifier(folder, "me/shapes", dry_run=tmp_path / "out")
    for path in [*(tmp_path / "out").rglob("*"), *folder.iterdir()]:
        assert not path.is_file() or b"somebody" not in path.read_bytes(), path


def test_hostile_names_stay_inside_their_place(folder, tmp_path) -> None:
    hostile = make_classifier(tmp_path / "x", names=(HOSTILE, "b"), probes=PROBES | {"label": HOSTILE, "test": HOSTILE})
    text, plain = ((one / "README.md").read_text() for one in (hostile, folder))
    found, honest = front_matter(text), front_matter(plain)
    assert not [word for word in strings(found.pop("model-index")) if not word.isprintable()]
    assert len(honest.pop("model-index")) == 1
    assert found == honest
    headings = [[line for line in outside_fences(one) if line.startswith("#")] for one in (text, plain)]
    assert headings[0] == headings[1]
    assert mmssl.Table.from_json(json.loads((hostile / "classifier.json").read_text())["table"]).label == HOSTILE
