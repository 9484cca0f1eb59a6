"""Frozen tokens: every place of every row, kept in files so that memory holds only the rows that are read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmssl.adaptation.features import depths_of
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder, Features, attendable
from mmssl.errors import DataError, RunError
from mmssl.modules.mode import evaluating

TOKENS, TOKENS_MASK = "tokens", "tokens_mask"
GIB = 2**30


class TokenRows:
    """Rows of tokens, each token shifted and scaled to mean 0 and variance 1, so that half precision does no harm.

    Args:
        tokens: float16 (all tokens, D), on disk.
        starts: int64 (rows + 1,), where each row's valid tokens begin there.
        rows: int64 (N,), those that these are.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
        self.tokens, self.starts, self.rows = tokens, starts, rows

    @property
    def dim(self) -> int:
        """Width D of a token."""
        return int(self.tokens.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> TokenRows:
        return TokenRows(self.tokens, self.starts, self.rows[index.numpy()])

    def read(self, picks: Iterable[Tensor]) -> Iterator[Batch]:
        """For each of `picks`, places int64 (B,): `tokens` float32 (B, N, D), `tokens_mask` bool (B, N)."""
        for pick in picks:
            spans = [(self.starts[row], self.starts[row + 1]) for row in self.rows[pick.numpy()]]
            parts = [torch.from_numpy(np.array(self.tokens[start:stop])).float() for start, stop in spans]
            lengths = torch.tensor([len(part) for part in parts])
            tokens = pad_sequence(parts, batch_first=True)
            yield {TOKENS: tokens, TOKENS_MASK: torch.arange(tokens.shape[1]) < lengths[:, None]}


STARTS = "starts of "
"""Before the name of a depth, in a file of tokens."""


def flat_names(depth: str) -> list[str]:
    """The tensors of a depth."""
    return [depth, STARTS + depth]


def flat(depths: Mapping[str, TokenRows]) -> dict[str, Tensor]:
    """All rows of every depth as tensors, tokens float16 and starts int64."""
    return {
        name: torch.from_numpy(np.asarray(array))
        for depth, rows in depths.items()
        for name, array in zip(flat_names(depth), (rows.tokens, rows.starts), strict=True)
    }


def unflat(tensors: Mapping[str, Tensor]) -> dict[str, TokenRows]:
    """What `flat` made tensors of."""
    return {
        depth: TokenRows(tokens.numpy(), (starts := tensors[STARTS + depth].numpy()), np.arange(len(starts) - 1))
        for depth, tokens in tensors.items()
        if not depth.startswith(STARTS)
    }


class _File:
    """Tokens of one encoder at one depth as they come; the file has no name and goes with the last who reads it."""

    def __init__(self, folder: Path | None) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (read after it is written)
        self.dim, self.lengths = 0, list[int]()

    def add(self, features: Features) -> None:
        tokens = F.layer_norm(features.tokens.float(), features.tokens.shape[-1:])
        if not tokens.isfinite().all():
            raise RunError("tokens are not finite: training diverged, or the encoder's precision is too low")
        self.dim = tokens.shape[2]
        valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        if features.valid is not None:
            valid = attendable(features.valid)
        self.lengths += valid.sum(1).tolist()
        self.file.write(tokens[valid].half().cpu().numpy().tobytes())

    def rows(self) -> TokenRows:
        self.file.flush()
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        tokens = np.memmap(self.file, np.float16, "c", shape=(int(starts[-1]), self.dim))
        return TokenRows(tokens, starts, np.arange(len(self.lengths)))


def read_tokens(
    encoders: Sequence[Encoder], batches: Iterable[Batch], total: int, *, layers: bool, folder: Path | None = None
) -> tuple[list[dict[str, TokenRows]], Tensor]:
    """Tokens of every row from each encoder, in one pass; the encoders are left as they were found.

    Args:
        encoders: of one modality, on their own devices.
        batches: with `id`.
        total: rows, at most.
        layers: every depth as well.
        folder: where the files are; the system's for temporary files where None.

    Returns:
        {"pooled" or depth: rows} for each encoder (`pooled` are the encoder's own tokens, which it pools), and the
        numbers of the rows, int64.

    Raises:
        DataError: where there is no batch, or one without the encoder's key; and where the disk is too small.
        RunError: where tokens are not finite.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, _File]] = [{} for _ in encoders]
    ids: list[Tensor] = []
    with evaluating(*encoders), torch.no_grad():
        for batch in batches:
            for encoder, own in zip(encoders, files, strict=True):
                for depth, features in depths_of(encoder, batch, layers).items():
                    if depth not in own:
                        own[depth] = _File(folder)
                    own[depth].add(features)
            if not ids:
                written = sum(file.file.tell() for own in files for file in own.values())
                _check_room(written * total / len(batch["id"]), total, folder)
            ids.append(batch["id"].cpu())
    if not ids:
        raise DataError("there are no rows that can be decoded")
    return [{depth: file.rows() for depth, file in own.items()} for own in files], torch.cat(ids)


def _check_room(wanted: float, total: int, folder: Path | None) -> None:
    place = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if wanted > 0.9 * free:
        raise DataError(
            f"the tokens of {total} rows take about {wanted / GIB:.1f} GiB, and {place} has {free / GIB:.1f} left; "
            "read fewer (limit), leave the baseline or layers out, or use a larger disk"
        )
