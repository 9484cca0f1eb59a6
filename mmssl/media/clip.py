"""Sound and pictures of one clip, on one clock."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from mmssl.errors import DataError
from mmssl.media.audio import Sound, open_sound
from mmssl.media.cell import sentence
from mmssl.media.image import decode_image
from mmssl.media.track import Timed, window_start
from mmssl.media.video import Pictures, open_pictures

if TYPE_CHECKING:
    from mmssl.decode_settings import AudioDecode, VideoDecode


def decode_clip(
    cell: Any,
    *,
    audio: AudioDecode | None = None,
    video: VideoDecode | None = None,
    window: float | Sequence[float] = 0.0,
    center: float | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Decode a window of a clip: sample `s` and frame `t` happen `s / rate` and `t / fps` seconds after one instant.

    Each track's own start is honored. The window lies where all wanted tracks are present; its start falls on the
    nearest sample of the sound.

    Args:
        cell: bytes, a path or `{"bytes", "path"}` of a container with all wanted tracks, or `{"audio": cell, "video":
            cell}` of decoded arrays or files whose clocks agree.
        audio: decode settings; None leaves the sound out.
        video: decode settings; None leaves the pictures out.
        window: which part of a longer clip, in [0, 1]: 0 is the start, 0.5 the middle. The window is as long as the
            longer of the two. Several, ascending, are read in one pass and give a first dimension of as many.
        center: the second that is in the middle of the window, in place of `window`; see `window_start`.

    Returns:
        audio float32 (S,), audio mask bool (S,) and video uint8 (T, 3, size, size); None where not wanted.

    Raises:
        DataError: naming the file and what is wrong with it, for instance a missing track.
    """
    several = window if isinstance(window, Sequence) else [window]
    samples = mask = frames = None
    with _opened(cell, audio, video) as (sound, pictures):
        starts = [_start((sound, pictures), audio, video, one, center) for one in several]
        if sound is not None and audio is not None:
            samples, mask = sound.read_windows(starts, audio.rate, audio.seconds)
        if pictures is not None and video is not None:
            frames = pictures.read_windows(starts, video.size, video.fps, video.frames, video.fit)
    found = (samples, mask, frames)
    if isinstance(window, Sequence):
        return found
    samples, mask, frames = (None if part is None else part[0] for part in found)
    return samples, mask, frames


def clip_start(
    cell: Any,
    *,
    audio: AudioDecode | None = None,
    video: VideoDecode | None = None,
    window: float = 0.0,
    center: float | None = None,
) -> float:
    """Seconds on the clip's clock at which begins what `decode_clip` of the same arguments decodes."""
    with _opened(cell, audio, video) as tracks:
        return _start(tracks, audio, video, window, center)


@contextmanager
def _opened(
    cell: Any, audio: AudioDecode | None, video: VideoDecode | None
) -> Iterator[tuple[Sound | None, Pictures | None]]:
    """The tracks that are wanted."""
    paired = isinstance(cell, Mapping) and {"audio", "video"} <= cell.keys()
    with ExitStack() as opened:
        sound = opened.enter_context(open_sound(cell["audio"] if paired else cell, audio.channel)) if audio else None
        pictures = opened.enter_context(open_pictures(cell["video"] if paired else cell)) if video else None
        yield sound, pictures


def _start(
    tracks: Sequence[Timed | None],
    audio: AudioDecode | None,
    video: VideoDecode | None,
    window: float,
    center: float | None,
) -> float:
    lengths = [audio.seconds if audio else 0.0, video.frames / video.fps if video else 0.0]
    return window_start([track for track in tracks if track is not None], max(lengths), window, center)


