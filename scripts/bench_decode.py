"""Windows of clips a CPU second against PyAV by hand, and memory as windows go by; a line of docs/results.md.

    python scripts/bench_decode.py
    python scripts/bench_decode.py --windows 5000

Forty clips of six seconds are written, 160 x 160 pixels at 25 frames a second, H.264 and AAC in MP4, of noise that
drifts. By hand is what a script does that needs no more: seek, take frames and samples by their time stamps, scale and
resample. It gives other samples after a seek into AAC, pads nothing and says nothing of broken files.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import av
import numpy as np

from mmssl.decode_settings import AudioDecode, VideoDecode
from mmssl.media.clip import decode_clip, write_clip

CLIPS, SECONDS, SIDE = 40, 6, 160
RATE, FPS = 22_050, 25
AUDIO = AudioDecode(rate=16_000, seconds=1.28)
VIDEO = VideoDecode(size=64, fps=12.5, frames=16)
WINDOWS = (0.1, 0.5, 0.9)
ROUNDS = 7
Read = Callable[[bytes, float], object]


def make_clips() -> list[bytes]:
    rng = np.random.default_rng(0)
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(CLIPS):
            path = Path(folder) / f"{number}.mp4"
            coarse = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            frames = np.stack([np.roll(coarse, k, 1) for k in range(FPS * SECONDS)])
            sound = (0.1 * rng.normal(size=RATE * SECONDS)).astype(np.float32)
            write_clip(path, frames, FPS, sound, RATE)
            clips.append(path.read_bytes())
    return clips


def sound_by_hand(clip: bytes, start: float) -> np.ndarray:
    """Straight from the first packet: of AAC no seek gives the same samples."""
    length, parts, found = round(AUDIO.rate * AUDIO.seconds), list[np.ndarray](), 0
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=AUDIO.rate)
        for frame in container.decode(stream):
            if frame.time + frame.samples / frame.sample_rate < start:
                continue
            for part in resampler.resample(frame):
                parts.append(part.to_ndarray()[0])
                found += part.samples
            if found >= length:
                break
    return np.concatenate(parts)[:length]


def pictures_by_hand(clip: bytes, start: float) -> np.ndarray:
    due, shown, current = [start + k / VIDEO.fps for k in range(VIDEO.frames)], list[np.ndarray](), None
    with av.open(io.BytesIO(clip)) as container:
        stream = container.streams.video[0]
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            while current is not None and len(shown) < len(due) and due[len(shown)] < frame.time:
                shown.append(current.to_ndarray(format="rgb24", width=VIDEO.size, height=VIDEO.size))
            if len(shown) == len(due):
                break
            current = frame
    return np.stack(shown)


def both_by_hand(clip: bytes, window: float) -> None:
    start = window * (SECONDS - AUDIO.seconds)
    sound_by_hand(clip, start)
    pictures_by_hand(clip, start)


READERS: dict[str, tuple[Read, Read]] = {
    "sound": (
        lambda clip, window: sound_by_hand(clip, window * (SECONDS - AUDIO.seconds)),
        lambda clip, window: decode_clip(clip, audio=AUDIO, window=window),
    ),
    "pictures": (
        lambda clip, window: pictures_by_hand(clip, window * (SECONDS - AUDIO.seconds)),
        lambda clip, window: decode_clip(clip, video=VIDEO, window=window),
    ),
    "both": (both_by_hand, lambda clip, window: decode_clip(clip, audio=AUDIO, video=VIDEO, window=window)),
}


def milliseconds(read: Read, clips: list[bytes]) -> float:
    """CPU time of a window."""
    began = time.process_time()
    for clip in clips:
        for window in WINDOWS:
            read(clip, window)
    return 1000 * (time.process_time() - began) / (len(clips) * len(WINDOWS))


def compare(clips: list[bytes]) -> None:
    for name, readers in READERS.items():
        rounds = [[milliseconds(read, clips) for read in readers] for _ in range(ROUNDS)]
        hand, library = (median(column) for column in zip(*rounds, strict=True))
        speed = median(a / b for a, b in rounds)
        print(f"{name:<9} by hand {hand:.2f} ms a window, mmssl {library:.2f} ms: {speed:.2f}x")


def watch_memory(clips: list[bytes], windows: int) -> None:
    """Resident memory, MiB, as windows go by."""
    read = READERS["both"][1]
    for number in range(1, windows + 1):
        read(clips[number % len(clips)], number / windows)
        if number in (100, 500, 1000, windows):
            pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            print(f"{number:>6,} windows: {pages * resource.getpagesize() / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=0, help="read so many in place of comparing, and watch memory")
    asked = parser.parse_args()
    made = make_clips()
    if asked.windows:
        watch_memory(made, asked.windows)
    else:
        compare(made)
