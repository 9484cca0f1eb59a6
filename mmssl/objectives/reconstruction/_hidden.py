"""One side of a masked pair: what of it is hidden, and the head that says what was there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmssl.batch import Batch, prefixed, sub_batch, valid_tokens
from mmssl.encoders.base import Encoder
from mmssl.encoders.image import ImageEncoder
from mmssl.encoders.text import TextEncoder
from mmssl.encoders.video import VideoEncoder
from mmssl.errors import RecipeError
from mmssl.modules.codebook import Codebook, HierarchicalCodebook
from mmssl.modules.pictures import as_read, channels_first, cut, read_picture
from mmssl.modules.side import Side
from mmssl.modules.unigram import Unigram
from mmssl.modules.vocabulary import TiedHead, Vocabulary
from mmssl.objectives.base import Panel
from mmssl.ops.draws import Draws
from mmssl.ops.gather import process_share
from mmssl.ops.losses import mean_over, token_losses
from mmssl.ops.masking import SMALLEST_BLOCK, mask_blocks, take
from mmssl.ops.patches import patchify, unpatchify

TOKENS_COUNTED = 32  # for each entry of the vocabulary


def _targets(target: Tensor, chosen: Tensor, surprise: Tensor) -> Batch:
    """Which places count, what was there, their number, and the cross-entropy of a histogram, `surprise` a place."""
    return {
        "chosen": chosen,
        "target": target,
        "hidden_places": chosen.sum(),
        "prior_surprise": (surprise * chosen).sum(),
    }


class HiddenPatches(nn.Module):
    """Blocks of patches under a mask token, and a classifier over the codes of a codebook.

    Args:
        network: of images, clips or sound; it stays outside of this module.
        width: of the tokens that the head reads.
        codes: entries of the codebook, or the numbers of children in a tree of them, level by level.
    """

    divisors = ("hidden_places", "prior_surprise", "constant_mistakes")

    def __init__(self, network: Encoder, width: int, codes: int | Sequence[int]) -> None:
        super().__init__()
        if not network.subsets or network.patch_size is None:
            raise RecipeError(
                f"masked_pair hides patches of images, clips or sound, and {network.spec['model']} has none; take a "
                "plain vision transformer, such as timm/vit_tiny_patch16_224, or set mask_ratio_a: 0"
            )
        self.modality, self.patch = network.modality, network.patch_size
        values = (1 if self.modality == "audio" else 3) * math.prod(self.patch)
        self.codebook = Codebook(codes, values) if isinstance(codes, int) else HierarchicalCodebook(codes, values)
        self.classes = len(self.codebook.centers)
        self.mask_token = nn.Parameter(torch.zeros(network.width or network.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, self.classes)
        )

    def vectors(self, side: Side, batch: Batch, number: int) -> Tensor:
        """What the codebook learns from: patches (n, d) of the batch, cropped as for training; NaN where padding is."""
        share, shares = process_share()
        rows, device = len(batch[side.modality]), self.mask_token.device
        draws = Draws(int(self.codebook.seed), number, rows, share=share, shares=shares, device=device)
        _, pixels, valid = read_picture(side.encoder, batch, draws, side.crop)
        patches = patchify(pixels, self.patch)
        if valid is not None:
            patches = patches.masked_fill(~valid[:, :, None], math.nan)
        return patches.flatten(0, 1)

    def hide(self, side: Side, batch: Batch, draws: Draws, ratio: float) -> Batch:
        """The entries of the side, and as `a/...` what is hidden, a share `ratio` of the patches.

        `hidden` bool (B, N), in the grid of patches; `places` (B, M), of which the `chosen` ones count, with the
        `target` codes. `constant_mistakes` is the number of mistakes of the most frequent code. Of a clip the same
        places are hidden in all frames.
        """
        picture, pixels, valid = read_picture(side.encoder, batch, draws, side.crop)
        *time, height, width = cut("masked_pair", pixels.shape[2:], self.patch)
        if min(height, width) < 2:
            raise RecipeError(f"masked_pair: blocks cannot be hidden in a grid of {height} x {width} patches")
        total = max(1, round(ratio * height * width))
        smallest = max(1, round(SMALLEST_BLOCK * height * width))
        hidden = mask_blocks((height, width), total, draws, smallest=smallest).repeat(1, math.prod(time))
        slots = total * math.prod(time)
        counted = hidden if valid is None else hidden & valid
        places = counted.long().argsort(dim=1, descending=True, stable=True)[:, :slots]
        chosen = counted.gather(1, places)
        target = self.codebook(take(patchify(pixels, self.patch), places))
        mistakes = ((target != self.codebook.counts.argmax()) & chosen).sum()
        targets = _targets(target, chosen, -self.codebook.log_shares()[target])
        hidden_ones = {"hidden": hidden, "places": places, "constant_mistakes": mistakes} | targets
        return side.entries(picture, valid) | prefixed(side.key, hidden_ones)

    def covered(self, picture: Tensor, hidden: Tensor) -> Tensor:
        """Bool that broadcasts to the picture that is read, True in its patches that are `hidden` (B, N)."""
        extents = tuple(channels_first(picture, self.modality).shape[2:])
        patches = hidden[:, :, None].to(torch.get_default_dtype()).expand(-1, -1, math.prod(self.patch))
        return as_read(unpatchify(patches, self.patch, extents) > 0, self.modality)

    def forward(self, tokens: Tensor, inputs: Batch) -> Tensor:
        """Logits (N, K) at all N hidden places, row by row."""
        logits: Tensor = self.head(take(tokens, inputs["places"])[inputs["chosen"]])
        return logits

    def scores(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """See `token_losses`; also the mistakes over those of the most frequent code, and the codebook's perplexity."""
        losses = token_losses(
            outputs, self.classes, inputs["chosen"], inputs["hidden_places"], inputs["prior_surprise"]
        )
        mistakes = mean_over(1 - outputs["right"], inputs["chosen"], inputs["constant_mistakes"])
        return losses | {"relative_mistakes": mistakes, "perplexity": self.codebook.perplexity()}

    def panels(self, side: Side, inputs: Batch, logits: Tensor) -> list[Panel]:
        """What is seen; answer and target, as the mean patches of codes; the picture."""
        picture, network, hidden = inputs[side.key], side.encoder, sub_batch(inputs, side.key)
        places, chosen = hidden["places"], hidden["chosen"]
        if self.modality == "audio":
            pixels, scale, shift = picture[:, None], picture.new_ones(()), picture.new_zeros(())
        else:
            seeing = cast(ImageEncoder | VideoEncoder, network)
            pixels, constants = seeing.prepare(picture)[0], (seeing.normalize.std, seeing.normalize.mean)
            scale, shift = (values.view(-1, *[1] * len(self.patch)) for values in constants)
        patches = patchify(pixels, self.patch)
        decoded = self.codebook.decode(self.codebook(patches))
        codes = hidden["target"].masked_scatter(chosen, logits.argmax(-1))

        def put(values: Tensor, into: Tensor) -> list[Tensor | str]:
            kept = torch.where(chosen[:, :, None], values.to(into.dtype), take(into, places))
            whole = into.scatter(1, places[:, :, None].expand_as(kept), kept)
            image = unpatchify(whole, self.patch, tuple(pixels.shape[2:])) * scale + shift
            return list(as_read(image, self.modality))

        seen = {
            "input": put(pixels.mean().expand(1, 1, patches.shape[2]), patches),
            "prediction": put(self.codebook.decode(codes), decoded),
            "target in codes": put(take(decoded, places), decoded),
            "original": put(take(patches, places), patches),
        }
        axes = network.scale(picture[0])
        return [Panel(name, cells, scale=axes) for name, cells in seen.items()]


