"""lightly's and stable-pretraining's sides of bench_peers.py, as their documentation writes them."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

WARM_UP = 2
PROTOTYPES = {"hidden": 512, "bottleneck": 64, "prototypes": 2048}
LOCAL_CROPS = 6
VIT = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
DECODER = {"depth": 2, "embed_dim": 128, "num_heads": 4}


class Watch:
    """CPU and wall seconds of a run to its first step and after its warm-up, its parts, and its peak memory in MiB."""

    def __init__(self) -> None:
        self.first_cpu = self.first_wall = self.peak = 0.0
        self.parts: dict[str, float] = defaultdict(float)
        self.running = False

    def start(self) -> None:
        self.running, self.began = True, (cpu_seconds(), time.perf_counter())

    def stop(self) -> None:
        self.cpu, self.wall = cpu_seconds() - self.began[0], time.perf_counter() - self.began[1]
        self.running = False

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began, before = time.process_time(), sum(self.parts.values())
        yield
        if self.running:  # less what parts within it took
            self.parts[name] += time.process_time() - began - (sum(self.parts.values()) - before)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def cpu_seconds() -> float:
    """Of this process and all that it started."""
    import psutil

    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


class Case:
    """What both sides are given."""

    def __init__(self, method: str, folder: Path, options: argparse.Namespace, view: int, decode: int) -> None:
        self.method, self.folder, self.view, self.decode = method, folder, view, decode
        self.batch, self.steps = options.batch, options.steps + WARM_UP
        self.network: dict[str, Any] = {"model_name": "vit_tiny_patch16_224", "img_size": view, **VIT}
        if method != "mae":
            self.network = {"model_name": options.model.removeprefix("timm/")}
        self.blur = None if view > 32 else 0.0  # lightly's example for 32 pixels leaves it out


def run_lightly(case: Case, workers: int, watch: Watch) -> None:
    import timm
    import torch
    from lightly.data import LightlyDataset
    from lightly.transforms import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
        DINOTransform,
        MAETransform,
        SimCLRTransform,
    )

    size = {"input_size": case.view}
    blur = {} if case.blur is None else {"gaussian_blur": case.blur}
    net = timm.create_model(num_classes=0, **case.network)
    if case.method == "mae":
        transform, step = MAETransform(**size), mae_step(net)
    elif case.method == "dino":
        crops = {"global_crop_size": case.view, "local_crop_size": case.view // 2, "n_local_views": LOCAL_CROPS}
        blurs = {} if case.blur is None else {"gaussian_blur": (case.blur,) * 3}
        transform, step = DINOTransform(**crops, **blurs), dino_step(net)
    elif case.method == "simclr":
        transform, step = SimCLRTransform(**size, **blur), simclr_step(net)
    else:
        transform = BYOLTransform(BYOLView1Transform(**size, **blur), BYOLView2Transform(**size, **blur))
        step = byol_step(net)
    dataset = LightlyDataset(
        str(case.folder), transform=transform if workers else watch.wrap("augmentation", transform)
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=case.batch, shuffle=True, drop_last=True, num_workers=workers
    )
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if case.method == "mae":
        optimizer = torch.optim.AdamW(parameters, lr=1.5e-4)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.06)
    done = 0
    for _ in count():
        batches = iter(loader)
        for _ in range(len(loader)):
            if done == WARM_UP:
                watch.start()
            with watch.part("decoding"):
                views = next(batches)[0]
            loss = step(*views)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == case.steps:
                watch.stop()
                return


def simclr_step(net: Any) -> Any:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = net, SimCLRProjectionHead(net.num_features, net.num_features, 128)
            self.criterion = NTXentLoss()

        def forward(self, a: Any, b: Any) -> Any:
            return self.criterion(self.head(self.net(a)), self.head(self.net(b)))

    return Step()


def byol_step(net: Any) -> Any:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = net, BYOLProjectionHead(net.num_features, 1024, 256)
            self.answer, self.criterion = BYOLPredictionHead(256, 1024, 256), NegativeCosineSimilarity()
            self.slow_net, self.slow_head = copy.deepcopy(self.net), copy.deepcopy(self.head)
            deactivate_requires_grad(self.slow_net)
            deactivate_requires_grad(self.slow_head)

        def forward(self, a: Any, b: Any) -> Any:
            update_momentum(self.net, self.slow_net, m=0.996)
            update_momentum(self.head, self.slow_head, m=0.996)
            p, q = (self.answer(self.head(self.net(x))) for x in (a, b))
            y, z = (self.slow_head(self.slow_net(x)).detach() for x in (a, b))
            return 0.5 * (self.criterion(p, z) + self.criterion(q, y))

    return Step()


def mae_step(vit: Any) -> Any:
    import torch
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, width = vit.patch_embed.patch_size[0], DECODER["embed_dim"]
            self.encoder = MaskedVisionTransformerTIMM(vit=vit)
            self.enter = nn.Linear(vit.embed_dim, width)
            self.decoder = MaskedVisionTransformerDecoderTIMM(num_patches=vit.patch_embed.num_patches, **DECODER)
            self.leave = nn.Linear(width, 3 * self.patch**2)

        def forward(self, images: Any) -> Any:
            length = self.encoder.sequence_length
            keep, hidden = utils.random_token_mask((len(images), length), mask_ratio=0.75, device=images.device)
            tokens = self.enter(self.encoder.encode(images=images, idx_keep=keep))
            everything = utils.repeat_token(self.decoder.mask_token, (len(images), length))
            decoded = self.decoder(utils.set_at_index(everything, keep, tokens.type_as(everything)))
            pixels = self.leave(utils.get_at_index(decoded, hidden))
            target = utils.get_at_index(utils.patchify(images, self.patch), hidden - 1)
            return torch.nn.functional.mse_loss(pixels, target)

    return Step()


def dino_step(net: Any) -> Any:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = net.num_features, *PROTOTYPES.values()
            self.net, self.head = net, DINOProjectionHead(*sizes, freeze_last_layer=1)
            self.slow_net, self.slow_head = copy.deepcopy(net), DINOProjectionHead(*sizes)
            deactivate_requires_grad(self.slow_net)
            deactivate_requires_grad(self.slow_head)
            self.criterion = DINOLoss(output_dim=sizes[-1], warmup_teacher_temp_epochs=5)

        def forward(self, *views: Any) -> Any:
            update_momentum(self.net, self.slow_net, m=0.996)
            update_momentum(self.head, self.slow_head, m=0.996)
            told = [self.slow_head(self.slow_net(x)) for x in views[:2]]
            said = [self.head(self.net(x)) for x in views]
            return self.criterion(told, said, epoch=0)

    return Step()


class Files:
    """Pictures of a folder, as Pillow opens them."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Any]:
        from PIL import Image

        with Image.open(self.paths[number]) as file:
            return (file.convert("RGB"),)


