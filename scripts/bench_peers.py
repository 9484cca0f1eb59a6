"""Images per second of SimCLR, BYOL, MAE and DINO, end to end, against lightly and stable-pretraining.

Files in, trained steps out.

    python scripts/bench_peers.py                          small files, and photos cropped to 64 pixels
    python scripts/bench_peers.py --workers 0 2 --rounds 5 --methods simclr
    python scripts/bench_peers.py --alone                  time to the first step, and memory

The first call makes an environment for both in build/peers: `python -m venv`, a .pth file that shows it the packages
of this Python (torch is 6 GB), then `pip install`, of stable-pretraining with the few of its needs that this asks for.
Pictures are scenes of the toy world, written once to build/peers-data. All sides read the same files and train the same
network of timm with the same batch and optimizer, in one process, taking turns; every file is decoded once, and the
first steps are not counted. lightly's side is the training loop of its documentation: `LightlyDataset`,
`SimCLRTransform` and its like, `DataLoader`, its heads and losses. stable-pretraining's is its `Module` with its own
forward functions or methods, losses, transforms and callbacks, in Lightning's `Trainer` without logger, checkpoints and
bar. mmssl's is `fit`. Of DINO there are two crops and six of half their size, and 2,048 prototypes.

What a run of mmssl measures once, before its first step and after its last, is not counted either.

What differs: the others cut each view out of the file's pixels, image by image, with Pillow, in the workers. mmssl
decodes each file once to a square of fixed size and cuts the views out of that, on the device. "Same crops" decodes to
the file's own size, so that both cut the same pixels; "decoded small" decodes to the size of the view, which is what
most recipes do and gives small crops less detail. lightly's blur is Pillow's approximation and its MAE crops
bicubically.

The ratio is of CPU seconds of all processes, workers included, so that a busy machine changes little. "In time" is that
of seconds on the clock. Without workers, the time of an image is shown in parts: decoding, augmentation, network with
loss and gradient, optimizer. `--alone` starts a process for each side, and says how many CPU seconds it takes from
there to the end of the first step, imports included, and what it holds at most after a few.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "peers"
PEERS = ["lightly==1.6.0"]
# Without what it needs for other things: wandb, minari, pylance, opencv ...
BARE = ["stable-pretraining==0.1.8", "lightning", "loguru", "requests-cache", "url-normalize", "cattrs", "platformdirs"]
BARE += ["kornia", "kornia_rs", "tabulate", "submitit", "prettytable"]
WARM_UP = 2
PARTS = "decoding + augmentation + network + optimizer"
SIDES = ("lightly", "stable-pretraining", "mmssl")
COLUMNS = ("method", "pictures", "workers", f"images/s of a core: {', '.join(SIDES)}")
COLUMNS = (*COLUMNS, "over lightly (in time)", "over stable-pretraining (in time)")
COLUMNS = (*COLUMNS, f"lightly, ms: {PARTS}", "mmssl")
PROTOTYPES = {"hidden": 512, "bottleneck": 64, "prototypes": 2048}
LOCAL_CROPS = 6
VIT = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
DECODER = {"depth": 2, "embed_dim": 128, "num_heads": 4}


def enter_environment() -> None:
    """Go on in the peers' own environment; makes it where it is missing."""
    python = HOME / "bin" / "python"
    if Path(sys.prefix) == HOME:
        return
    if not (HOME / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        shown = [sysconfig.get_path("purelib"), str(ROOT)]
        (Path(site.stdout.strip()) / "shown.pth").write_text("\n".join(shown))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *BARE], check=True)
        (HOME / "ready").touch()
    os.execv(python, [str(python), *sys.argv])


class Watch:
    """CPU and wall seconds of a run after its first steps, and the shares of its parts in this process."""

    def __init__(self) -> None:
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


def pictures(size: int, number: int) -> Path:
    """A folder of scenes: PNG files up to 64 pixels, JPEG files above."""
    from PIL import Image

    from mmssl.data.toy import ToySource

    folder, kind = ROOT / "build" / "peers-data" / str(size), "png" if size <= 64 else "jpg"
    folder.mkdir(parents=True, exist_ok=True)
    source = ToySource(rows=number, size=size)
    for i in range(number):
        path = folder / f"{i:05}.{kind}"
        if not path.exists():
            Image.fromarray(source.row(i)["image"]).save(path, quality=90)
    return folder


class Case:
    """What both sides are given."""

    def __init__(self, method: str, folder: Path, options: argparse.Namespace, view: int, decode: int) -> None:
        self.method, self.folder, self.view, self.decode = method, folder, view, decode
        self.batch, self.steps = options.batch, options.steps + WARM_UP
        self.network: dict[str, Any] = {"model_name": "vit_tiny_patch16_224", "img_size": view, **VIT}
        if method != "mae":
            self.network = {"model_name": options.model.removeprefix("timm/")}
        self.blur = None if view > 32 else 0.0  # lightly's example for 32 pixels leaves it out


