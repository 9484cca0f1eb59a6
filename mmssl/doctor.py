"""What of the environment works, what does not, and how to mend it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from importlib import metadata

# Distribution -> the module whose import shows that it works.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio.transforms",
    "timm": "timm",
    "transformers": "transformers.modeling_utils",
    "open-clip-torch": "open_clip",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "huggingface-hub": "huggingface_hub",
    "safetensors": "safetensors.torch",
    "tokenizers": "tokenizers",
    "av": "av",
    "scikit-learn": "sklearn.linear_model",
    "matplotlib": "matplotlib.figure",
    "tensorboard": "torch.utils.tensorboard",
}
TOGETHER = '"torch>=2.11,<2.15" "torchvision>=0.26" "torchaudio==2.11.*"'
ENOUGH_DISK = 2.0  # GiB
TRY_IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps([name, "starts"]), flush=True)
    try:
        importlib.import_module(name)
        answer = ""
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps([name, answer]), flush=True)
"""


def examine() -> tuple[str, bool]:
    """A report in plain text, and whether everything that the library needs works."""
    versions = {name: _version(name) for name in PACKAGES}
    lines = [_line("python", f"{sys.version.split()[0]}  {sys.executable}")]
    lines += [_line(name, version or "missing") for name, version in versions.items()]
    failing = failing_imports([module for name, module in PACKAGES.items() if versions[name]])
    problems = conflicts(versions)
    problems += [
        f"{name} is missing. Mend: {sys.executable} -m pip install {name}"
        for name, version in versions.items()
        if version is None
    ]
    problems += [f"import {module} fails: {reason}" for module, reason in failing.items()]

    lines.append("")
    if "torch" not in failing and versions["torch"]:
        lines += devices()
    if not problems:
        lines += formats()
    free = shutil.disk_usage(".").free / 2**30
    lines.append(_line("disk", f"{free:.0f} GiB free here" + ("" if free > ENOUGH_DISK else ", little for a run")))
    try:
        with tempfile.TemporaryFile(dir="."):
            lines.append(_line("this folder", "can be written to"))
    except OSError as error:
        lines.append(_line("this folder", f"cannot be written to ({error.strerror}); give --out another one"))
    if "huggingface_hub" not in failing and versions["huggingface-hub"]:
        from huggingface_hub import get_token

        lines.append(_line("hub token", "found" if get_token() else "none; needed to push, `hf auth login` stores one"))
    lines += ["", *(f"- {problem}" for problem in problems)]
    lines.append("something does not work" if problems else "everything works")
    return "\n".join(lines), not problems


def conflicts(versions: Mapping[str, str | None]) -> list[str]:
    """Combinations of versions that are known not to work, each in one sentence with the command that mends it.

    Args:
        versions: distribution -> version, None where it is missing.
    """
    torch, audio = versions.get("torch"), versions.get("torchaudio")
    found = []
    if torch and not (2, 11) <= _number(torch) < (2, 15):
        unfit = f", and torchaudio {audio} does not import with it" if audio and _number(torch) >= (2, 15) else ""
        found.append(
            f"torch {torch} is not one of 2.11 to 2.14{unfit}. Mend: {sys.executable} -m pip install {TOGETHER}"
        )
    for name in ("torchvision", "torchaudio"):
        version = versions.get(name)
        if torch and version and torch.endswith("+cpu") and not version.endswith("+cpu"):
            found.append(
                f"torch {torch} has no CUDA libraries, and {name} {version} was built against them. Mend: "
                f"{sys.executable} -m pip install --force-reinstall {TOGETHER} (they run without a GPU, too)"
            )
    return found


def failing_imports(modules: Sequence[str]) -> dict[str, str]:
    """Module -> why it cannot be imported; in a process of their own, because a broken library may abort it."""
    left, failing = list(modules), {}
    while left:
        process = subprocess.run([sys.executable, "-c", TRY_IMPORTS, *left], capture_output=True, text=True)
        answers = dict(json.loads(line) for line in process.stdout.splitlines() if line.startswith("["))
        for name, answer in answers.items():
            if answer == "starts":
                failing[name] = f"the process ended with {process.returncode}"
            elif answer:
                failing[name] = " ".join(answer.split())
        if not answers:
            return failing | dict.fromkeys(left, "Python itself does not start: " + process.stderr.strip()[-200:])
        left = [name for name in left if name not in answers]
    return failing


def devices() -> list[str]:
    """Cores and accelerators, one a line."""
    import torch

    lines = [_line("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bf16: use training.precision=fp16"
        lines.append(_line(f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{bf16}"))
    if not torch.cuda.is_available():
        lines.append(_line("cuda", "none; recipes run on the CPU"))
    if torch.backends.mps.is_available():
        lines.append(_line("mps", "available"))
    return lines


def formats() -> list[str]:
    """Containers, codecs and picture formats, each tried by writing and reading a moment of it."""
    from mmssl.media.clip import codecs

    tried = codecs()
    lines = []
    for title, wanted in (("reads", True), ("does not read", False)):
        names = [name for name, works in tried.items() if works is wanted]
        if names:
            lines += textwrap.wrap(_line(title, ", ".join(names)), 100, subsequent_indent=_line("", ""))
    return lines


def media() -> str:
    """Of every container and pair of codecs: whether sound and pictures come back in time. Takes half a minute."""
    from mmssl.media.clocks import AUDIO, RATE, clocks

    os.environ.setdefault("SVT_LOG", "-1")  # AV1's encoder writes a page for every clip
    cells: dict[tuple[str, str], list[str]] = {}
    faults: dict[tuple[str, str, str], list[str]] = {}
    for clock in clocks():
        cells.setdefault((clock.container, clock.video), []).append(clock.verdict)
        if clock.fault:
            faults.setdefault((clock.container, clock.audio, clock.fault), []).append(clock.video)
    lines = [
        f"A click and a flash, read straight and by seeking, at {RATE:,} samples and 25 frames a second, of streams",
        "that start at zero and later. exact: to one sample and one frame; at zero: only where all streams start so;",
        "refused: the container does not take these codecs, or FFmpeg has none of that name here.",
        "",
        f"{'':<18}" + "".join(f"{name:<9}" for name in AUDIO).rstrip(),
    ]
    for (container, video), row in cells.items():
        lines.append(f"{container + ' ' + video:<18}" + "".join(f"{cell:<9}" for cell in row).rstrip())
    lines.append("")
    for (container, audio, fault), pictures in faults.items():
        lines.append(f"{container}, {audio} with {', '.join(pictures)}: {fault}")
    if any(container == "avi" for container, *_ in faults):
        lines.append(
            "avi has no field for the start of a stream or the delay of an encoder: its files themselves are off."
        )
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _line(name: str, text: str) -> str:
    return f"{name:<18}{text}"