class HiddenWords(nn.Module):
    """Tokens masked as in masked_language, and a classifier tied to the embedding of the text encoder.

    Args:
        text: the encoder of texts; it stays outside of this module.
        name: its name, for errors.
        width: of the tokens that the head reads.
    """

    divisors = ("hidden_places", "prior_surprise")

    def __init__(self, text: TextEncoder, name: str, width: int) -> None:
        super().__init__()
        self.classes = len(text.token_embedding)
        self.vocabulary = Vocabulary(text, name, "masked_pair")
        self.head = TiedHead(width, text)
        self.unigram = Unigram(self.classes, self.classes)

    def count(self, batch: Batch) -> None:
        """Add the words of a batch to the histogram, those of all processes."""
        text = batch["text"]
        self.unigram.see(text, valid_tokens(batch) & ~self.vocabulary.special[text])
        self.unigram.update()

    def enough(self) -> bool:
        """Whether so many words are counted that more say little."""
        return int(self.unigram.counts.sum()) >= TOKENS_COUNTED * self.classes

    def hide(self, side: Side, batch: Batch, draws: Draws, ratio: float) -> Batch:
        """The entries of the side, and as `b/...` what is hidden, a share `ratio` of the tokens.

        `places` (B, M), of which the `chosen` ones count, with the `target` tokens.
        """
        text, valid = batch["text"], valid_tokens(batch)
        places, chosen = self.vocabulary.choose(text, valid, ratio, draws)
        target = text.gather(1, places)
        targets = _targets(target, chosen, self.unigram.surprise(target))
        seen = self.vocabulary.corrupt(text, places, chosen, draws)
        return side.entries(seen, valid) | prefixed(side.key, {"places": places} | targets)

    def forward(self, tokens: Tensor, inputs: Batch, text: TextEncoder) -> Tensor:
        """Logits (N, V) at all N chosen places, row by row."""
        logits: Tensor = self.head(take(tokens, inputs["places"])[inputs["chosen"]], text)
        return logits

    def scores(self, outputs: Batch, inputs: Batch) -> dict[str, Tensor]:
        """See `token_losses`."""
        return token_losses(outputs, self.classes, inputs["chosen"], inputs["hidden_places"], inputs["prior_surprise"])

    def panels(self, side: Side, inputs: Batch, logits: Tensor) -> list[Panel]:
        """The corrupted text, the network's choices filled in, the original."""
        seen, hidden = inputs[side.key], sub_batch(inputs, side.key)
        places, chosen = hidden["places"], hidden["chosen"]
        texts = self.vocabulary.filled_in(seen, side.valid(inputs), places, chosen)
        return [
            Panel("input", texts(seen.gather(1, places)[chosen])),
            Panel("prediction, «wrong»", texts(logits.argmax(-1), hidden["target"][chosen])),
            Panel("target", texts(hidden["target"][chosen])),
        ]


def learn(patches: HiddenPatches | None, words: HiddenWords | None, side: Side | None, data: Iterable[Batch]) -> None:
    """Fit the codebook of `patches`, of this side, and count the `words`, on as many batches as that takes."""
    stream = _counted(words, data)
    if patches is not None and side is not None:
        patches.codebook.fit(patches.vectors(side, batch, number) for number, batch in enumerate(stream))
    while words is not None and not words.enough() and next(stream, None) is not None:
        pass


def _counted(words: HiddenWords | None, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, while their words are counted."""
    for batch in batches:
        if words is not None:
            words.count(batch)
        yield batch
