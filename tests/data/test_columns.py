"""A row becomes the tensors of `mmssl.batch`; what does not fit is named before anything is decoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import Letters, png, wav

from mmssl.data.columns import Decoder, find_classes, find_column
from mmssl.decode_settings import AudioDecode, ImageDecode, TextDecode, VideoDecode
from mmssl.errors import DataError, RecipeError
from mmssl.media.clip import decode_clip, write_clip
from mmssl.media.units import sentence_ends
from mmssl.recipe import Data

SPEC = Data(
    source="here",
    image=ImageDecode(size=6),
    text=TextDecode(length=5),
    audio=AudioDecode(rate=8000, seconds=0.05),
    video=VideoDecode(size=6, fps=10, frames=2),
)


def mapped(**columns):
    return SPEC.model_copy(update={"columns": columns})


def test_shapes_and_types_are_those_of_the_batch():
    row = {"img": {"bytes": png(7), "path": None}, "text": "ab", "audio": wav(0.5, samples=200), "n": 3}
    spec = mapped(image="img")
    decoder = Decoder(spec, ["image", "text", "audio"], columns=list(row), tokenizers={"text": Letters()}, label="n")
    assert decoder.reads == ("img", "text", "audio", "n")
    out = decoder(row, 0.0)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in out.items()} == {
        "image": (torch.uint8, (3, 6, 6)),
        "text": (torch.int64, (5,)),
        "text_mask": (torch.bool, (5,)),
        "audio": (torch.float32, (400,)),
        "audio_mask": (torch.bool, (400,)),
        "label": (torch.int64, ()),
    }
    assert (out["image"] == 7).all()
    assert out["text_mask"].tolist() == [True, True, False, False, False]
    assert out["audio_mask"].sum() == 200
    assert out["label"] == 3


def test_only_what_is_needed_is_decoded():
    row = {"image": png(1), "audio": b"not a sound"}
    assert set(Decoder(SPEC, ["image"], columns=list(row))(row, 0.0)) == {"image"}


def test_window_says_which_part_of_a_longer_sound(tmp_path):
    ramp = {"array": np.arange(8000, dtype=np.float32) / 8000, "sampling_rate": 8000}
    decoder = Decoder(SPEC, ["audio"])
    for window in (0.0, 0.25, 0.5):
        start = window * (1 - 0.05)
        assert decoder({"audio": ramp}, window)["audio"][0] == pytest.approx(start, abs=2e-4)
    assert not decoder.fixed
    assert Decoder(SPEC.model_copy(update={"start": "middle"}), ["audio"]).fixed
    assert Decoder(SPEC, ["image"]).fixed


def test_sound_and_pictures_of_a_clip_share_a_clock(tmp_path):
    frames = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[:, None, None, None], 16, 1).repeat(16, 2).repeat(3, 3)
    sound = np.repeat(np.arange(20, dtype=np.float32) / 20, 800)
    write_clip(tmp_path / "clip.mkv", frames, 10, sound, 8000, audio_codec="flac", video_codec="ffv1")
    path, content = str(tmp_path / "clip.mkv"), (tmp_path / "clip.mkv").read_bytes()
    expected = decode_clip(path, audio=SPEC.audio, video=SPEC.video, window=0.3)
    for columns, row in (
        ({}, {"audio": path, "video": path}),
        ({}, {"video": path}),
        ({"audio": "clip", "video": "clip"}, {"clip": path}),
        ({"audio": "mp4", "video": "mp4"}, {"mp4": {"bytes": content, "path": None}}),
        ({}, {"mkv": path}),
    ):
        out = Decoder(mapped(**columns), ["audio", "video"], columns=list(row))(row, 0.3)
        for key, value in zip(("audio", "audio_mask", "video"), expected, strict=True):
            assert torch.equal(out[key], value)
    # Separately they would begin at other instants, for their windows are of other lengths.
    alone = Decoder(SPEC, ["audio"], columns=["video"])({"video": path}, 0.3)
    assert not torch.equal(alone["audio"], expected[0])


def test_columns_named_by_extension_are_found():
    columns = ("__key__", "JPG", "txt", "cls", "flac", "mp4")
    found = {key: find_column(SPEC, key, columns) for key in ("image", "text", "label", "audio", "video")}
    assert found == {"image": "JPG", "text": "txt", "label": "cls", "audio": "flac", "video": "mp4"}
    assert find_column(mapped(text="caption"), "text", ("txt", "caption")) == "caption"
    with pytest.raises(DataError, match="no column 'image'"):
        find_column(SPEC, "image", ("jpg", "png"))


def test_a_missing_column_is_named_with_its_neighbors_and_the_way_out():
    with pytest.raises(DataError) as error:
        Decoder(SPEC, ["image"], columns=("images", "text"))
    assert str(error.value) == (
        "here has no column 'image' (did you mean 'images'?); it has: images, text. "
        "Name the right one with data.columns.image: <column>"
    )
    with pytest.raises(DataError, match="no column 'picture'"):
        Decoder(mapped(image="picture"), ["image"], columns=("image",))
    with pytest.raises(DataError, match="no column 'kindd' for the label \\(did you mean 'kind'"):
        Decoder(SPEC, [], columns=("kind",), label="kindd")
    with pytest.raises(RecipeError, match="unknown key 'imgae' \\(did you mean 'image'"):
        Decoder(mapped(imgae="x"), ["image"], columns=("image",))
    with pytest.raises(RecipeError, match="no key 'smell'"):
        Decoder(SPEC, ["smell"])
    with pytest.raises(RecipeError, match="text needs a tokenizer"):
        Decoder(SPEC, ["text"])


def test_bad_cells_are_data_errors():
    decoder = Decoder(SPEC, ["text"], tokenizers={"text": Letters()}, label="kind", classes=("a", "b"))
    for row, words in (
        ({"text": None, "kind": "a"}, "column 'text' is empty"),
        ({"text": "x", "kind": None}, "column 'kind' is empty"),
        ({"text": "x", "kind": " "}, "column 'kind' is empty"),
        ({"text": 5, "kind": "a"}, "should hold text, it holds int"),
        ({"text": "x", "kind": "c"}, "label 'c' is none of the classes: a, b"),
    ):
        with pytest.raises(DataError, match=words):
            decoder(row, 0.0)
    with pytest.raises(DataError, match="label 'a' is no class number"):
        Decoder(SPEC, [], label="kind")({"kind": "a"}, 0.0)


def test_a_list_of_sentences_is_one_text_with_a_line_for_each():
    decoder = Decoder(SPEC, ["text"], tokenizers={"text": Letters()})
    for cell in (["ab", "cd"], ["ab"]):
        assert torch.equal(decoder({"text": cell}, 0.0)["text"], decoder({"text": "\n".join(cell)}, 0.0)["text"])
    assert sentence_ends("Pour it in\nthen stir") == [10, 20]
    for cell in ([], [5], ["a", None]):
        with pytest.raises(DataError, match="should hold text, it holds list"):
            decoder({"text": cell}, 0.0)


def test_windows_lie_around_the_second_that_a_row_names():
    rising = np.linspace(0, 0.8, 16_000, dtype=np.float32)
    spec = mapped(center="hit").model_copy(update={"audio": AudioDecode(rate=8000, seconds=0.5)})
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    row = {"audio": {"array": rising, "sampling_rate": 8000}, "video": {"frames": frames, "fps": 10}}
    columns = ("audio", "video", "hit")
    both = Decoder(spec, ["audio", "video"], columns=columns)
    assert set(both.reads) == set(columns)
    assert "hit" not in both.requires  # a row without is not left out
    for hit, start in ((1.0, 0.75), (0.1, 0.0), (1.9, 1.5), (None, 0.75), (float("nan"), 0.75), (9, 1.5)):
        found = both(row | {"hit": hit}, 0.5)
        sound, pictures = (Decoder(spec, [key], columns=columns)(row | {"hit": hit}, 0.5) for key in columns[:2])
        assert torch.equal(found["audio"], torch.from_numpy(rising[round(start * 8000) :][:4000]))
        if hit is not None and hit == hit:
            assert torch.equal(sound["audio"], found["audio"])
            middle = min(max(hit, 0.1), 1.9)  # of the two frames that are read alone
            assert pictures["video"][0, 0, 0, 0] == int((middle - 0.1 + 1e-6) * 10)
    with pytest.raises(DataError, match="column 'hit' should hold seconds, it holds str"):
        both(row | {"hit": "now"}, 0.5)
    with pytest.raises(DataError, match="has no column 'hit' of seconds \\(did you mean 'hits'"):
        Decoder(spec, ["audio"], columns=("audio", "hits"))


def test_labels_become_class_numbers():
    decoder = Decoder(SPEC, [], label="kind", classes=("b", "a"))
    assert [decoder({"kind": kind}, 0.0)["label"].item() for kind in "ab"] == [1, 0]
    many = Decoder(SPEC, [], label="kind")({"kind": [0, 1, 1]}, 0.0)["label"]
    assert many.dtype == torch.int64
    assert many.tolist() == [0, 1, 1]


def test_classes_are_sorted_and_of_one_type():
    assert find_classes(["b", "a", None, "", " ", "b"]) == ("a", "b")
    assert find_classes([10, 9, 10]) == (9, 10)
    assert find_classes([True, False]) == (False, True)
    assert find_classes([[0, 1], [1, 1]]) is None
    for values, words in (([0.5], "holds float"), (["a", 1], "holds int, str"), ([None], "holds nothing")):
        with pytest.raises(DataError, match=words):
            find_classes(values)
