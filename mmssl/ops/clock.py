"""One clock for the frames and the samples of a clip."""

from __future__ import annotations

from mmssl.errors import RecipeError


def samples_per_frame(task: str, frames: int, samples: int) -> int:
    """How many samples are heard while a frame is seen.

    Raises:
        RecipeError: where that is no whole number, naming the task and the way out.
    """
    if samples % frames:
        raise RecipeError(
            f"{task} needs a whole number of samples for each frame, here are {samples} for {frames}: "
            "set data.audio.seconds to data.video.frames / data.video.fps, and fps to a divisor of the audio rate"
        )
    return samples // frames
