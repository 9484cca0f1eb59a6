"""The rows of the table of bench_gpu.py: networks of published size, small ones, and other people's code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from bench_loop import ENDLESS, Timed
from plan import WORDS, autocast
from torch import Tensor, nn

from mmssl.batch import Batch, to_device
from mmssl.recipe import Recipe

ADAMW = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.05}
MFU, FASTER = 0.45, 1.1
"""Goals."""

Reference = Callable[[Recipe, Timed], None]


def has(package: str) -> bool:
    """Whether it can be imported."""
    return sys.modules.get(package, package) is not None and find_spec(package) is not None


def step_by_step(model: nn.Module, loss: Callable[[Batch], Tensor], recipe: Recipe, timed: Timed) -> None:
    """Train somebody's model in a bare loop: `loss` is what it makes of a batch on the device."""
    model.to(timed.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    for batch in timed.batches(0, ENDLESS):
        moved = to_device(batch, timed.device)
        with autocast(recipe.training.precision, timed.device):
            value = loss(moved)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()


def pictures(batch: Mapping[str, Tensor], key: str = "image") -> Tensor:
    """As floats about 0."""
    return batch[key].float().sub_(127.5).div_(64.0)


def open_clip_step(recipe: Recipe, timed: Timed) -> None:
    import open_clip
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    given = {key: value for key, value in recipe.encoders["image"].items() if key != "model"}
    model = open_clip.create_model("ViT-B-32", output_dict=True, **given).to(timed.device)
    args = SimpleNamespace(
        **{"device": str(timed.device), "precision": "amp_bf16", "accum_freq": 1, "grad_clip_norm": None, "rank": 0},
        **{"distill": False, "skip_scheduler": True, "horovod": False, "log_local": False, "log_every_n_steps": 100},
        **{"world_size": 1, "batch_size": recipe.training.batch_size, "wandb": False, "local_rank": 0},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)

    class Batches:
        num_batches, num_samples = ENDLESS, ENDLESS

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return ((batch["image"], batch["text"]) for batch in timed.batches(0, ENDLESS))

    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Batches())}
    train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, args)


def mae_step(recipe: Recipe, timed: Timed) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    task, size = recipe.objective, recipe.sources()[""].image.size
    network = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    if "embed_dim" in (own := recipe.encoders["image"]):
        network = {"hidden_size": own["embed_dim"], "num_hidden_layers": own["depth"]}
        network |= {"num_attention_heads": own["num_heads"], "intermediate_size": 4 * own["embed_dim"]}
    width = task.get("decoder_width", 512)
    decoder = {"decoder_hidden_size": width, "decoder_intermediate_size": 4 * width}
    decoder |= {"decoder_num_hidden_layers": task.get("decoder_depth", 8)}
    decoder |= {"decoder_num_attention_heads": task.get("decoder_heads", 16)}
    patch = own.get("patch_size", 16)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(image_size=size, patch_size=patch, norm_pix_loss=True, **network, **decoder)
    )
    step_by_step(model, lambda batch: model(pictures(batch)).loss, recipe, timed)


def bert_step(recipe: Recipe, timed: Timed) -> None:
    from transformers import BertConfig, BertForMaskedLM

    given = {key: value for key, value in recipe.encoders["text"].items() if key not in ("model", "tokenizer")}
    model = BertForMaskedLM(BertConfig(vocab_size=WORDS, **given))

    def loss(batch: Batch) -> Tensor:
        hidden = torch.rand(batch["text"].shape, device=timed.device) < 0.15
        labels = batch["text"].masked_fill(~hidden, -100)
        value: Tensor = model(batch["text"].masked_fill(hidden, 4), labels=labels).loss
        return value

    step_by_step(model, loss, recipe, timed)


