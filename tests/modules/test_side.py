"""One side of a pair: what it reads, what of it is valid, what is shown of it."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders, tiny_fused

from mmssl.errors import RecipeError
from mmssl.modules.side import Side, both_sides, find_fusion
from mmssl.modules.views import Crop
from mmssl.ops.draws import Draws


@pytest.mark.parametrize("name", ["image", "text", "audio", "video"])
def test_a_side_gives_its_encoder_what_it_reads_and_what_of_it_is_valid(name):
    encoder, batch = tiny_encoders()[name], tiny_batch(4)
    side = Side("b", name, encoder, Crop())
    inputs = side.read(batch, Draws(0, 0, 4))
    assert inputs["b"] is batch[name]  # as it is, so that two tasks share one pass
    assert ("b_valid" in inputs) == (f"{name}_mask" in batch)
    expected = encoder(batch[name], batch.get(f"{name}_mask"))
    torch.testing.assert_close(side.features(inputs).pooled, expected.pooled)
    assert torch.equal(side.valid({"b": batch[name]}), torch.ones_like(batch[name], dtype=torch.bool))
    cells = side.cells(inputs)
    assert len(cells) == 4
    if name == "text":
        rows = zip(batch["text"], batch["text_mask"], strict=True)
        assert cells == [" ".join(map(str, ids[kept].tolist())) for ids, kept in rows]
    elif name == "audio":
        assert torch.equal(torch.stack(cells), batch["audio"])
    else:
        torch.testing.assert_close(torch.stack(cells) * 255, batch[name].float())


def test_images_and_clips_alone_are_cropped():
    batch, crop = tiny_batch(4), Crop(area=(0.3, 0.5))
    a, b = both_sides("image", "video", lambda name: tiny_encoders()[name], crop).values()
    assert (a.key, b.key, a.name, b.name) == ("a", "b", "image", "video")
    torch.testing.assert_close(a.read(batch, Draws(0, 0, 4))["a"], crop(batch["image"], Draws(0, 0, 4)))
    torch.testing.assert_close(b.read(batch, Draws(0, 0, 4))["b"], crop(batch["video"], Draws(0, 0, 4)))
    (sound, _) = both_sides("audio", "text", lambda name: tiny_encoders()[name], crop).values()
    assert sound.read(batch, Draws(0, 0, 4))["a"] is batch["audio"]


def test_a_fusion_reads_these_two():
    encoders = tiny_fused("multiway")
    fusion = encoders["fusion"]
    for a, b in (("image", "text"), (None, "text"), ("image", None)):
        assert find_fusion("matching", "fusion", fusion, a, b) is fusion
    with pytest.raises(RecipeError, match="a = text and b = image, and the fusion 'fusion' reads image and text"):
        find_fusion("matching", "fusion", fusion, "text", "image")
    with pytest.raises(RecipeError, match=r"fusion = 'text' reads text; .*reads: \[image, text\]"):
        find_fusion("matching", "text", encoders["text"], "image", "text")
