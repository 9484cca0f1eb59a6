"""What published tasks reach on one card: one table, in a few minutes and without a network.

    python scripts/bench_gpu.py                        on the first GPU
    python scripts/bench_gpu.py --cpu --tiny           small networks, to see that every row runs
    python scripts/bench_gpu.py --rows clip mae --minutes 2

Each row trains a network of published size in bf16, with a fused optimizer and convolutions with their channels last,
on noise of the shapes that its recipe decodes. `mmssl` is the loop in the middle of a long run, records of every tenth
step included; `bare loop` is transform, forward, backward and step of the same objective; both see the same batches in
memory and take turns. `reference` is other people's code on batches of the same shapes: open_clip's own
`train_one_epoch`, on pictures that are floats already, and transformers' models for pretraining in a bare loop, without
any augmentation.

MFU counts what the forward and backward pass of a row asks of the matrix units (`torch.utils.flop_counter`), over the
card's dense peak in the table of `plan.py`. Data-wait is the share of the time at which the loop waited for a batch of
mmssl's own loader, of toy rows that are decoded once and kept: what it takes to put batches together and to carry them.

What is not installed is named, and done without. Each row has its share of the minutes; a row that fails, or does not
fit, says so, and the table is printed with what is there.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from bench_loop import ENDLESS, WARM_UP, Enough, Timed, bare, in_memory, looped
from plan import GPUS, WORDS, autocast, operations, stand_in
from torch import Tensor, nn

from mmssl.batch import Batch, to_device
from mmssl.build import build_objective
from mmssl.data.decoding import cores_to_spare
from mmssl.data.loader import Loader
from mmssl.dry_run import noise
from mmssl.encoders.text import tokenizers_of
from mmssl.objectives.base import Objective
from mmssl.recipe import Recipe, load

POOL = 3
"""Different batches in memory."""
ADAMW = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.05}
COLUMNS = ("row", "batch", "samples/s", "bare loop", "overhead", "reference", "over it", "MFU", "peak GiB", "data-wait")
OVERHEAD, DATA_WAIT, MFU, FASTER = 0.01, 0.02, 0.45, 1.1

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


@dataclass
class Found:
    """What was measured of a row; what is missing was not."""

    batch: int
    plain: list[float] = field(default_factory=list)
    """Seconds a step."""
    loop: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    operations: float | None = None
    """Of a row."""
    gigabytes: float = 0.0
    data_wait: float | None = None
    note: str = ""

    def cells(self, peak: float | None, row: Row) -> list[str]:
        """Of the table, after the name."""

        def speed(times: Sequence[float]) -> str:
            return f"{self.batch / statistics.median(times):,.0f}" if times else "-"

        mfu, faster = self.mfu(peak), self.faster
        return [
            *(str(self.batch), speed(self.loop), speed(self.plain)),
            "-" if self.overhead is None else f"{self.overhead:+.1%}",
            f"{speed(self.other)} {row.reference[0]}" if row.reference and self.other else "-",
            "-" if faster is None else f"{faster:.2f}x",
            "-" if mfu is None else f"{mfu:.1%}",
            f"{self.gigabytes:.1f}" if self.gigabytes else "-",
            "-" if self.data_wait is None else f"{self.data_wait:.1%}",
        ]

    @property
    def overhead(self) -> float | None:
        """Of the loop, as a share of the bare one's time; the median of neighbors."""
        pairs = list(zip(self.loop, self.plain, strict=False))
        return statistics.median(loop / plain for loop, plain in pairs) - 1 if pairs else None

    @property
    def faster(self) -> float | None:
        """The reference's time over the loop's."""
        pairs = list(zip(self.other, self.loop, strict=False))
        return statistics.median(other / loop for other, loop in pairs) if pairs else None

    def mfu(self, peak: float | None) -> float | None:
        """Share of the card's peak, in operations a second."""
        if peak is None or self.operations is None or not self.loop:
            return None
        return self.operations * self.batch / statistics.median(self.loop) / peak

    def verdicts(self, peak: float | None, row: Row) -> list[str]:
        """The goals, met or missed."""
        goals = [
            ("MFU", self.mfu(peak), row.mfu, True, ".1%"),
            ("over the reference", self.faster, row.faster, True, ".2f"),
            ("overhead", self.overhead, OVERHEAD, False, ".1%"),
            ("data-wait", self.data_wait, DATA_WAIT, False, ".1%"),
        ]
        found = []
        for what, value, goal, least, form in goals:
            if goal is None:
                continue
            wish = f"{'at least' if least else 'below'} {goal:{form}}"
            if value is None:
                found.append(f"{what} {wish}: not measured")
            else:
                met = value >= goal if least else value < goal
                found.append(f"{what} {value:{form}}, {wish}: {'met' if met else 'MISSED'}")
        return found


def recipe_of(row: Row, tiny: bool, batch: int) -> Recipe:
    """The recipe of a row; a small one has its own sections in place of the others, key by key."""
    tree: dict[str, Any] = {key: dict(value) for key, value in row.recipe.items()}
    for section, value in (row.tiny if tiny else {}).items():
        tree[section] = tree[section] | dict(value) if section == "data" else dict(value)
    tree["data"] |= {"source": "toy", "limit": row.kept}
    tree["training"] = {"precision": "bf16", "batch_size": batch, "schedule": {"name": "constant"}} | tree["training"]
    return load(tree)