def write_clip(
    path: str | Path,
    frames: np.ndarray | None,
    fps: float,
    samples: np.ndarray | None,
    rate: int,
    *,
    audio_codec: str = "aac",
    video_codec: str = "libx264",
    audio_start: float = 0.0,
    video_start: float = 0.0,
) -> None:
    """Encode a clip; the container follows from the file's suffix. One key frame a second.

    Args:
        path: to write.
        frames: uint8 (T, H, W, 3) with even H and W, or None for sound alone.
        fps: frame rate, in 1/s.
        samples: float32 (S,), or (2, S) for left and right, in [-1, 1]; None for pictures alone.
        rate: sample rate in Hz; Opus takes 48000, 24000, 16000, 12000 or 8000.
        audio_codec: name of FFmpeg's encoder.
        video_codec: name of FFmpeg's encoder.
        audio_start: seconds at which the first sample is stamped; Matroska has whole milliseconds.
        video_start: seconds at which the first frame is stamped, likewise.

    Raises:
        DataError: where the container or a codec refuses.
    """
    import av

    if frames is None and samples is None:
        raise DataError(f"cannot write {path}: there are neither frames nor samples")
    suffix = Path(path).suffix.lower()
    # By default MP4 rounds the start of a track to milliseconds.
    options = {"movie_timescale": str(rate)} if suffix in (".mp4", ".m4a", ".mov") else {}
    try:
        with av.open(str(path), "w", options=options) as container:
            # All streams have to be there before the first packet is written.
            picture: Any = _add_video(container, video_codec, frames, fps) if frames is not None else None
            sound: Any = _add_audio(container, audio_codec, samples, rate) if samples is not None else None
            if picture is not None and frames is not None:
                tick = Fraction(picture.codec_context.time_base)
                for k, array in enumerate(frames):
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                    frame.time_base = tick
                    frame.pts = round((video_start + k / fps) / tick)
                    container.mux(picture.encode(frame))
                container.mux(picture.encode(None))
            if sound is not None and samples is not None:
                planes = np.ascontiguousarray(np.atleast_2d(samples), np.float32)
                whole = av.AudioFrame.from_ndarray(planes, format="fltp", layout=_layout(samples))
                whole.sample_rate, whole.time_base = rate, Fraction(1, rate)
                whole.pts = round(audio_start * rate)
                if suffix in (".mkv", ".webm") and audio_codec == "libopus" and whole.pts:
                    # Matroska stamps milliseconds: Opus's delay of 6.5 is rounded up twice unless it is a little less.
                    whole.pts -= 1
                container.mux(sound.encode(whole))
                container.mux(sound.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"cannot write {path} with {video_codec} and {audio_codec}: {sentence(error)}") from error


def _layout(samples: np.ndarray) -> str:
    return "mono" if samples.ndim == 1 else "stereo"


def _add_audio(container: Any, codec: str, samples: np.ndarray, rate: int) -> Any:
    # FFmpeg calls its own encoder of Vorbis experimental, and asks to be told that this is known.
    options = {"strict": "experimental"} if codec == "vorbis" else {}
    return container.add_stream(codec, rate=rate, layout=_layout(samples), options=options)


def _add_video(container: Any, codec: str, frames: np.ndarray, fps: float) -> Any:
    rate = Fraction(fps).limit_denominator(1001)
    # Half the time of the default, for as many bytes.
    stream = container.add_stream(codec, rate=rate, options={"preset": "veryfast"} if codec == "libx264" else {})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"  # JPEG takes the full range alone
    # A hundredth of a frame, so that a start between two frames can be stamped.
    stream.codec_context.time_base = 1 / (100 * rate)
    stream.codec_context.gop_size = max(1, round(fps))
    return stream


TRIALS = {
    "mp4 h264+aac": ("libx264", "aac"),
    "mp4 h264+flac": ("libx264", "flac"),
    "mp4 h264+opus": ("libx264", "libopus"),
    "mkv h264+aac": ("libx264", "aac"),
    "mkv h264+flac": ("libx264", "flac"),
    "mkv h264+opus": ("libx264", "libopus"),
    "webm vp9+opus": ("libvpx-vp9", "libopus"),
    "wav pcm": (None, "pcm_s16le"),
    "flac flac": (None, "flac"),
    "ogg opus": (None, "libopus"),
    "mp3 mp3": (None, "libmp3lame"),
    "m4a aac": (None, "aac"),
}
PICTURES = ("jpeg", "png", "gif", "webp", "bmp", "tiff", "avif")


def codecs() -> dict[str, bool]:
    """Whether each container and codec works here, proved by writing and reading a moment of it."""
    works = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (video, audio) in TRIALS.items():
            works[name] = _survives(Path(folder) / f"clip.{name.split()[0]}", video, audio)
    return works | {name: _image_survives(name) for name in PICTURES}


def _survives(path: Path, video: str | None, audio: str) -> bool:
    """Whether a gray picture with a steady tone comes back as loud and as bright."""
    from mmssl.decode_settings import AudioDecode, VideoDecode

    rate, fps = 48_000, 25
    tone = np.sin(np.arange(rate) / 20).astype(np.float32) / 2
    gray = np.full((fps, 32, 32, 3), 128, np.uint8) if video else None
    try:
        write_clip(path, gray, fps, tone, rate, audio_codec=audio, video_codec=video or "")
        settings = VideoDecode(size=16, fps=fps, frames=4) if video else None
        sound, _, frames = decode_clip(path, audio=AudioDecode(rate=16_000, seconds=0.2), video=settings, window=0.5)
    except (DataError, ImportError):
        return False
    loud = sound is not None and abs(float(sound.square().mean().sqrt()) - 0.5**1.5) < 0.02
    bright = not video or (frames is not None and abs(float(frames.float().mean()) - 128) < 4)
    return loud and bright


def _image_survives(kind: str) -> bool:
    stream = io.BytesIO()
    try:
        Image.new("RGB", (16, 16), (200, 100, 50)).save(stream, kind)
        found = decode_image(stream.getvalue(), 8).float().mean(dim=(1, 2))
    except (DataError, KeyError, OSError):
        return False
    return bool((found - found.new_tensor([200, 100, 50])).abs().max() < 8)
