"""The files below a folder, of which there may be millions: of each the disk is asked once, by its folder's listing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mmssl.data.files import some_of
from mmssl.errors import counted

# What unpacking and shared drives leave beside pictures: small copies, and files with the names of pictures.
LEFT_BEHIND = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def walk(root: Path) -> tuple[list[Path], list[str]]:
    """All files below a folder, sorted, without those that are hidden, and notes on what cannot be read.

    Links are followed, and each folder is read once however many links lead to it (told by device and inode), under
    the name without links where it has one. Pipes and devices, whose reading may never end, are left out, and names
    that are not UTF-8, which a table of paths cannot hold. A link that leads nowhere is a file: its row says so.
    """
    seen: set[tuple[int, int]] = set()
    files: list[Path] = []
    closed: list[str] = []
    odd: list[Path] = []
    waiting = [root]
    while waiting:
        linked: list[Path] = []
        waiting.reverse()
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as found:
                    entries = sorted((one for one in found if not _is_hidden(one.name)), key=lambda one: one.name)
                status = os.stat(folder)
            except OSError as error:
                closed.append(str(error.filename))
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            folders = [one for one in entries if _is_folder(one)]
            linked += [folder / one.name for one in folders if one.is_symlink()]
            waiting += [folder / one.name for one in reversed(folders) if not one.is_symlink()]
            for one in entries:
                if not _is_folder(one):
                    (odd if _is_endless(one) else files).append(folder / one.name)
        waiting = linked
    # By their parts, as paths are ordered, which compare much more slowly themselves.
    good = sorted((file for file in files if _is_text(str(file))), key=lambda file: file.parts)
    notes = [f"folders that cannot be opened are left out: {some_of(closed)}"] if closed else []
    notes += [f"pipes and devices are left out: {some_of([path.name for path in sorted(odd)])}"] if odd else []
    left = len(files) - len(good)
    return good, [*notes, *([f"{counted(left, 'file')} left out, of a name that is not UTF-8"] if left else [])]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BEHIND


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_endless(entry: os.DirEntry[str]) -> bool:
    try:
        # Of what is no link the listing says so, and nothing is asked of the disk.
        return not entry.is_file(follow_symlinks=False) and not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