def run_stable_pretraining(case: Case, workers: int, watch: Watch) -> None:
    import lightning
    import stable_pretraining as spt
    import timm
    import torch
    from loguru import logger
    from stable_pretraining import forward
    from stable_pretraining.data import FromTorchDataset
    from stable_pretraining.data.transforms import MultiViewTransform
    from stable_pretraining.methods import DINO, MAE
    from torch import nn

    logger.remove()
    net = timm.create_model(num_classes=0, **case.network)
    features, settings = net.num_features, {"optimizer": {"type": "SGD", "lr": 0.06}}
    two = [crop(case, solarize=solarize) for solarize in (0.0, 0.2 if case.method in ("byol", "dino") else 0.0)]
    transform: Any = MultiViewTransform(two)
    if case.method == "simclr":
        head = nn.Sequential(
            *(nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU()),
            *(nn.Linear(features, 128, bias=False), nn.BatchNorm1d(128)),
        )
        parts = {"backbone": net, "projector": head, "simclr_loss": spt.losses.NTXEntLoss(temperature=0.5)}
        parts["forward"] = forward.simclr
    elif case.method == "byol":

        def wide(width: int) -> Any:
            return nn.Sequential(nn.Linear(width, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 256))

        twin = spt.TeacherStudentWrapper
        parts = {"backbone": twin(net), "projector": twin(wide(features)), "predictor": wide(256)}
        parts |= {"byol_loss": spt.losses.BYOLLoss(), "forward": forward.byol}
    elif case.method == "mae":
        settings = {"optimizer": {"type": "AdamW", "lr": 1.5e-4}}
        transform = crop(case, color=False)
        sizes = {f"decoder_{name}": value for name, value in DECODER.items()}
        parts = {"method": MAE(net, norm_pix_loss=False, **sizes)}
        parts["forward"] = lambda self, batch, stage: {"loss": self.method(batch["image"]).loss}
    else:
        views = {"global_0": two[0], "global_1": two[1]}
        views |= {f"local_{i}": crop(case, area=(0.05, 0.4), size=case.view // 2) for i in range(LOCAL_CROPS)}
        transform = MultiViewTransform(views)
        hidden, bottleneck, prototypes = PROTOTYPES.values()
        sizes = {"projector_hidden_dim": hidden, "projector_bottleneck_dim": bottleneck, "n_prototypes": prototypes}
        parts = {"method": DINO(net, **sizes)}

        def dino(self: Any, batch: Any, stage: str) -> Any:
            whole, small = ([v["image"] for k, v in batch.items() if k.startswith(p)] for p in ("global", "local"))
            return {"loss": self.method(whole, small).loss}

        parts["forward"] = dino
    module = spt.Module(**parts, optim=settings)
    dataset = FromTorchDataset(Files(case.folder), names=["image"], transform=transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=case.batch, shuffle=True, drop_last=True, num_workers=workers
    )

    class Clock(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if number == WARM_UP - 1:
                watch.start()
            if number == case.steps - 1:
                watch.stop()

    callbacks: list[Any] = [Clock()]
    if case.method in ("byol", "dino"):
        callbacks.insert(0, spt.callbacks.TeacherStudentCallback())
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, max_epochs=1, limit_train_batches=case.steps, callbacks=callbacks, **quiet
    )
    trainer.fit(module, loader)


def crop(
    case: Case,
    *,
    solarize: float = 0.0,
    color: bool = True,
    area: tuple[float, float] | None = None,
    size: int | None = None,
) -> Any:
    """A view of stable-pretraining, like lightly's."""
    from stable_pretraining.data import transforms as t

    area = area or {"simclr": (0.08, 1.0), "byol": (0.08, 1.0), "mae": (0.2, 1.0), "dino": (0.4, 1.0)}[case.method]
    steps: list[Any] = [t.RGB(), t.RandomResizedCrop(size or case.view, scale=area), t.RandomHorizontalFlip(0.5)]
    if color:
        strength = (0.8, 0.8, 0.8, 0.2) if case.method == "simclr" else (0.4, 0.4, 0.2, 0.1)
        steps += [t.ColorJitter(*strength, p=0.8), t.RandomGrayscale(0.2)]
        steps += [] if case.blur is not None else [t.PILGaussianBlur(p=0.5)]
        steps += [t.RandomSolarize(128, p=solarize)] if solarize else []
    return t.Compose(*steps, t.ToImage(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