def videomae_step(recipe: Recipe, timed: Timed) -> None:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    task, network = recipe.objective, {k: v for k, v in recipe.encoders["video"].items() if k != "model"}
    width = task["decoder_width"]
    decoder = {"decoder_hidden_size": width, "decoder_intermediate_size": 4 * width}
    decoder |= {"decoder_num_hidden_layers": task["decoder_depth"]}
    decoder |= {"decoder_num_attention_heads": task["decoder_heads"]}
    model = VideoMAEForPreTraining(VideoMAEConfig(**network, **decoder))
    config = model.config
    places = (config.image_size // config.patch_size) ** 2
    times = config.num_frames // config.tubelet_size

    def loss(batch: Batch) -> Tensor:
        rows = len(batch["video"])
        order = torch.rand(rows, places, device=timed.device).argsort(1)
        hidden = (order < round(0.9 * places)).repeat(1, times)
        # It takes frames for pictures of ImageNet, and undoes that in its target.
        value: Tensor = model(pictures(batch, "video"), bool_masked_pos=hidden).loss
        return value

    step_by_step(model, loss, recipe, timed)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TOWER = {"model": "open_clip/ViT-B-32"}
VIT = {"model": "transformers/vit", "patch_size": 32}
BERT = {"model": "transformers/bert", "tokenizer": "stand-in"}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        recipe: as far as it differs from the defaults.
        tiny: what differs from that in a small one, section by section.
        batch: rows on a card of 141 GB; halved until it fits.
        kept: rows of the toy world that each worker keeps.
        asks: packages without which there is no such row.
        reference: other people's code, by name.
        mfu: goal.
        faster: goal, of samples a second over the reference.
    """

    recipe: Mapping[str, Any]
    tiny: Mapping[str, Any]
    batch: int
    kept: int = 256
    asks: tuple[str, ...] = ()
    reference: tuple[str, Reference] | None = None
    mfu: float | None = None
    faster: float | None = None


def clip_row() -> Row:
    """open_clip's towers, or the same sizes of transformers where it is not installed."""
    shared = {"data": {"image": {"size": 224}, "text": {"length": 77}}, "training": {"optimizer": ADAMW}}
    views = {"size": 224, "interpolation": "bicubic"}
    if has("open_clip"):
        small = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}}
        small |= {"text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
        recipe = {"encoders": {"image": TOWER, "text": TOWER}, "objective": {"name": "contrastive", "width": None}}
        recipe["objective"] |= {"views": views}
        tiny = {"encoders": {"image": TOWER | small, "text": TOWER | small}}
        tiny |= {"objective": recipe["objective"] | {"views": {"size": 32}}, "data": {"image": {"size": 32}}}
        tiny["data"]["text"] = {"length": 77}
        return Row({**recipe, **shared}, tiny, 1024, reference=("open_clip", open_clip_step), mfu=MFU, faster=FASTER)
    text = BERT | {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    recipe = {"encoders": {"image": VIT, "text": text}, "objective": {"name": "contrastive", "views": views}}
    tiny = {"encoders": {"image": VIT | SMALL | {"image_size": 32, "patch_size": 8}, "text": BERT | SMALL}}
    tiny |= {"objective": {"name": "contrastive", "width": 32, "views": {"size": 32}}, "data": {"image": {"size": 32}}}
    return Row({**recipe, **shared}, tiny, 1024, mfu=MFU)


def rows() -> dict[str, Row]:
    """Name -> line, in the order of the table."""
    decoder = {"decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
    video = {"name": "masked_autoencoder", "encoder": "video", "form": "videomae"}
    clips, waves = {"model": "transformers/videomae", "use_mean_pooling": False}, {"model": "transformers/wav2vec2"}
    small_vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    image = {"data": {"image": {"size": 224}}, "training": {"optimizer": ADAMW}}
    sgd = {"optimizer": {"name": "sgd", "lr": 0.1}}
    small_waves = {"conv_dim": [16] * 3, "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 4]}
    small_waves |= {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    return {
        "CLIP ViT-B/32": clip_row(),
        "MAE ViT-B/16": Row(
            image
            | {
                "encoders": {"image": {"model": "timm/vit_base_patch16_224", "weight_init": "mae"}},
                "objective": {"name": "masked_autoencoder", "views": {"size": 224}},
            },
            {
                "encoders": {"image": {"model": "timm/vit_base_patch16_224", **small_vit}},
                "objective": {"name": "masked_autoencoder", **decoder},
                "data": {"image": {"size": 32}},
            },
            512,
            asks=("timm",),
            reference=("transformers", mae_step),
            mfu=MFU,
        ),
        "SimCLR ResNet-50": Row(
            image
            | {
                "encoders": {"image": {"model": "torchvision/resnet50"}},
                "objective": {"name": "simclr", "views": {"size": 224}},
                "training": sgd,
            },
            {
                "encoders": {"image": {"model": "torchvision/resnet18"}},
                "objective": {"name": "simclr"},
                "data": {"image": {"size": 32}},
            },
            256,
        ),
        "BERT-base MLM": Row(
            {
                "encoders": {"text": BERT},
                "objective": {"name": "masked_language"},
                "data": {"text": {"length": 128}},
                "training": {"optimizer": ADAMW},
            },
            {"encoders": {"text": BERT | SMALL}, "data": {"text": {"length": 32}}},
            256,
            reference=("transformers", bert_step),
        ),
        "VideoMAE-B": Row(
            {
                "encoders": {"video": clips},
                "objective": video | {"decoder_depth": 4, "decoder_width": 384, "decoder_heads": 6},
                "data": {"video": {"size": 224, "fps": 7.5, "frames": 16}, "start": "first"},
                "training": {"optimizer": ADAMW},
            },
            {
                "encoders": {"video": clips | SMALL | {"image_size": 32, "patch_size": 8, "num_frames": 4}},
                "objective": video | decoder,
                "data": {"video": {"size": 32, "fps": 4, "frames": 4}},
            },
            64,
            kept=16,
            asks=("timm",),
            reference=("transformers", videomae_step),
        ),
        "wav2vec2-base": Row(
            {
                "encoders": {"audio": waves},
                "objective": {"name": "wav2vec2"},
                "data": {"audio": {"rate": 16000, "seconds": 10.0}, "start": "first"},
                "training": {"optimizer": ADAMW},
            },
            {
                "encoders": {"audio": waves | SMALL | small_waves},
                "objective": {"name": "wav2vec2", "mask_length": 4, "negatives": 10, "codes": 8, "width": 16},
                "data": {"audio": {"seconds": 0.5}},
            },
            32,
            kept=64,
        ),
    }
