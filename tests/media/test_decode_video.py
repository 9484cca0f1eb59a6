"""Videos: the picture that is on the screen at each instant, upright and undistorted, whatever the container."""

from fractions import Fraction
from pathlib import Path

import av
import iscc_samples
import numpy as np
import pytest
import torch

from mmssl.errors import DataError
from mmssl.media.clip import write_clip
from mmssl.media.image import decode_image
from mmssl.media.track import Track
from mmssl.media.video import decode_video, open_pictures

SAMPLES = sorted((Path(iscc_samples.__file__).parent / "files" / "video").iterdir())
# The Theora decoder of PyAV's FFmpeg gives up on the seventh packet of these.
BROKEN = {"demo.ogg", "demo.ogv"}


def counting(frames: int, step: int = 4, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Frame k is of brightness k · step."""
    return (np.arange(frames)[:, None, None, None] * step * np.ones((1, *size, 3))).astype(np.uint8)


def numbers(video: torch.Tensor, step: int = 4) -> list[int]:
    """Which frame of `counting` each frame is."""
    return (video.float().mean(dim=(1, 2, 3)) / step).round().int().tolist()


@pytest.mark.quick(10)
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_sample_decodes_or_says_why(path):
    if path.name in BROKEN:
        with pytest.raises(DataError, match="its theora video fails with 'Operation not permitted'"):
            decode_video(path, 32, 12.5, 8, window=0.2)
        return
    video = decode_video(path, 32, 12.5, 8, window=0.2)
    assert video.dtype == torch.uint8
    assert video.shape == (8, 3, 32, 32)
    if path.name == "demo.gif":  # another cut
        assert video.float().std() > 10
        return
    # All are one recording; encoders put its start within 0.1 s of each other.
    reference = decode_video(path.parent / "demo.mp4", 32, 12.5, 8, window=0.2)
    assert (video.float() - reference.float()).abs().mean() < 8


def test_frames_are_those_on_the_screen():
    cell = {"frames": counting(50), "fps": 25}
    assert numbers(decode_video(cell, 16, 25, 50)) == list(range(50))
    assert numbers(decode_video(cell, 16, 12.5, 25)) == list(range(0, 50, 2))
    assert numbers(decode_video(cell, 16, 50, 100)) == [k // 2 for k in range(100)]
    assert numbers(decode_video(cell, 16, 10, 20)) == [int(k * 2.5) for k in range(20)]
    # 1.25 s of 2 s from the middle: 0.375 s is within frame 9.
    assert numbers(decode_video(cell, 16, 4, 5, window=0.5)) == [int(9.375 + k * 6.25) for k in range(5)]


def test_past_its_end_the_last_picture_stays():
    assert numbers(decode_video({"frames": counting(5), "fps": 5}, 16, 5, 8, window=0.7)) == [0, 1, 2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("fps", [25, 30_000 / 1001, 12.5])
@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_written_frames_come_back_one_by_one(suffix, codec, fps, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write_clip(path, counting(50), fps, None, 16_000, video_codec=codec)
    assert numbers(decode_video(path, 16, fps, 50)) == list(range(50))


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")],
)
def test_seeking_and_decoding_straight_give_the_same_frames(suffix, codec, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (100, 32, 48, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    write_clip(path, noise, 25, None, 16_000, video_codec=codec)
    starts = (1.5, 2.0, 2.111, 3.9)
    with open_pictures(path) as pictures:
        straight = [pictures.read(start, 24, 12.5, 6, seek=False) for start in starts]
        if suffix != "avi":  # whose index is not trusted
            monkeypatch.setattr(Track, "straight", lambda self: pytest.fail("did not seek"))
        for start, expected in zip(starts, straight, strict=True):
            assert torch.equal(pictures.read(start, 24, 12.5, 6), expected)


MATRICES = {  # a, b, c, d of x' = a x + c y, y' = b x + d y; what a player shows of (top left, top right, bottom left)
    "as stored": ((1, 0, 0, 1), lambda x: x),
    "a quarter clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "a quarter counterclockwise": ((0, -1, 1, 0), np.rot90),
    "upside down": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "mirrored top to bottom": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda x: x.T),
    "transposed on the other diagonal": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).T),
}


@pytest.mark.parametrize("name", MATRICES)
def test_the_display_matrix_turns_and_mirrors(tmp_path, name):
    """Written into the MP4 by hand, because PyAV does not write one."""
    (a, b, c, d), shown = MATRICES[name]
    path = tmp_path / "a.mp4"
    quarters = np.array([[255, 170], [85, 0]], np.uint8)
    picture = quarters.repeat(16, 0).repeat(16, 1)
    write_clip(path, np.broadcast_to(picture[None, ..., None], (5, 32, 32, 3)).copy(), 25, None, 16_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    fixed = [value << 16 for value in (a, b, 0, c, d, 0, 0, 0)]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in fixed) + (1 << 30).to_bytes(
        4, "big"
    )
    found = decode_video(bytes(data), 32, 25, 2).float().mean(dim=(0, 1)).numpy()
    centers = found.reshape(2, 16, 2, 16)[:, 4:12, :, 4:12].mean((1, 3))
    assert np.abs(centers - shown(quarters)).max() < 12


def test_pixels_that_are_not_square(tmp_path):
    """720 × 576 at 16:9 is shown wider than it is stored."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=32, height=32, pix_fmt="yuv420p")
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        stream.codec_context.time_base = Fraction(1, 25)
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 0, np.uint8), format="rgb24")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    rows = (decode_video(path, 32, 25, 2, fit="pad").float().mean(dim=(0, 1, 3)) < 20).sum()
    assert int(rows) == 16


