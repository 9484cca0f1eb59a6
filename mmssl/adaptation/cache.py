"""Features kept on disk, so that a second probe of the same encoder on the same rows encodes nothing.

A file is found by what its content depends on: the encoder's weights and arguments, how rows are decoded, and what is
in them. It is written whole or not at all, and what does not read back as it was written is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl.adaptation.features import POOLED, extract
from mmssl.adaptation.rows import BatchSplit, SourceSplit, Split, in_order
from mmssl.adaptation.tokens import TokenRows, flat, flat_names, read_tokens, unflat
from mmssl.data.digest import add_cell, digest_of_tensors
from mmssl.data.stream import StreamSource
from mmssl.encoders.base import Encoder
from mmssl.errors import RunError
from mmssl.media.text import Tokenizer
from mmssl.version import __version__

IDS = "id"
KEPT_BYTES = 2**28
"""Most of a file: tokens are some hundred times what is pooled."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features; see the module.

    Attributes:
        folder: made when the first file is written; None keeps nothing.
    """

    folder: Path | None = None

    def features(
        self, encoders: Sequence[Encoder], split: Split, rows: np.ndarray, *, layers: bool, batch_size: int
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Features of chosen rows, from disk where they are there; the others in one pass over the rows.

        Args:
            encoders: of one modality.
            split: where the rows are.
            rows: their numbers, int64, ascending.
            layers: every depth as well.
            batch_size: rows that are encoded at a time.

        Returns:
            {"pooled" or depth: float32 (N, D)} for each encoder, and the numbers of the rows that could be decoded,
            int64 (N,).
        """

        def compute(some: Sequence[Encoder]) -> tuple[list[dict[str, Tensor]], Tensor]:
            found, others = extract(some, split.read(in_order(rows, batch_size)), layers=layers)
            return found, others["id"]

        suffix, pooled = "-layers" if layers else "", (POOLED,)
        return self._kept(encoders, split, rows, compute, [suffix, "-layers"], None if layers else pooled)

    def tokens(
        self, encoders: Sequence[Encoder], split: Split, rows: np.ndarray, *, layers: bool, batch_size: int
    ) -> tuple[list[dict[str, TokenRows]], Tensor]:
        """Likewise the tokens of every place; those of an encoder that take more than `KEPT_BYTES` are not kept."""

        def compute(some: Sequence[Encoder]) -> tuple[list[dict[str, Tensor]], Tensor]:
            batches = split.read(in_order(rows, batch_size))
            found, ids = read_tokens(some, batches, len(rows), layers=layers, folder=self.folder)
            return [flat(depths) for depths in found], ids

        suffix, pooled = "-layers" if layers else "", tuple(flat_names(POOLED))
        names = [f"-tokens{suffix}", "-tokens-layers"]
        kept, ids = self._kept(encoders, split, rows, compute, names, None if layers else pooled)
        return [unflat(tensors) for tensors in kept], ids

    def _kept(
        self,
        encoders: Sequence[Encoder],
        split: Split,
        rows: np.ndarray,
        compute: Callable[[Sequence[Encoder]], tuple[list[dict[str, Tensor]], Tensor]],
        suffixes: Sequence[str],
        wanted: Sequence[str] | None,
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Tensors of each encoder, from the first file that holds them, or else computed and written to the first.

        Args:
            encoders: see `features`.
            split: see `features`.
            rows: see `features`.
            compute: tensors of some encoders, and the numbers of the rows that could be decoded.
            suffixes: of files that may hold them, after the key.
            wanted: names of tensors; all of a file where None.
        """
        content = None if self.folder is None else digest_of_rows(split, rows)
        keys = [None if content is None else _digest(digest_of(encoder), content) for encoder in encoders]
        found = [None if key is None else self._load([key + end for end in suffixes], wanted) for key in keys]
        missing = [i for i, one in enumerate(found) if one is None]
        if missing:
            computed, ids = compute([encoders[i] for i in missing])
            for i, tensors in zip(missing, computed, strict=True):
                found[i] = (tensors, ids)
                if (key := keys[i]) is not None and sum(one.nbytes for one in tensors.values()) <= KEPT_BYTES:
                    self._save(key + suffixes[0], tensors, ids)
        whole = [one for one in found if one is not None]
        return [tensors for tensors, _ in whole], whole[0][1]

    def _path(self, name: str) -> Path:
        assert self.folder is not None  # there are no keys without it
        return self.folder / f"{name}.safetensors"

    def _load(self, files: Sequence[str], wanted: Sequence[str] | None) -> tuple[dict[str, Tensor], Tensor] | None:
        """What was saved; every depth holds for the pooled vectors alone, too."""
        for path in dict.fromkeys(map(self._path, files)):
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    # In the order in which they were written, shallow to deep; not as a view of the file, which may go.
                    tensors = {name: file.get_tensor(name).clone() for name in json.loads(metadata["names"])}
            except (OSError, SafetensorError, KeyError, ValueError):
                continue
            if metadata.get("content") == digest_of_tensors(tensors):
                ids = tensors.pop(IDS)
                return (tensors if wanted is None else {name: tensors[name] for name in wanted}), ids
        return None

    def _save(self, name: str, found: Mapping[str, Tensor], ids: Tensor) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {IDS: ids, **found}
        metadata = {"names": json.dumps(list(tensors)), "content": digest_of_tensors(tensors)}
        temporary = path.with_name(f".writing_{os.getpid()}_{path.name}")
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"{path}: cannot be written: {error}") from error


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=20).hexdigest()


def digest_of(encoder: nn.Module) -> str:
    """Weights, arguments and code, the latter as the version of this library."""
    kind = type(encoder)
    spec: Mapping[str, Any] = getattr(encoder, "spec", {})
    arguments = {key: repr(value) for key, value in spec.items() if key != "tokenizer"}
    state = digest_of_tensors(dict(encoder.state_dict()))
    return _digest(__version__, f"{kind.__module__}.{kind.__qualname__}", json.dumps(arguments, sort_keys=True), state)


def digest_of_rows(split: Split, rows: np.ndarray) -> str | None:
    """What is read of these rows and how it is decoded; None for a stream, which would have to be read for that."""
    content = hashlib.blake2b(rows.tobytes(), digest_size=20)
    for tokenizer in split.reads.tokenizers.values():
        _add_tokenizer(content, tokenizer)
    if isinstance(split, BatchSplit):
        for batch in split.batches:
            keys = [key for need in split.reads.needs for key in (need, f"{need}_mask") if key in batch]
            content.update(digest_of_tensors({key: batch[key] for key in keys}).encode())
        return content.hexdigest()
    if not isinstance(split, SourceSplit) or isinstance(split.source, StreamSource):
        return None
    decoding = split.spec.model_dump(mode="json", include={"image", "text", "audio", "video", "start", "windows"})
    columns = list(dict.fromkeys([*split.columns, *split.centers]))
    content.update(json.dumps([split.reads.needs, split.columns, split.centers, decoding], sort_keys=True).encode())
    if split.source.fingerprint is not None:
        content.update(split.source.fingerprint.encode())
        return content.hexdigest()
    source = split.source.select(columns)
    for row in rows.tolist():
        cells = source.row(row)
        for column in columns:
            add_cell(content, cells[column])
    return content.hexdigest()


def _add_tokenizer(content: Any, tokenizer: Any) -> None:
    if not isinstance(tokenizer, Tokenizer):
        content.update(repr(tokenizer).encode())
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content.update(path.name.encode())
                content.update(path.read_bytes())
