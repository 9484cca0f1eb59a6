"""Zero-shot classification: equal to open_clip's classifier, names from everywhere, ties, sentences where it fails."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from known_pairs import LENGTH, NAMES, Colors, rows, table
from open_clip.model import CustomTextCLIP

import mmssl
from mmssl import adapt
from mmssl.adaptation.pairs import network_of
from mmssl.adaptation.probes.zero_shot import class_vectors
from mmssl.decode_settings import ImageDecode, TextDecode
from mmssl.errors import DataError, RecipeError
from mmssl.objectives import reinitialized
from mmssl.ops.intervals import wilson
from mmssl.recipe import Data

DATA = Data(source="", image=ImageDecode(size=16), text=TextDecode(length=LENGTH))
TEMPLATES = ("{}", "a drawing of {} paint.")
# Twice as much red as of any other; one picture has another name than it should.
COLORS = [0, 0, 1, 2, 3, 4, 5, 0]
LABELS = [0, 0, 1, 2, 3, 4, 5, 1]
PAIRS = [(color, "") for color in COLORS]
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 12},
}


def classify(task, given, **settings):
    return adapt(task, given, probe="zero_shot", **{"baseline": False, "templates": TEMPLATES, **settings})


def numbers(row) -> tuple[float, float, float]:
    return row.metrics["accuracy"], row.metrics["top5_accuracy"], row.metrics["balanced_accuracy"]


def test_names_find_their_colors_and_the_rest_is_counted():
    scores = classify(Colors(), rows(PAIRS, label=LABELS), classes=NAMES)
    first, constant, chance = scores.rows
    assert scores.score == pytest.approx(7 / 8)
    # Green is not the last for a red picture.
    assert numbers(first) == (7 / 8, 1, pytest.approx((1 + 0.5 + 4) / 6))
    assert first.interval["accuracy"] == wilson(7 / 8, 8)
    # By size, and of equals by number: red, green, blue, yellow, cyan; magenta is left.
    assert numbers(constant) == (2 / 8, 7 / 8, pytest.approx(1 / 6))
    assert numbers(chance) == pytest.approx((1 / 6, 5 / 6, 1 / 6))
    assert scores.baseline == 2 / 8
    text, read = str(scores), json.loads(json.dumps(scores.to_json()))
    assert "nothing learned, 8 test rows, 6 classes" in text
    assert "top-5" in text
    assert read["rows"][0]["metrics"]["top5_accuracy"] == 1


def test_a_model_without_an_opinion_gets_nothing():
    task = Colors()
    task.encoder("text").table.weight.data.fill_(1.0)
    scores = classify(task, rows(PAIRS, label=LABELS), classes=NAMES, templates=("{}",))
    assert numbers(scores.rows[0])[:2] == (0, 0)


def test_names_come_from_labels_a_list_a_file_or_a_column(tmp_path):
    names = [NAMES[label] for label in LABELS]
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8")
    given = table(PAIRS, kind=names, number=LABELS, name=names)
    ways = [
        {"label": "kind"},
        {"label": "kind", "classes": NAMES[::-1]},
        {"label": "number", "classes": NAMES},
        {"label": "number", "classes": str(tmp_path / "names.txt")},
        {"label": "number", "classes": "name"},
    ]
    for way in ways:
        scores = classify(Colors(), given, data=DATA, **way)
        assert scores.score == pytest.approx(7 / 8), way
        assert scores.counts == {"classes": 6}


def test_empty_text_is_no_class():
    some = [(0, ""), (1, ""), (2, ""), (2, "")]
    given = table(some, kind=["red", "green", "", " "], number=[0, 1, 2, 2], name=["red", "green", "", "blue"])
    scores = classify(Colors(), given, data=DATA, label="kind")
    assert (scores.counts, scores.test_rows) == ({"classes": 2}, 2)
    assert scores.warnings == ("2 rows without 'kind' left out",)
    assert classify(Colors(), given, data=DATA, label="number", classes="name").counts == {"classes": 3}
    with pytest.raises(DataError, match="column 'kind' has no name for the class 2"):
        classify(Colors(), given, data=DATA, label="number", classes="kind")


def test_classes_that_no_row_has_are_wrong_answers():
    some = [(0, ""), (1, "")]
    both = classify(Colors(), table(some, kind=["red", "green"]), data=DATA, label="kind")
    all_ = classify(Colors(), table(some, kind=["red", "green"]), data=DATA, label="kind", classes=NAMES)
    assert (both.counts["classes"], all_.counts["classes"]) == (2, 6)
    assert (numbers(both.rows[-1])[0], numbers(all_.rows[-1])[0]) == (1 / 2, 1 / 6)


@pytest.mark.quick(1)
@pytest.mark.parametrize("templates", [("{}",), ("a photo of a {}.", "{}", "the {} there")])
def test_class_vectors_equal_open_clips_classifier(templates):
    torch.manual_seed(0)
    encoders = {name: mmssl.encoder("open_clip/ViT-B-32", modality=name, **CLIP) for name in ("image", "text")}
    task = mmssl.objective("contrastive", encoders, width=None).eval()
    mine = class_vectors(network_of(task), 1, NAMES, templates, 12)

    tower = encoders["text"].backbone
    clip = CustomTextCLIP(**tower.config).eval()
    clip.text.load_state_dict(tower.net.state_dict())
    tokenize = open_clip.get_tokenizer("ViT-B-32", context_length=12)
    theirs = open_clip.build_zero_shot_classifier(
        clip, tokenize, NAMES, [lambda name, t=t: t.format(name) for t in templates], num_classes_per_batch=4
    )
    torch.testing.assert_close(mine, theirs.T, rtol=0, atol=1e-6)


def test_random_weights_stand_beside():
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoders = {
        "image": mmssl.encoder("timm/test_resnet", modality="image"),
        "text": mmssl.encoder(
            "transformers/bert", modality="text", tokenizer=Colors().encoder("text").tokenizer, **text
        ),
    }
    task = mmssl.objective("contrastive", encoders, width=8)
    given = table(PAIRS, kind=[NAMES[label] for label in LABELS])
    scores = classify(task, given, data=DATA, label="kind", baseline=True, seeds=2)
    random = next(row for row in scores.rows if row.encoder == "random")
    alone = [classify(reinitialized(task, seed), given, data=DATA, label="kind").score for seed in (0, 1)]
    assert list(random.runs["accuracy"]) == alone


def test_sentences_where_it_cannot_work(tmp_path):
    task, given = Colors(), table(PAIRS, kind=[NAMES[label] for label in LABELS], number=LABELS, one=["x"] * 8)
    (tmp_path / "none.txt").write_text("\n")
    cases = [
        (RecipeError, {"templates": ("a photo",)}, r"template 'a photo' has no \{\} for the name"),
        (RecipeError, {"templates": ()}, "templates is empty"),
        (DataError, {"label": "number"}, "'number' holds numbers; name them with classes"),
        (DataError, {"label": "kind", "classes": ("red", "blue")}, "label 'cyan' in column 'kind' is none of the"),
        (DataError, {"label": "number", "classes": NAMES[:4]}, "label 4 in column 'number' is none of the classes"),
        (DataError, {"label": "kind", "classes": ()}, "0 names of classes, and it takes two"),
        (DataError, {"label": "kind", "classes": str(tmp_path / "none.txt")}, "0 names of classes"),
        (DataError, {"label": "kind", "classes": ("red", "red")}, "two classes have the name 'red'"),
        (DataError, {"label": "kind", "classes": "nme"}, "'nme' is neither a file nor a column"),
        (DataError, {"label": "number", "classes": "one"}, "two classes have the name 'x'"),
        (DataError, {"label": "one", "classes": "kind"}, "names the class 'x' both"),
        (DataError, {"label": "knd"}, r"no column 'knd' \(did you mean 'kind'"),
    ]
    for error, settings, sentence in cases:
        with pytest.raises(error, match=sentence):
            classify(task, given, data=DATA, **settings)
    with pytest.raises(DataError, match="batches do not name their classes"):
        classify(task, rows(PAIRS, label=LABELS))
    with pytest.raises(DataError, match="class number 5 has no name; there are 3"):
        classify(task, rows(PAIRS, label=LABELS), classes=NAMES[:3])
    with pytest.raises(RecipeError, match="needs a space for both"):
        classify(Colors(embeds=False, matches=True), given, data=DATA, label="kind")
