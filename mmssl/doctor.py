"""What of the environment works, what does not, and how to mend it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata

PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "timm",
    "transformers",
    "open-clip-torch",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "tokenizers",
    "av",
    "scikit-learn",
)
IMPORTS = {
    "torch": "torch",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
    "timm": "timm",
    "transformers": "transformers.modeling_utils",
    "open_clip": "open_clip",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "av": "av",
}
REMEDIES = {
    "compiled with different CUDA versions": 'torchaudio 2.11 needs an older torch: pip install "torch>=2.11,<2.15"',
    "torchvision::nms does not exist": "torchvision and torch come from different builds: "
    'pip install --force-reinstall "torch>=2.11,<2.15" torchvision from the default index',
    "libcudart": "torchaudio wants the CUDA build of torch, which also runs without a GPU: "
    'pip install --force-reinstall "torch>=2.11,<2.15"',
    "libtorch": "torchaudio and torch come from different builds: pip install --force-reinstall "
    '"torch>=2.11,<2.15" "torchaudio==2.11.*"',
}


def examine() -> tuple[str, bool]:
    """A report in plain text, and whether everything that the library needs works."""
    lines = [f"python        {sys.version.split()[0]}  {sys.executable}"]
    usable = True
    for package in PACKAGES:
        try:
            lines.append(f"{package:<18}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            usable = False
            lines.append(f"{package:<18}missing: pip install {package}")
    lines.append("")
    for name, failure in _failing_imports().items():
        usable = False
        lines.append(f"import {name} fails: {failure}")
        remedy = next((text for sign, text in REMEDIES.items() if sign in failure), None)
        lines.append(f"  mend: {remedy or f'pip install --force-reinstall {name}'}")
    if usable:
        lines += ["all imports work", "", *_devices(), "", *_codecs()]
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    lines.append(f"disk          {free:.0f} GiB free here{'' if free > 2 else '  (little: a run may not fit)'}")
    try:
        with tempfile.TemporaryFile(dir="."):
            lines.append("this folder   can be written to")
    except OSError as error:
        lines.append(f"this folder   cannot be written to ({error}); give --out another one")
    if usable:
        from huggingface_hub import get_token

        lines.append(f"hub token     {'found' if get_token() else 'none; `hf auth login` before pushing'}")
    lines.append("")
    lines.append("everything works" if usable else "something does not work; see above")
    return "\n".join(lines), usable


def _failing_imports() -> dict[str, str]:
    """Name -> the last line of the error, in processes of their own: a broken library may abort the one it is in."""
    if not _import_error(", ".join(IMPORTS.values())):
        return {}
    errors = {name: _import_error(module) for name, module in IMPORTS.items()}
    return {name: error for name, error in errors.items() if error}


def _import_error(modules: str) -> str:
    result = subprocess.run([sys.executable, "-c", f"import {modules}"], capture_output=True, text=True)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with {result.returncode}"


def _devices() -> list[str]:
    import torch

    lines = [f"cpu           {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        lines.append(f"bf16          {'yes' if torch.cuda.is_bf16_supported() else 'no, use training.precision=fp16'}")
    else:
        lines.append("cuda          none; recipes run on the CPU")
    if torch.backends.mps.is_available():
        lines.append("mps           available")
    return lines


def _codecs() -> list[str]:
    from mmssl.media.clip import codecs

    return [f"{name:<30}{'ok' if works else 'does not work'}" for name, works in codecs().items()]