def test_cut_and_pad_are_those_of_images(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 40, 64, 3), dtype=np.uint8)
    for fit in ("crop", "pad"):
        video = decode_video({"frames": frames, "fps": 10}, 24, 10, 3, fit=fit)
        for k in range(3):
            assert torch.equal(video[k], decode_image(frames[k], 24, fit))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "the video cell is empty"),
        (b"", "is empty"),
        (b"nonsense", "no sound or video of a format known here"),
        ("/nowhere/a.mp4", "there is no video file"),
        (np.zeros((3, 8, 8, 3), np.uint8), "needs its frame rate"),
        ({"frames": np.zeros((3, 8, 8, 3), np.uint8)}, "fps = None"),
        ({"frames": np.zeros((3, 8, 8, 3), np.uint8), "fps": 0}, "fps = 0"),
        ({"frames": np.zeros((3, 8, 8, 3)), "fps": 5}, "should be uint8"),
        ({"frames": np.zeros((0, 8, 8, 3), np.uint8), "fps": 5}, "should be uint8"),
        (SAMPLES[0].parents[1] / "audio" / "demo.wav", "has no video track; it holds audio"),
        (SAMPLES[0].parents[1] / "audio" / "withcover.mp3", "has no video track"),
        (SAMPLES[0].parents[1] / "text" / "demo.txt", "no sound or video of a format known here"),
    ],
    ids=range(12),
)
def test_what_cannot_be_read_is_one_sentence(cell, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_video(cell, 16, 5, 4)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_reported_not_filled(tmp_path):
    path = tmp_path / "a.mkv"
    noise = np.random.default_rng(0).integers(0, 255, (100, 32, 48, 3), dtype=np.uint8)
    write_clip(path, noise, 25, None, 16_000)
    half = path.read_bytes()[: path.stat().st_size // 2]
    assert decode_video(half, 16, 25, 4).shape == (4, 3, 16, 16)
    with pytest.raises(DataError, match=r"ends at \d\.\d+ s, before its header says|fails with"):
        decode_video(half, 16, 25, 4, window=0.99)


def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(1)
    for path in SAMPLES:
        data = path.read_bytes()[:40_000]
        for _ in range(3):
            damaged = bytearray(data[: rng.integers(1, len(data))])
            for at in rng.integers(0, len(damaged), 8):
                damaged[at] = rng.integers(256)
            try:
                assert decode_video(bytes(damaged), 16, 5, 4, 0.5).shape == (4, 3, 16, 16)
            except DataError:
                continue


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", ["open-gop=1", "open-gop=0:bframes=8:keyint=25", "intra-refresh=1:keyint=25"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_seek_into_any_structure_of_pictures_gives_the_same_frames(options, suffix, tmp_path):
    """Groups that lean on their neighbors, deep reordering, and pictures that renew themselves by and by."""
    path = tmp_path / f"a.{suffix}"
    texture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=48, height=32, pix_fmt="yuv420p")
        stream.codec_context.options = {"x264-params": options}
        stream.codec_context.time_base = Fraction(1, 25)
        for k in range(150):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, k, 1), format="rgb24")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open_pictures(path) as pictures:
        for start in np.linspace(0.02, 5.5, 23):
            straight = pictures.read(float(start), 16, 25, 3, seek=False)
            assert torch.equal(pictures.read(float(start), 16, 25, 3), straight)
