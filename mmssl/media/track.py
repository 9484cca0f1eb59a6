"""One stream of a container, read by time: straight from its beginning, or by a seek that gives the same.

Times are seconds on the clock of the container, which all its streams share. A stream's own start is the time stamp of
the first frame that its decoder puts out: encoder delay is cut off by then. Its end is what the header says, because
decoders put out the encoder's padding after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, dropwhile, islice
from typing import Any, Protocol, Self

from mmssl.errors import DataError
from mmssl.media.cell import open_cell, sentence

# Decoders forget their past within 0.26 s (Opus, the slowest of those measured); this much is decoded and thrown away.
PREROLL = 1.0
# Containers whose time stamps are as true after a seek as before. Others (MPEG, AVI, bare MP3 and AAC) estimate.
SEEKABLE = {"mov", "matroska", "wav", "flac"}
# Formats without time stamps guess their duration from the bit rate: their packets are counted instead.
GENERIC_INDEX = 0x100
EXACT_DURATION = {"wav", "flac", "ogg", "gif"}
# Formats whose durations include the delay of the encoder, which the decoder has cut off at the start.
DELAY_IN_DURATION = {"matroska", "ogg"}
# Name of a container -> suffix of its files, where they differ.
SUFFIXES = {"mov": "mp4", "matroska": "mkv"}
# Play lists and scripts, which make FFmpeg open other files and addresses, are left out, and so are text and images.
FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,swf,tta,w64,wav,wv"
)


class Timed(Protocol):
    """Anything that lasts from `start` to `end`, in seconds."""

    name: str
    start: float
    end: float


def window_start(tracks: Sequence[Timed], seconds: float, window: float, center: float | None = None) -> float:
    """Start of a window inside the time that all tracks share.

    Args:
        tracks: of one clock.
        seconds: length of the window.
        window: in [0, 1]: 0 is the start, 0.5 the middle, 1 where the window ends with the tracks.
        center: seconds on their clock that lie in the middle of the window, as far as the tracks reach; what `window`
            says where None.

    Raises:
        DataError: where the tracks do not overlap.
    """
    start, end = max(t.start for t in tracks), min(t.end for t in tracks)
    if end <= start:
        raise DataError(f"{tracks[0].name}: its sound and its pictures do not overlap in time")
    spare = max(0.0, end - start - seconds)
    if center is not None:
        return start + min(max(center - seconds / 2 - start, 0.0), spare)
    return start + window * spare


class Track:
    """The best stream of a kind in a container.

    Args:
        cell: bytes, a path, or `{"bytes", "path"}`.
        kind: `audio` or `video`.

    Attributes:
        start, end: seconds on the container's clock.
        head: the first two frames (or one) that have a time stamp, as PyAV gives them.
        tick: resolution of the time stamps, in seconds.
        seekable: whether a seek can be trusted in this container.

    Raises:
        DataError: where the bytes are no container, or it has no such stream.
    """

    def __init__(self, cell: Any, kind: str) -> None:
        self._cell, self._kind = cell, kind
        self._open()
        self.tick = float(self.stream.time_base)
        self.seekable = self._container.format.name.split(",")[0] in SEEKABLE
        self.end = self._find_end()
        frames = self._decode()
        timed = (frame for frame in frames if frame.pts is not None)
        self.head = list(islice(timed, 2))
        if not self.head:
            raise DataError(f"{self.name} holds no {kind} that can be decoded")
        self.start = float(self.head[0].time)
        self.end = max(self.end, self.start + self.tick)
        self._unread: Iterator[Any] | None = chain(self.head, frames)

    def straight(self) -> Iterator[Any]:
        """All frames from the first."""
        frames, self._unread = self._unread, None
        if frames is None:
            self._open()
            frames = self._decode()
        return (frame for frame in dropwhile(lambda frame: frame.pts is None, frames))

    def seek(self, time: float) -> Iterator[Any]:
        """Frames from somewhere before `time`, or from where a broken index leads: check the first one."""
        self._unread = None
        try:
            self._container.seek(max(0, int(time / self.tick)), stream=self.stream, backward=True)
        except self._av.error.FFmpegError:
            return self.straight()
        return dropwhile(lambda frame: frame.pts is None, self._decode())

    def close(self) -> None:
        """Free the decoder, and what holds on to this."""
        self._unread, self.head = None, []
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def kind(self) -> str:
        """The file's container and the codecs of its streams, pictures first: `mp4 h264+aac`."""
        container, streams = self._container.format.name.split(",")[0], self._container.streams
        known = [one.codec_context for one in (*streams.video[:1], *streams.audio[:1])]
        codecs = "+".join(context.codec.canonical_name for context in known if context is not None)
        return f"{SUFFIXES.get(container, container)} {codecs}"

    def _open(self) -> None:
        import av

        self._av = av
        source, self.name = open_cell(self._cell, self._kind)
        try:
            self._container = av.open(source, options={"format_whitelist": FORMATS}, metadata_errors="replace")
        except (av.error.InvalidDataError, av.error.ArgumentError, av.error.EOFError) as error:
            raise DataError(
                f"cannot read {self.name}: it is cut short, damaged, or no sound or video of a format known here"
            ) from error
        except (av.error.FFmpegError, ValueError) as error:
            raise DataError(f"cannot read {self.name}: {_reason(error)}") from error
        streams = self._container.streams
        # Cover art is stored as a video of one frame.
        cover = av.stream.Disposition.attached_pic
        own = [stream for stream in streams if stream.type == self._kind and not stream.disposition & cover]
        if not own:
            held = ", ".join(sorted({stream.type for stream in streams})) or "nothing"
            raise DataError(f"{self.name} has no {self._kind} track; it holds {held}")
        best = streams.best(self._kind)
        self.stream = best if best in own else own[0]
        if self.stream.codec_context is None:
            raise DataError(f"{self.name}: there is no decoder for its {self._kind} track")
        # Rows are decoded side by side in worker processes; threads within one cost more than they gain.
        self.stream.codec_context.thread_count = 1
        for other in streams:
            if other is not self.stream:
                other.discard = av.stream.Discard.all  # its packets are not even read

    def _decode(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self.stream):
                # An empty packet repeats the last picture (Theora); the one without a time stamp ends the stream.
                if packet.size or packet.dts is None:
                    yield from packet.decode()
        except (self._av.error.FFmpegError, ValueError) as error:
            codec = self.stream.codec_context.name
            raise DataError(
                f"cannot decode {self.name}: its {codec} {self._kind} fails with {_reason(error)!r}"
            ) from error

    def _find_end(self) -> float:
        stream, container = self.stream, self._container
        name = container.format.name.split(",")[0]
        if container.format.flags & GENERIC_INDEX and name not in EXACT_DURATION:
            return self._count_packets()
        tag = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d\.?\d*)", stream.metadata.get("DURATION", ""))
        if stream.duration:
            end = ((stream.start_time or 0) + stream.duration) * self.tick
        elif tag:
            hours, minutes, seconds = map(float, tag.groups())
            end = 3600 * hours + 60 * minutes + seconds
        elif container.duration:
            end = ((container.start_time or 0) + container.duration) / self._av.time_base
        else:
            return self._count_packets()
        if name in DELAY_IN_DURATION and self._kind == "audio":
            end -= stream.codec_context.delay / stream.codec_context.sample_rate
        return float(end) if end > (stream.start_time or 0) * self.tick else self._count_packets()

    def _count_packets(self) -> float:
        try:
            packets = (p for p in self._container.demux(self.stream) if not p.pts is p.dts is None)
            last = max(((p.dts if p.pts is None else p.pts) + (p.duration or 0) for p in packets), default=0)
        except (self._av.error.FFmpegError, ValueError) as error:
            raise DataError(f"cannot read {self.name}: {_reason(error)}") from error
        self._open()
        return float(last * self.tick)


def _reason(error: BaseException) -> str:
    """FFmpeg's message without its number and the name of the buffer."""
    return re.sub(r"^\[Errno -?\d+\] |: '[^']*'$", "", sentence(error))
