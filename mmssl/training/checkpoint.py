"""Checkpoints: one directory a step, whole or absent, and nothing in it is ever unpickled.

    state/step_00000200/model.safetensors       every unique parameter and buffer of the objective
    state/step_00000200/optimizer.safetensors   `parameter name:state name` -> tensor
    state/step_00000200/state.json              step, scaler, checksums of the other two
    model.safetensors                           the newest weights, the same file

A checkpoint is written under a temporary name, flushed to the disk and renamed; only then is its predecessor removed.
So a process that is killed at any moment, or a disk that fills up, leaves the last whole one.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmssl.atomic import flush, temporary_name
from mmssl.errors import RunError
from mmssl.way_on import RESUMED, way_on

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
CHECKSUMS = "crc32"
RESTORE = "bring it back from a copy of the run, or start anew with another --out"


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, under its first name: encoders that tasks share are stored once."""
    saved = set(module.state_dict(keep_vars=True))
    buffers = {name: b for name, b in module.named_buffers() if name in saved}
    return dict(module.named_parameters()) | buffers


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy a checkpoint's tensors into `module`, in place.

    Raises:
        RunError: where the file is damaged, or names or shapes differ from the module's.
    """
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path}: not a readable safetensors file: {error}") from error
    own = tensors(module)
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unexpected:
        raise RunError(
            f"{path}: does not fit the recipe: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unknown {unexpected[:3]}"
        )
    for name, target in own.items():
        if target.shape != stored[name].shape:
            raise RunError(
                f"{path}: {name} has shape {tuple(stored[name].shape)}, the recipe's is {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(_like(stored[name], target))


def save(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], main: bool
) -> None:
    """Write the checkpoint of `state["step"]` and make it the newest.

    Args:
        directory: of the run.
        module: the objective; sharded parameters are collected, so every process must call this.
        optimizer: its state is stored by parameter name.
        state: JSON-able; holds `step`.
        main: whether this process writes.

    Raises:
        RunError: where the disk refuses; the previous checkpoint is then whole and nothing half-written stays.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    moments = {
        f"{names[id(parameter)]}:{key}": whole(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    weights = {name: whole(value) for name, value in tensors(module).items()}
    broken = next((name for name in dict(module.named_parameters()) if not weights[name].isfinite().all()), None)
    if broken is not None:  # on every process alike
        raise RunError(
            f"{directory}: {broken} is not finite after step {state['step']}, which is not saved; {way_out(directory)}"
        )
    if not main:
        return
    room = directory / "state"
    final = room / f"step_{state['step']:08d}"
    if final.exists():
        settle(directory)  # a resumed run that stops at once: the same step is the same state
        return
    temporary = temporary_name(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        room.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        save_file(moments, temporary / OPTIMIZER)
        state = state | {CHECKSUMS: {name: checksum(temporary / name) for name in (WEIGHTS, OPTIMIZER)}}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        flush([*temporary.iterdir(), temporary])
        temporary.rename(final)
        flush([room])
        settle(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = newest(directory)
        kept = f"the checkpoint {last.name} is whole" if last else "there is no earlier checkpoint"
        raise RunError(
            f"{directory}: could not save step {state['step']} ({error}); {kept}; free space, and then {way_on()}"
        ) from error


def settle(directory: Path) -> None:
    """Make the newest checkpoint's weights those of the run, and leave no other; a save may have been killed between.

    Raises:
        OSError: where the disk refuses.
    """
    last = newest(directory)
    if last is None:
        return
    weights = directory / WEIGHTS
    if not weights.exists() or not weights.samefile(last / WEIGHTS):
        publish(last / WEIGHTS, weights)
    for other in last.parent.iterdir():
        if other != last:
            shutil.rmtree(other, ignore_errors=True)


def way_out(directory: Path | None) -> str:
    """What to do about weights or a loss that are not finite: where to go back to, and what to change."""
    # What is repeated at another rate is another training.
    last = newest(directory) if directory is not None and way_on() == RESUMED else None
    start = f"the checkpoint {last.name} is whole: go on from it with --resume and" if last else "start again with"
    return f"{start} a lower training.optimizer.lr, training.clip=1 or training.precision=fp32"


def publish(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step; a copy where the file system has no hard links."""
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        flush([temporary])
    temporary.replace(target)
    flush([target.parent])


def newest(directory: Path) -> Path | None:
    """The last whole checkpoint of a run directory, or None."""
    found = sorted((directory / "state").glob("step_*"))
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint; raises RunError where it cannot be read."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or type(state.get("step")) is not int:
            raise ValueError("it names no step")
        if state["step"] < 0:
            raise ValueError(f"step = {state['step']}")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}; start anew with another --out") from error
    return state


def checksum(path: Path) -> int:
    """CRC-32 of a file: it tells bits that a disk or a copy has changed, at 3 GB a second."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            value = zlib.crc32(chunk, value)
    return value


def check_bits(checkpoint: Path) -> None:
    """Raise RunError where a file of a checkpoint is missing, or is not as it was written."""
    for name, written in read_state(checkpoint).get(CHECKSUMS, {}).items():
        path = checkpoint / name
        try:
            found = checksum(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror or error}; {RESTORE}") from error
        if found != written:
            raise RunError(f"{path} is damaged: its bits are others than those that were written; {RESTORE}")


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, checkpoint: Path) -> int:
    """Restore all of a checkpoint's state but the weights; returns the steps that were done.

    Args:
        module: the objective.
        optimizer: bare.
        scaler: of half precision, or None.
        checkpoint: of the same recipe.

    Raises:
        RunError: where a file is damaged or does not fit the module.
    """
    state = read_state(checkpoint)
    load_optimizer(module, optimizer, checkpoint)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Restore the optimizer's state from a checkpoint of the same recipe.

    Raises:
        RunError: where the file is damaged or speaks of parameters that the module does not have.
    """
    path = checkpoint / OPTIMIZER
    parameters = dict(module.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            for entry in file.keys():  # noqa: SIM118 - not a dictionary
                name, _, key = entry.rpartition(":")
                if name not in parameters:
                    raise RunError(f"{path}: speaks of '{name}', which the recipe's model does not have")
                value, parameter = file.get_tensor(entry), parameters[name]
                shape = () if key == "step" else tuple(parameter.shape)
                if value.shape != shape:
                    raise RunError(f"{path}: {entry} has shape {tuple(value.shape)}, the recipe's is {shape}")
                if key != "step":
                    value = _like(value, parameter)
                elif optimizer.defaults.get("fused"):  # else the counters stay on the CPU
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: not a readable safetensors file: {error}") from error


def whole(value: Tensor) -> Tensor:
    """A copy on the CPU, collected from all processes where each holds a part."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().contiguous().clone()


def _like(value: Tensor, target: Tensor) -> Tensor:
    """On the device of `target` and with its shards or strides."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return torch.empty_like(target, dtype=value.dtype).copy_(value)
