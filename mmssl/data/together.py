"""Whether sound and pictures of a clip are there at the same time, of which alone a task on both reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmssl.errors import DataError
from mmssl.media.audio import open_sound
from mmssl.media.video import open_pictures

ALONE = 0.5
"""Seconds of a clip that have sound or pictures and not both, beyond which they are told."""


def sound_and_pictures(clips: Sequence[tuple[int, Any, Any]]) -> tuple[list[str], list[str]]:
    """Rows that no task on both can read, a sentence each, and a note where much of the others is left out.

    Args:
        clips: number, cell of the sound and cell of the pictures of each row; those that cannot be opened, or lack
            one of both, are passed over.
    """
    apart, opened, alone = list[str](), 0, 0
    for number, heard, seen in clips:
        try:
            with open_sound(heard) as sound, open_pictures(seen) as pictures:
                both = min(sound.end, pictures.end) - max(sound.start, pictures.start)
                whole = max(sound.end, pictures.end) - min(sound.start, pictures.start)
                name = sound.name
        except DataError:
            continue
        opened += 1
        alone += whole - max(0.0, both) > ALONE
        if both <= 0:
            apart.append(f"clip, row {number}: {name}: its sound and its pictures do not overlap in time")
    if not alone:
        return apart, []
    many = f"{alone} of {opened} clips have sound or pictures alone for more than {ALONE:g} s"
    return apart, [f"{many}, which tasks on both leave out"]
