"""The gradient of every parameter is that of one process with the whole batch, however that batch is cut.

Equal losses would prove nothing: factors of 1/W hide behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_encoders import (
    DroppingText,
    TinyCausal,
    TinyText,
    tiny_batch,
    tiny_captioners,
    tiny_encoders,
    tiny_fused,
    tiny_pairs,
    tiny_patches,
    tiny_text_to_text,
    tiny_waves,
)
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mmssl.objectives import Objective, create
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

ROWS, SEED, STEP = 16, 5, 3
ALIGNMENT = {"window": 0.5, "min_shift": 0.3, "width": 8}
MAE = {"decoder_depth": 1, "decoder_width": 8, "decoder_heads": 2}
JOINT = MAE | {"joint_heads": 2}
DINO = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "local_crops": 2, "freeze_last": 0.0}
IBOT = DINO | {"views": {"size": 12}, "local_views": {"size": 8}}
LEJEPA = {"hidden": 16, "width": 7, "directions": 20, "local_crops": 2, "sigreg": 0.5}
CROPS = {"hidden": 16, "width": 8, "local_crops": 2}
SWAV = CROPS | {"prototypes": 24, "freeze": 0.0}
ALIGN = {"width": 7, "temperature": 1.0, "smoothing": 0.1}
CASES = {
    "rotation": ("rotation", {}),
    "jigsaw": ("jigsaw", {"views": {"area": [1.0, 1.0], "size": 36}, "orders": 30, "tile_width": 7, "hidden": 16}),
    "relative_position": ("relative_position", {"views": {"size": 40}, "grids": 1, "pairs": 2, "hidden": 16}),
    "clip_order": ("clip_order", {"frames": 2, "gap": 1, "width": 8, "dropout": 0}),
    "clip_order_verification": (
        "clip_order",
        {"form": "verification", "frames": 2, "gap": 0, "width": 8, "dropout": 0},
    ),
    "playback_speed": ("playback_speed", {"frames": 4, "paces": 3}),
    "cubic_puzzle": ("cubic_puzzle", {"frames": 2, "gap": 1, "cube_width": 8, "hidden": 16}),
    "arrow_of_time": ("arrow_of_time", {"frames": 4}),
    "masked_language": ("masked_language", {}),
    "masked_language_words": ("masked_language", {"unit": "word", "mask_ratio": 0.3}),
    "masked_language_spans": ("masked_language", {"unit": "span"}),
    "masked_language_bernoulli": ("masked_language", {"count": "bernoulli"}),
    "causal_language": ("causal_language", {}),
    "next_sentence": ("next_sentence", {}),
    "next_sentence_sop": ("next_sentence", {"form": "sop"}),
    "replaced_token": ("replaced_token", {"generator": "words"}),
    "replaced_token_apart": ("replaced_token", {"generator": "words", "share_embeddings": False}),
    "span_denoising": ("span_denoising", {}),
    "denoising": ("denoising", {}),
    "autoencoder": ("autoencoder", {"bottleneck": 5, "noise": 0.1, "width": 64}),
    "colorization": ("colorization", {"width": 64}),
    "colorization_regression": ("colorization", {"form": "regression", "width": 64}),
    "inpainting_center": ("inpainting", {"overlap": 1, "width": 32, "discriminator_width": 8}),
    "inpainting_random": ("inpainting", {"region": "random", "width": 32, "adversarial": 0.0}),
    "masked_autoencoder": ("masked_autoencoder", MAE),
    "masked_autoencoder_simmim": ("masked_autoencoder", {"form": "simmim", "block": 4}),
    "masked_autoencoder_audio": ("masked_autoencoder", {"encoder": "audio", "norm_pix": False, **MAE}),
    "jepa": ("jepa", {"predictor_depth": 1, "predictor_width": 8, "predictor_heads": 2}),
    "jepa_audio": ("jepa", {"encoder": "audio", "predictor_depth": 1, "predictor_width": 8, "predictor_heads": 2}),
    "vjepa": (
        "jepa",
        {"encoder": "video", "form": "vjepa", "predictor_depth": 1, "predictor_width": 8, "predictor_heads": 2},
    ),
    "capi": ("capi", {"prototypes": 12, "predictor_depth": 2, "predictor_width": 8, "predictor_heads": 2}),
    "data2vec": ("data2vec", {}),
    "data2vec_spectrogram": ("data2vec", {"encoder": "audio"}),
    "data2vec_text": ("data2vec", {"encoder": "text", "mask_ratio": 0.3}),
    "data2vec_waves": ("data2vec", {"encoder": "audio", "mask_length": 2}),
    "masked_autoencoder_video": (
        "masked_autoencoder",
        {"encoder": "video", "norm_pix": False, "mask_ratio": 0.9, **MAE, "decoder_width": 32},
    ),
    "masked_autoencoder_videomae": (
        "masked_autoencoder",
        {"encoder": "video", "form": "videomae", "mask_ratio": 0.5, **MAE},
    ),
    "simclr_video": ("simclr", {"encoder": "video", "hidden": 16, "width": 7}),
    "simclr_image": ("simclr", {"hidden": 16, "width": 7}),
    "simclr_audio": ("simclr", {"encoder": "audio", "hidden": 16, "width": 7}),
    "simcse": ("simcse", {}),
    "barlow_twins_image": ("barlow_twins", {"hidden": 16, "width": 7}),
    "barlow_twins_audio": ("barlow_twins", {"encoder": "audio", "hidden": 16, "width": 7}),
    "vicreg_image": ("vicreg", {"hidden": 16, "width": 7}),
    "vicreg_paper_audio": ("vicreg", {"encoder": "audio", "form": "paper", "hidden": 16, "width": 7}),
    "moco": ("moco", {"hidden": 16, "width": 7, "queue": 24}),
    "moco_audio": ("moco", {"encoder": "audio", "hidden": 16, "width": 7, "queue": 24}),
    "moco_v3": ("moco", {"form": "v3", "hidden": 16, "width": 7, "temperature": 0.2}),
    "nnclr": ("nnclr", {"hidden": 16, "prediction_hidden": 9, "width": 7, "queue": 24}),
    "byol": ("byol", {"hidden": 16, "width": 7}),
    "byol_audio": ("byol", {"encoder": "audio", "hidden": 16, "width": 7, "views": {"mix": 0.4}}),
    "simsiam": ("simsiam", {"width": 16, "bottleneck": 8}),
    "dino": ("dino", DINO | {"local_views": {"size": 8}}),
    "dino_audio": ("dino", DINO | {"encoder": "audio"}),
    "ibot": ("ibot", IBOT),
    "ibot_dinov2": ("ibot", IBOT | {"shared_head": False, "centering": "sinkhorn", "koleo": 0.1}),
    "lejepa": ("lejepa", LEJEPA | {"local_views": {"size": 8}}),
    "lejepa_audio": ("lejepa", LEJEPA | {"encoder": "audio"}),
    "swav": ("swav", SWAV | {"local_views": {"size": 8}, "queue": 24}),
    "swav_audio": ("swav", SWAV | {"encoder": "audio"}),
    "densecl": ("densecl", {"hidden": 16, "width": 7, "queue": 24}),
    "deepcluster": ("deepcluster", CROPS | {"clusters": 6, "local_views": {"size": 8}}),
    "instance_discrimination": ("instance_discrimination", {"rows": 40, "width": 7, "negatives": 9}),
    "instance_discrimination_softmax": ("instance_discrimination", {"rows": 40, "width": 7, "form": "softmax"}),
    "clip": ("contrastive", {"width": 7}),
    "clip_audio_text": ("contrastive", {"a": "audio", "b": "text", "width": 7}),
    "clip_audio_video": ("contrastive", {"a": "audio", "b": "video", "width": 7, "hidden": 9}),
    "clip_video_text": ("contrastive", {"a": "video", "b": "text", "width": 7, "positives": "equal"}),
    "clip_chunked": ("contrastive", {"width": 7, "chunk": 3}),
    "clip_frozen": ("contrastive", {"width": 7}),
    "siglip": ("contrastive", {"form": "siglip", "width": 7}),
    "siglip_chunked": ("contrastive", {"form": "siglip", "width": 7, "chunk": 3}),
    "align": ("contrastive", ALIGN),
    "align_chunked": ("contrastive", ALIGN | {"chunk": 3}),
    "unicl": ("contrastive", {"width": 7, "positives": "equal"}),
    "unicl_chunked": ("contrastive", {"width": 7, "positives": "equal", "chunk": 3}),
    "siglip_equal": ("contrastive", {"form": "siglip", "width": 7, "positives": "equal"}),
    "siglip_equal_chunked": ("contrastive", {"form": "siglip", "width": 7, "positives": "equal", "chunk": 3}),
    "binding": ("binding", {"others": ["audio", "text"], "width": 7}),
    "cross_modal_clustering": ("cross_modal_clustering", {"clusters": 6}),
    "cross_modal_distillation": (
        "cross_modal_distillation",
        {"teachers": {"it": {"model": "timm/test_resnet", "num_classes": 5}}},
    ),
    "multiple_instance": ("multiple_instance", {"candidates": 3, "width": 7}),
    "multiple_instance_paper": ("multiple_instance", {"form": "paper", "width": 7, "normalize": True}),
    "matching": ("matching", {"width": 7}),
    "matching_chunked": ("matching", {"width": 7, "chunk": 5}),
    "matching_uniform_joint": ("matching", {"contrastive": 0.0, "negatives": "uniform"}),
    "matching_multiway": ("matching", {"a": "video", "b": "audio", "width": 7}),
    "matching_distilled": ("matching", {"width": 7, "momentum": 0.9, "queue": 21, "ramp": 2}),
    "cross_encoder_distillation": ("cross_encoder_distillation", {"width": 7, "candidates": 3}),
    "cross_encoder_distillation_margin": (
        "cross_encoder_distillation",
        {"form": "margin_mse", "width": 7, "candidates": 20, "chunk": 9},
    ),
    "temporal_alignment": ("temporal_alignment", ALIGNMENT),
    "temporal_alignment_ambiguous": ("temporal_alignment", ALIGNMENT | {"ambiguity": 0.5}),
    "temporal_alignment_shift": (
        "temporal_alignment",
        {"form": "shift", "window": 0.5, "offsets": 1, "ambiguity": 0.9, "width": 8},
    ),
    "temporal_alignment_contrast": (
        "temporal_alignment",
        {"form": "contrast", "window": 0.5, "min_shift": 0.2, "moments": 3, "ambiguity": 0.9, "width": 8},
    ),
    "correspondence": ("correspondence", {"visual": "video", "window": 0.5, "width": 8}),
    "correspondence_distance": ("correspondence", {"form": "distance", "width": 8}),
    "combine": (
        "combine",
        {
            "tasks": {
                "turn": {"name": "rotation", "weight": 0.5, "data": "pictures"},
                "pairs": {"name": "contrastive", "form": "siglip", "width": 7, "weight": 2, "data": "pairs"},
                "words": {"name": "masked_language", "data": "pairs"},
            }
        },
    ),
    "audio_visual_autoencoder": ("audio_visual_autoencoder", JOINT | {"contrastive": 1.0}),
    "audio_visual_autoencoder_symmetric": (
        "audio_visual_autoencoder",
        JOINT | {"frame": True, "contrastive": 1.0, "symmetric": True, "joint_depth": 2},
    ),
    "audio_visual_autoencoder_alone": ("audio_visual_autoencoder", JOINT | {"contrastive": 0.0}),
    "masked_pair": ("masked_pair", {"codes": 12}),
    "masked_pair_audio": ("masked_pair", {"a": "audio", "form": "beit3", "codes": 12}),
    "masked_pair_video": ("masked_pair", {"a": "video", "form": "videobert", "codes": [3, 4]}),
    "masked_pair_patches": ("masked_pair", {"b": None, "fusion": None, "codes": 12}),
    "wav2vec2": ("wav2vec2", {"mask_length": 2, "negatives": 5, "codes": 6, "width": 4, "diversity": 5.0}),
    "hubert": ("hubert", {"mask_length": 2, "codes": 6, "width": 4, "target": "layers.0", "unmasked": 0.5}),
    "sound_speed": ("sound_speed", {"window": 0.3}),
    "pitch_shift": (
        "pitch_shift",
        {"shifts": [-1, 1], "window": 0.6, "grain": 0.2, "crossfade": 0.05, "jitter": 0.05},
    ),
    "cpc": ("cpc", {"blocks": 5, "steps": 2, "width": 7}),
    "cpc_dpc": ("cpc", {"encoder": "video", "form": "dpc", "blocks": 4, "steps": 2, "width": 7}),
    "captioning": ("captioning", {"smoothing": 0.1}),
    "captioning_audio": ("captioning", {"a": "audio"}),
    "combine_coca": (
        "combine",
        {
            "views": {"area": (0.5, 1.0)},
            "tasks": {
                "match": {"name": "contrastive", "width": 7, "views": {"area": None}},
                "caption": {"name": "captioning", "weight": 2.0},
            },
        },
    ),
    "combine_siglip2": (
        "combine",
        {
            "tasks": {
                "pairs": {"name": "contrastive", "form": "siglip", "width": 7, "views": {"area": None}},
                "caption": {"name": "captioning"},
                "distil": {"name": "dino", **DINO, "local_views": {"size": 8}, "weight": 0.25},
            },
        },
    ),
    "combine_uncoupled": (
        "combine",
        {"tasks": {"words": {"name": "masked_language"}, "sync": {"name": "temporal_alignment", **ALIGNMENT}}},
    ),
}
# Rows that never meet, a mean over tokens, all pairs of rows, a queue, several tasks; the others are long together.
QUICK = ("rotation", "masked_language", "clip", "moco", "combine")
VARIANTS = {1: (4,), 2: (4,), 4: (1,)}  # processes -> micro-batches of each: alone, together, and none


def case(name: str) -> tuple[Objective, dict[str, Tensor]]:
    kind, hyper = CASES[name]
    torch.manual_seed(1)
    patches = ("masked_autoencoder", "audio_visual_autoencoder", "jepa", "capi", "data2vec", "ibot")
    encoders = tiny_encoders() | (tiny_patches() if kind in patches else {})
    if name in ("captioning", "captioning_audio", "combine_coca", "combine_siglip2"):
        encoders = tiny_captioners(hyper.get("a", "image"))
    if kind in ("span_denoising", "denoising"):
        encoders = {"text": tiny_text_to_text()}
    if kind in ("wav2vec2", "hubert") or name == "data2vec_waves":
        encoders = {"audio": tiny_waves("hubert" if kind == "hubert" else "wav2vec2")}
    if kind == "masked_pair":
        encoders = tiny_pairs("multiway", hyper.get("a", "image"))
        if "fusion" in hyper:
            del encoders["fusion"]
    if kind == "causal_language":
        encoders["text"] = TinyCausal()
    if kind == "simcse":
        encoders["text"] = DroppingText()
    if kind == "replaced_token":
        encoders["words"] = TinyText(encoders["text"].tokenizer)
    if kind == "cross_modal_distillation":  # clips are for its teachers
        del encoders["video"]
    if kind in ("matching", "cross_encoder_distillation"):
        fusion = next((kind for kind in ("joint", "multiway") if name.endswith(kind)), "cross")
        encoders = tiny_fused(fusion, hyper.get("a", "image"), hyper.get("b", "text"))
    objective = create(kind, encoders, **hyper)
    # In training mode its statistics are those of one pass: of a micro-batch, and on a CPU of one process.
    for module in objective.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    batch = tiny_batch(ROWS, frames=48 if kind in ("sound_speed", "pitch_shift") else 12)
    if kind == "instance_discrimination":
        batch["id"] = torch.arange(ROWS).flip(0) * 2
    if name == "clip_frozen":
        objective.encoder("image").freeze()
    if hyper.get("positives") == "equal":  # on one process and on several, in one micro-batch and in several
        for key in ("text", "text_mask"):
            batch[key][[1, 6, 13]] = batch[key][0].clone()
        batch["image"][[3, 9]] = batch["image"][2].clone()
    if name == "combine":
        other = tiny_batch(ROWS, seed=1)
        batch = {f"pairs/{k}": v for k, v in batch.items()} | {f"pictures/{k}": v for k, v in other.items()}
    # Encoders that no task asked for would have no gradient.
    used = {"image", "text", "audio", "video"} & {key.rpartition("/")[2] for key in objective.needs} | {"fusion"}
    if hyper.get("frame"):  # of a clip, for an encoder of images
        used = used - {"video"} | {"image"}
    for name, encoder in list(objective.encoders.items()):
        if encoder.modality not in used:
            del objective.encoders[name]
    return objective, batch


def gradients(name: str, parts: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    objective, batch = case(name)
    local = ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in batch.items()}
    inputs = objective.transform(own, Draws(SEED, STEP, local, share=rank, shares=world))
    passes = ForwardPass(objective)
    if world == 1:
        losses = accumulated_backward(passes, inputs, parts)
    else:
        wrapped = DistributedDataParallel(passes)
        losses = accumulated_backward(passes, inputs, parts, wrapped=wrapped, no_sync=wrapped.no_sync)
        for value in losses.values():
            dist.all_reduce(value)
            value /= world
    learning = [(key, parameter) for key, parameter in objective.named_parameters() if parameter.requires_grad]
    results = {f"gradient of {key}": parameter.grad for key, parameter in learning}
    return results | losses


def process(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    results = {(name, parts): gradients(name, parts, rank, world) for name in names for parts in VARIANTS[world]}
    if rank == 0:
        torch.save(results, f"{folder}/{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


@cache
def whole(name: str) -> dict[str, Tensor]:
    """Gradients and losses of the batch in one piece."""
    return gradients(name, 1)


@pytest.fixture(scope="module")
def distributed(request, tmp_path_factory, processes) -> Callable[[int], dict]:
    """Number of processes -> their gradients, of all cases that are asked for at once."""
    folder: Path = tmp_path_factory.mktemp("gradients")
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]

    @cache
    def found(world: int) -> dict:
        processes(process, (world, str(folder), list(dict.fromkeys(names))), world)
        return torch.load(folder / f"{world}.pt")

    return found


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)], ids="{} processes".format)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_gradient_is_that_of_the_whole_batch(name, world, distributed):
    expected = whole(name)
    assert all(value is not None for value in expected.values())
    learned = [value for key, value in expected.items() if key.startswith("gradient")]
    assert len(learned) >= 4
    assert all(value.abs().max() > 1e-5 for value in learned)
    for parts in VARIANTS[world]:
        found = gradients(name, parts) if world == 1 else distributed(world)[name, parts]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key.rpartition("/")[2] in ("spread", "ranking"):
                continue  # statistics of the rows that a part sees, of known chance for any number of them
            error = (found[key] - value).abs().max() / value.abs().max().clamp(min=1e-12)
            assert error < 1e-10, f"{name}: {key} at {world} processes, {parts} micro-batches: {error:.2g}"