def measure(row: Row, found: Found, options: argparse.Namespace, device: torch.device, deadline: float) -> None:
    """Fill `found`, the most wanted figures first."""
    recipe = recipe_of(row, options.tiny, found.batch)
    torch.manual_seed(0)
    words = stand_in(recipe)
    objective = build_objective(recipe, words, where="recipe", pretrained=False)
    objective.to(device).train()
    pool = batches(recipe, objective)
    theirs = pool
    if row.reference and row.reference[0] == "open_clip":  # whose workers hand out floats; one is as large as the pool
        theirs = [pinned({"image": pictures(pool[0]), "text": pool[0]["text"]})]
    left = deadline - time.perf_counter()

    def timed(share: float, own: Sequence[Batch]) -> Timed:
        return Timed(in_memory(own), options.steps, device, time.perf_counter() + share * left)

    def freely() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    for number in range(options.rounds):
        share = 0.7 / (3 * options.rounds)
        runs = [partial(bare, objective), partial(looped, objective)]
        for kind, run in list(enumerate(runs))[:: -1 if number % 2 else 1]:
            taken = run(timed(share, pool), recipe.training)
            (found.loop if kind else found.plain).append(taken.step)
            if kind:
                found.gigabytes = max(found.gigabytes, taken.gigabytes)
            objective.zero_grad()
            freely()
        if row.reference is not None:
            taken = timed(share, theirs)
            with suppress(Enough):
                row.reference[1](recipe, taken)
            found.other.append(taken.step)
            freely()
    found.operations = operations(recipe, objective, device)
    loader = Loader(
        recipe.sources(),
        objective.needs,
        batch_size=found.batch,
        seed=0,
        tokenizers=tokenizers_of(objective.exported),
        workers=options.workers,
    )
    taken = looped(objective, Timed(loader.batches, options.steps, device, deadline), recipe.training)
    found.data_wait = taken.data_wait


def batches(recipe: Recipe, objective: Objective) -> list[Batch]:
    """A few batches of noise."""
    whole = noise(recipe, objective, recipe.training.batch_size)
    return [pinned({key: value.roll(number, 0) for key, value in whole.items()}) for number in range(POOL)]


def pinned(batch: Batch) -> Batch:
    """In memory from which a card, where there is one, reads by itself."""
    return {key: value.pin_memory() if torch.cuda.is_available() else value for key, value in batch.items()}


def peak_of(device: torch.device) -> tuple[str, float | None]:
    """The card's name, and its dense peak of half precision in operations a second where it is known."""
    if device.type != "cuda":
        return "CPU", None
    name = torch.cuda.get_device_name(device)
    known = (gpu for gpu in GPUS if all(part in name.lower() for part in gpu.split("-")))
    gpu = next(known, None)
    return name, None if gpu is None else GPUS[gpu][0] * 1e12


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError for what hangs."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(name: str, row: Row, options: argparse.Namespace, device: torch.device, seconds: float) -> Found:
    """A row within its time; what went wrong is a note."""
    ends = time.perf_counter() + seconds
    batch = 8 if options.tiny else row.batch
    missing = [package for package in row.asks if not has(package)]
    if missing:
        return Found(batch, note=f"needs {', '.join(missing)}")
    while True:
        found = Found(batch)
        try:
            with limited(max(1.0, 1.3 * (ends - time.perf_counter()))):
                measure(row, found, options, device, ends)
            return found
        except torch.OutOfMemoryError:
            found.note, batch = "out of memory", batch // 2
        except Exception as error:  # the table is printed with what is there
            found.note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if options.strict:
                raise
            return found
        gc.collect()
        torch.cuda.empty_cache()
        if not batch:
            return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="although there may be a GPU")
    parser.add_argument("--tiny", action="store_true", help="small networks")
    parser.add_argument("--rows", nargs="+", default=[], help="those whose name has one of these in it")
    parser.add_argument("--minutes", type=float, default=4.5, help="of all rows together")
    parser.add_argument("--steps", type=int, default=30, help="timed in each run, unless time ends")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=cores_to_spare())
    parser.add_argument("--strict", action="store_true", help="end with the error of a row that fails")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    name, peak = peak_of(device)
    absent = [package for package in ("timm", "open_clip", "datasets", "av") if not has(package)]
    print(f"{name}, torch {torch.__version__}, {options.workers} of {os.cpu_count()} cores decode")
    print(f"not installed, and done without: {', '.join(absent) or 'nothing'}")
    if peak is None:
        print("the peak of this device is not in the table of plan.py: no MFU")
    wanted = [part.lower() for part in options.rows] or [""]
    chosen = {name: row for name, row in rows().items() if any(part in name.lower() for part in wanted)}
    ends = time.perf_counter() + 60 * options.minutes
    results: dict[str, Found] = {}
    for number, (name, row) in enumerate(chosen.items()):
        seconds = (ends - time.perf_counter()) / (len(chosen) - number)
        results[name] = measured(name, row, options, device, max(1.0, seconds))
        print(f"{name}: {results[name].note or 'done'}, {ends - time.perf_counter():.0f} s left", flush=True)
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, found in results.items():
        print(f"| {name} | {' | '.join(found.cells(peak, chosen[name]))} | {found.note}".rstrip())
    print(f"\nsamples and steps: medians of {options.rounds} rounds of up to {options.steps} after {WARM_UP} others")
    for name, found in results.items():
        print(f"{name}: {'; '.join(found.verdicts(peak, chosen[name]))}")


if __name__ == "__main__":
    main()
