"""Images per second of SimCLR, BYOL and MAE, end to end, against lightly's own blocks: files in, trained steps out.

    python scripts/bench_peers.py                          small files, and photos cropped to 64 pixels
    python scripts/bench_peers.py --workers 0 2 --rounds 5 --methods simclr

The first call makes an environment for lightly in build/peers: `python -m venv`, a .pth file that shows it the packages
of this Python (torch is 6 GB), then `pip install lightly`. Pictures are scenes of the toy world, written once to
build/peers-data. Both sides read the same files and train the same network of timm with the same batch and optimizer,
in one process, taking turns; every file is decoded once, and the first steps are not counted. lightly's side is the
training loop of its documentation: `LightlyDataset`, `SimCLRTransform` and its like, `DataLoader`, its heads and
losses. mmssl's is `fit`.

What a run of mmssl measures once, before its first step and after its last, is not counted either.

What differs: lightly cuts each view out of the file's pixels, image by image, with Pillow, in the workers. mmssl
decodes each file once to a square of fixed size and cuts the views out of that, on the device. "Same crops" decodes to
the file's own size, so that both cut the same pixels; "decoded small" decodes to the size of the view, which is what
most recipes do and gives small crops less detail. lightly's blur is Pillow's approximation and its MAE crops
bicubically.

The ratio is of CPU seconds of all processes, workers included, so that a busy machine changes little. "In time" is that
of seconds on the clock. Without workers, the time of an image is shown in parts: decoding, augmentation, network with
loss and gradient, optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "peers"
PEER = "lightly==1.6.0"
WARM_UP = 2
PARTS = "decoding + augmentation + network + optimizer"
COLUMNS = ("method", "pictures", "workers", "images/s of a core, lightly", "mmssl", "ratio", "in time")
COLUMNS = (*COLUMNS, f"lightly, ms: {PARTS}", "mmssl")
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
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
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

    total = time.process_time()
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
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, MAETransform, SimCLRTransform

    size = {"input_size": case.view}
    blur = {} if case.blur is None else {"gaussian_blur": case.blur}
    net = timm.create_model(num_classes=0, **case.network)
    if case.method == "mae":
        transform, step = MAETransform(**size), mae_step(net)
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


def race(case: Case, workers: int, rounds: int) -> list[str]:
    """Cells of the table."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    images = (case.steps - WARM_UP) * case.batch
    results: list[list[Watch]] = []
    for number in range(rounds):
        pair = {}
        for run in (run_mmssl, run_lightly) if number % 2 else (run_lightly, run_mmssl):
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
            pair[run] = watch
        results.append([pair[run_lightly], pair[run_mmssl]])
    cpu = [statistics.median(images / watch.cpu for watch in side) for side in zip(*results, strict=True)]
    ratio = statistics.median(theirs.cpu / ours.cpu for theirs, ours in results)
    wall = statistics.median(theirs.wall / ours.wall for theirs, ours in results)
    shares = [shown(side, images) if not workers else "" for side in zip(*results, strict=True)]
    return [f"{cpu[0]:.0f}", f"{cpu[1]:.0f}", f"**{ratio:.2f}x**", f"{wall:.2f}x", *shares]


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
    parser.add_argument("--methods", nargs="+", default=["simclr", "byol", "mae"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--model", default="timm/resnet18", help="of SimCLR and BYOL")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="counted ones of a run")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    enter_environment()
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    number = options.batch * (options.steps + WARM_UP)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    kinds = (("32 px", 32, 32, 32), ("256 px, same crops", 256, 64, 256), ("256 px, decoded small", 256, 64, 64))
    for method in options.methods:
        for name, size, view, decode in kinds:
            case = Case(method, pictures(size, number), options, view, decode)
            for workers in options.workers:
                cells = race(case, workers, options.rounds)
                print(f"| {method} | {name} | {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
