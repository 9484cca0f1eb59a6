"""Sound of the toy world: every impact rings the modes of the body that was hit."""

from __future__ import annotations

import math

import numpy as np

from mmssl.data.toy.scene import Dice, Scene, impacts

PITCH = 70.0
"""Lowest mode in Hz times the body's size in picture widths: a body half as large sounds an octave higher."""

# Frequency ratios of the modes and the time in seconds in which the first falls to 1/e: one timbre a shape.
TIMBRES = {
    "bell": ((1.0, 2.0, 2.4, 3.0, 4.5), 0.30),
    "boat": ((1.0, 1.6, 2.2), 0.05),
    "crown": ((1.0, 2.76, 5.4), 0.22),
    "cup": ((1.0, 2.3, 4.2, 6.5), 0.16),
    "heart": ((1.0, 1.5), 0.09),
    "house": ((1.0, 1.3, 1.7, 2.1), 0.06),
    "mushroom": ((1.0,), 0.12),
    "tree": ((1.0, 3.9), 0.08),
}


def synthesize(scene: Scene, dice: Dice, rate: int, seconds: float) -> np.ndarray:
    """The sound of a clip.

    An impact at time t starts at t exactly, between two samples if need be: mode k of a body adds
    `gain_k * exp(-(s / rate - t) / decay_k) * sin(2 pi f_k (s / rate - t))` from the first sample s after t on.

    Args:
        scene: what is heard.
        dice: of the noise and of each body's own detuning.
        rate: in Hz.
        seconds: of the clip, from the time 0 of the scene.

    Returns:
        float32 (rate * seconds,) in [-1, 1], on the grid of 16-bit samples.
    """
    count = round(rate * seconds)
    sound = np.zeros(count)
    tunings = [dice.uniform(0.94, 1.06) for _ in scene.bodies]
    decays = [dice.uniform(0.7, 1.4) for _ in scene.bodies]
    noise = 10 ** (dice.uniform(-55, -38) / 20)
    for hit in impacts(scene, seconds):
        body = scene.bodies[hit.body]
        ratios, decay = TIMBRES[body.shape]
        lowest = PITCH / body.size * tunings[hit.body]
        first = math.ceil(hit.time * rate)
        longest = decay * decays[hit.body]
        since = (np.arange(first, min(count, first + round(8 * longest * rate))) / rate) - hit.time
        for number, ratio in enumerate(ratios):
            if ratio * lowest < rate / 2:
                ring = np.exp(-since * (ratio / longest)) * np.sin(2 * math.pi * ratio * lowest * since)
                sound[first : first + len(since)] += 0.18 * hit.speed / (1 + number) * ring
    sound += noise * dice.array(count)
    return (np.round(np.clip(sound, -1, 1) * 32767) / 32767).astype(np.float32)