def run_mmssl(case: Case, workers: int, watch: Watch) -> None:
    import mmssl
    from mmssl.data.loader import Loader
    from mmssl.decode_settings import ImageDecode
    from mmssl.recipe import Data, Optimizer, Schedule, Training
    from mmssl.training.loop import fit

    network = {**case.network, "model": f"timm/{case.network['model_name']}"}
    del network["model_name"]
    views = {"size": case.view, **({} if case.blur is None else {"blur": case.blur})}
    hyper: dict[str, Any] = {
        "simclr": {"name": "simclr", "temperature": 0.5, "views": views},
        "byol": {"name": "byol", "hidden": 1024, "views": views},
        "mae": {
            "name": "masked_autoencoder",
            **{"views": {"size": case.view}, "norm_pix": False, "decoder_depth": DECODER["depth"]},
            **{"decoder_width": DECODER["embed_dim"], "decoder_heads": DECODER["num_heads"]},
        },
        "dino": {
            **{
                "name": "dino",
                "local_crops": LOCAL_CROPS,
                "views": views,
                "local_views": views | {"size": case.view // 2},
            },
            **PROTOTYPES,
        },
    }[case.method]
    objective = mmssl.objective(encoders={"image": mmssl.encoder(modality="image", **network)}, **hyper)
    objective.transform = watch.wrap("augmentation", objective.transform)
    after_step = objective.after_step

    def stop_after_last(progress: float) -> None:
        after_step(progress)
        if progress == 1.0:
            watch.stop()

    objective.after_step = stop_after_last  # type: ignore[method-assign]
    data = Data(source=str(case.folder), image=ImageDecode(size=case.decode))
    loader = Loader({"": data}, ["image"], batch_size=case.batch, seed=0, workers=workers)

    class Counted:
        steps_per_epoch = None

        def batches(self, start: int, stop: int) -> Iterator[Any]:
            inner = loader.batches(start, stop)
            for step in range(start, stop):
                if step == WARM_UP:
                    watch.start()
                with watch.part("decoding"):
                    batch = next(inner)
                yield batch

    plain = {"name": "sgd", "lr": 0.06, "weight_decay": 0.0, "momentum": 0.0}
    adamw = {"name": "adamw", "lr": 1.5e-4, "weight_decay": 0.01}
    training = Training(
        steps=case.steps,
        batch_size=case.batch,
        optimizer=Optimizer(**(adamw if case.method == "mae" else plain)),
        schedule=Schedule(name="constant"),
    )
    fit(objective, Counted(), training, quiet=True)


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


RUNS = (run_lightly, run_stable_pretraining, run_mmssl)


def race(case: Case, workers: int, rounds: int) -> list[str]:
    """Cells of the table."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    images = (case.steps - WARM_UP) * case.batch
    results: list[list[Watch]] = []
    for number in range(rounds):
        found = {}
        for run in RUNS[number % 3 :] + RUNS[: number % 3]:
            gc.collect()
            watch, entered = Watch(), [0.0]

            def enter(*_: Any, entered: list[float] = entered) -> None:
                entered[0] = time.process_time()

            def leave(*_: Any, entered: list[float] = entered, watch: Watch = watch) -> None:
                if watch.running:
                    watch.parts["optimizer"] += time.process_time() - entered[0]

            hooks = [register_optimizer_step_pre_hook(enter), register_optimizer_step_post_hook(leave)]
            run(case, workers, watch)
            for hook in hooks:
                hook.remove()
            found[run] = watch
        results.append([found[run] for run in RUNS])
    sides = list(zip(*results, strict=True))
    over = [
        " ".join(
            form.format(statistics.median(getattr(row[peer], what) / getattr(row[-1], what) for row in results))
            for form, what in (("**{:.2f}x**", "cpu"), ("({:.2f}x)", "wall"))
        )
        for peer in (0, 1)
    ]
    speeds = ", ".join(f"{statistics.median(images / watch.cpu for watch in side):.0f}" for side in sides)
    shares = [shown(side, images) if not workers else "" for side in (sides[0], sides[-1])]
    return [speeds, *over, *shares]


def alone(case: Case, side: str) -> None:
    """Take a few steps, and print the CPU seconds to the end of the first one and the largest memory in MiB."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    first: list[float] = []
    register_optimizer_step_post_hook(lambda *_: first.append(cpu_seconds()))
    RUNS[SIDES.index(side)](case, 0, Watch())
    print(json.dumps([first[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def by_itself(method: str, side: str, model: str, rounds: int) -> tuple[float, float]:
    """Medians of what `alone` prints, each time in a process of its own."""
    command = [sys.executable, __file__, "--methods", method, "--model", model, "--steps", "2", "--side", side]
    found = []
    for _ in range(rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return statistics.median(row[0] for row in found), statistics.median(row[1] for row in found)


def shown(watches: tuple[Watch, ...], images: int) -> str:
    """Milliseconds an image: decoding, augmentation, network, optimizer."""
    parts = {
        name: statistics.median(w.parts[name] for w in watches) for name in ("decoding", "augmentation", "optimizer")
    }
    total = statistics.median(watch.cpu for watch in watches)
    network = total - sum(parts.values())
    row = (parts["decoding"], parts["augmentation"], network, parts["optimizer"])
    return " + ".join(f"{1000 * part / images:.2f}" for part in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=["simclr", "byol", "mae", "dino"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--model", default="timm/resnet18", help="of all but MAE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="counted ones of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 256], help="of the files, in pixels")
    parser.add_argument("--alone", action="store_true", help="time to the first step, and memory")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    enter_environment()
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    number = options.batch * (options.steps + WARM_UP)
    if options.side:
        alone(Case(options.methods[0], pictures(32, number), options, 32, 32), options.side)
        return
    if options.alone:
        print("| method | side | CPU s to the first step, imports included | peak MiB |\n|---|---|---|---|")
        for method, side in product(options.methods, SIDES):
            seconds, peak = by_itself(method, side, options.model, options.rounds)
            print(f"| {method} | {side} | {seconds:.1f} | {peak:.0f} |", flush=True)
        return
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    kinds = (("32 px", 32, 32, 32), ("256 px, same crops", 256, 64, 256), ("256 px, decoded small", 256, 64, 64))
    for method in options.methods:
        for name, size, view, decode in kinds:
            if size not in options.sizes:
                continue
            case = Case(method, pictures(size, number), options, view, decode)
            for workers in options.workers:
                cells = race(case, workers, options.rounds)
                print(f"| {method} | {name} | {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
