"""Where in a picture or clip a sound comes from: a map over places, scored against boxes; nothing is learned.

With a common space the map is the inner product of each place with the sound (Senocak et al. 2018, arXiv 1803.03849);
without one it is the gradient of the score, times the token, summed over channels: of a linear head on the mean of
tokens that is the class activation map of Owens & Efros 2018 (arXiv 1804.03641), and of other networks HiResCAM
(Draelos et al. 2020, arXiv 2011.08891), with what layer norms of the head divide by held constant. Maps of a clip are
averaged over its frames; `columns: {center: onset_s}` of the data reads those around an event.

Known traps. The published measure calls half of all pixels the answer, so that a constant scores nearly as well as a
network, and no map finds a small box; the table has both rules, the constants, and the ceiling. A map of few places
finds little more: there is a second ceiling, of maps as coarse as the network's. A map that finds what stands out needs
no sound: one row hears another clip's. A network that pools by a class token was never asked to compare its places;
`gradient` then takes their mean for it, which is as rough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from mmssl.adaptation.heat_maps import (
    HALF,
    Agreement,
    agreement,
    area_under_success,
    center_disc,
    covered_shares,
    draw_boxes,
    everywhere,
    oracle,
    resized,
)
from mmssl.adaptation.metrics import Metric
from mmssl.adaptation.pairs import Network, PairProbe, encode_side, network_of, own_inputs, reinitialized_tasks
from mmssl.adaptation.placed import frame_of, need_one_window
from mmssl.adaptation.readings import list_of
from mmssl.adaptation.request import Model, Request
from mmssl.adaptation.rows import Split, in_order
from mmssl.adaptation.table import CEILING, MISMATCHED, PRETRAINED, RANDOM, Row, Table
from mmssl.batch import count_rows
from mmssl.encoders.base import Features, masked_mean
from mmssl.errors import DataError, RecipeError, counted
from mmssl.modules.mode import constant_scales, evaluating

EQUAL = Metric("ciou_equal_area", "cIoU@0.5, equal area")
EQUAL_AUC = Metric("auc_equal_area", "AUC, equal area")
PUBLISHED = Metric("ciou_top_half", "cIoU@0.5, top 50 %")
PUBLISHED_AUC = Metric("auc_top_half", "AUC, top 50 %")
POINTING = Metric("pointing", "pointing")
ON_SCREEN = Metric("on_screen_precision", "AP of on screen")
MEAN_BOX, DISC, WHOLE = "mean box", "center disc", "whole picture"
SEEN = 0.25
"""Share of a box that has to be in the square that the encoder sees."""
PICTURES = ("image", "video")


class Heat(NamedTuple):
    """Of all rows, by one network.

    Attributes:
        maps: (h, w) each.
        confidence: (M,), how sure the network is that what sounds is on the screen.
    """

    maps: list[Tensor]
    confidence: Tensor


class Localization(PairProbe):
    """cIoU at 0.5 with two rules, area under the success curve, and the share of maps that are highest in the box.

    The column of `label` holds a box [left, top, right, bottom], or a list of such, which count together. A row without
    one, or with an empty list, has a sound whose source is off screen: such rows have no part in these scores, and
    where there are any, average precision says how well the confidence tells them apart (the mean of the highest
    quarter of the map, or the logit where there is no common space; Mo & Morgado 2022, arXiv 2209.09634).

    Args:
        a: name of one encoder; that of the first pair of pictures and sound that the task compares where left out.
        b: name of the other.
        by: `similarity` in the common space, or `gradient`; the first one that the task has where left out.
        units: whether boxes are `shares` of the picture's sides or its `pixels`; where left out, shares if none of all
            numbers is above 1.
    """

    def __init__(
        self,
        *,
        a: str | None = None,
        b: str | None = None,
        by: Literal["similarity", "gradient"] | None = None,
        units: Literal["shares", "pixels"] | None = None,
    ) -> None:
        super().__init__(a, b)
        self.by, self.units = by, units

    def ask(self, model: Model, request: Request) -> Network:
        """See `PairProbe.ask`."""
        network = super().ask(model, request)
        if model.task is not None and self.a is None and self.b is None:
            kinds = {name: encoder.modality for name, encoder in model.task.exported.items()}
            fit = (p for p in model.task.pairs if _are_seen_and_heard(kinds.get(p.a, ""), kinds.get(p.b, "")))
            if (pair := next(fit, None)) is not None:
                network = network_of(model.task, pair.a, pair.b)
        if not _are_seen_and_heard(*network.modalities):
            found = " and ".join(network.modalities)
            raise RecipeError(f"{self.name} takes pictures or clips and their sound, and the task compares {found}")
        if self.by == "similarity" and network.pair.embed is None:
            raise RecipeError(f"{self.name}: the task has no space for both sides; use by=gradient")
        return network

    def compare(self, network: Network, model: Model, request: Request) -> Table:
        """The table; see the module."""
        train, test = request.open(model, network.modalities, learns=False)
        assert test is not None  # without test rows the others are
        need_one_window(test, self.name)
        seen = next(modality for modality in network.modalities if modality in PICTURES)
        truth = self._truth(test, request.label, seen)
        randoms = reinitialized_tasks(network.task, request.seeds) if request.baseline else []
        networks = [network, *(network_of(one, *network.names) for one in randoms)]
        rows = [row for row, boxes in truth.items() if boxes is not None]
        found, kept = self._heat(networks, test, rows, request.batch_size)
        boxes = [truth[row] for row in kept]
        known = [one for one in boxes if one is not None and len(one)]
        if not known:
            raise DataError(f"{test.where}: no row has a box in column '{request.label}'")
        on = np.array([one is not None and len(one) > 0 for one in boxes])
        judge = _Judge(known, on)
        table = [judge.row(PRETRAINED, found[:1])]
        table.append(judge.row(MISMATCHED, found[-1:]))
        if randoms:
            table.append(judge.row(RANDOM, found[1:-1]))
        notes = ["ties count as not found; boxes and maps are compared at 224 x 224 pixels"]
        if train is not None:
            learned = [one for one in self._truth(train, request.label, seen).values() if one is not None and len(one)]
            mean = np.mean([draw_boxes(one) for one in learned], axis=0) if learned else None
            if mean is not None:
                table.append(judge.same(MEAN_BOX, mean))
        else:
            notes.append("no mean box, for there are no training rows to take it from")
        table.append(judge.same(DISC, center_disc()))
        table.append(judge.of(WHOLE, [everywhere(one) for one in judge.truth]))
        table.append(judge.of(CEILING, [agreement(oracle(one), t) for one, t in zip(known, judge.truth, strict=True)]))
        high, wide = found[0].maps[0].shape
        coarse = [agreement(resized(covered_shares(one, (high, wide))), one) for one in judge.truth]
        table.append(judge.of(CEILING, coarse, f"{high} x {wide} places"))
        unseen = len(truth) - len(rows)
        return Table(
            rows=tuple(table),
            metrics=judge.metrics,
            probe=self.name,
            target="",
            label=request.label,
            encoder=" and ".join(network.names),
            train_rows=0,
            test_rows=len(kept),
            counts={"with a source on screen": len(known)},
            shots=None,
            test=test.where,
            validation="",
            seeds=request.seeds,
            notes=tuple(notes),
            warnings=(f"{counted(unseen, 'row')} with less than a quarter of a box in the square that is seen",)
            if unseen
            else (),
        )

    def _truth(self, split: Split, label: str, modality: str) -> dict[int, np.ndarray | None]:
        """Row -> boxes (K, 4) as shares of the square that is seen; K = 0 off screen, None where they are cut off."""
        cells, where = split.cells(label), f"{split.where}, column '{label}'"
        read = {row: _boxes(cells[row], f"{where}, row {row}") for row in split.present(len(cells)).tolist()}
        largest = max((one.max() for one in read.values() if one.size), default=0.0)
        units = self.units or ("shares" if largest <= 1 else "pixels")
        found: dict[int, np.ndarray | None] = {}
        for row, boxes in read.items():
            found[row] = boxes
            if not len(boxes):
                continue
            frame = frame_of(split, row, modality)
            if frame is None:
                if units == "pixels":
                    raise DataError(f"{split.where}: batches do not say how large pictures were; give boxes as shares")
                continue
            size = np.array([frame.width, frame.height] * 2)
            placed = frame.place(boxes * size if units == "shares" else boxes) / frame.size
            kept = _areas(placed.clip(0, 1)) > SEEN * _areas(placed)
            found[row] = placed[kept].clip(0, 1) if kept.any() else None
        return found

    def _heat(
        self, networks: Sequence[Network], split: Split, rows: Sequence[int], batch_size: int
    ) -> tuple[list[Heat], list[int]]:
        """Of each network, and last of the first one with another row's sound; and the rows that were read."""
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(networks) + 1)]
        ids: list[int] = []
        with evaluating(*(network.task for network in networks)), torch.no_grad():
            for batch in split.read(in_order(np.array(rows), batch_size)):
                for place, network in enumerate(networks):
                    sides = [
                        encode_side(network, side, own_inputs(batch, modality))
                        for side, modality in enumerate(network.modalities)
                    ]
                    parts[place].append(self._map(network, sides))
                    if place == 0:
                        other = torch.arange(count_rows(batch)).roll(1)
                        sound = network.modalities.index("audio")
                        sides[sound] = _picked(*sides[sound], other)
                        parts[-1].append(self._map(network, sides))
                ids += batch["id"].tolist()
        if not ids:
            raise DataError(f"{split.where}: there are no rows that can be decoded")
        return [
            Heat([heat for heats, _ in own for heat in heats], torch.cat([sure for _, sure in own])) for own in parts
        ], ids

    def _map(self, network: Network, sides: Sequence[tuple[Features, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Maps (B, h, w) and confidence (B,) of a batch, on the CPU."""
        sound = network.modalities.index("audio")
        (seen, _), (_, heard) = sides[1 - sound], sides[sound]
        if len(seen.grid) < 2:
            raise RecipeError(f"{self.name}: encoder '{network.names[1 - sound]}' has tokens without places")
        if network.pair.embed is not None and self.by != "gradient":
            assert heard is not None  # there is a space
            flat = seen.tokens.flatten(0, 1)
            places = Features(flat[:, None], flat, (1,) * len(seen.grid))
            vectors = network.pair.embed[1 - sound](places).float().cpu().unflatten(0, seen.tokens.shape[:2])
            heat = torch.einsum("bnw,bw->bn", vectors, heard)
            sure = heat.sort(dim=1, descending=True).values[:, : max(1, heat.shape[1] // 4)].mean(1)
        else:
            heat, sure = _gradient(network, [features for features, _ in sides], 1 - sound)
        heat = heat.unflatten(1, seen.grid)
        return heat if len(seen.grid) == 2 else heat.mean(1), sure


class _Judge:
    """Scores answers for all rows.

    Args:
        boxes: of the rows with a source on screen.
        on: bool (M,), which those are.
    """

    def __init__(self, boxes: Sequence[np.ndarray], on: np.ndarray) -> None:
        self.truth, self.on = [draw_boxes(one) for one in boxes], on
        self.metrics = (EQUAL, EQUAL_AUC, PUBLISHED, PUBLISHED_AUC, POINTING, *([] if on.all() else [ON_SCREEN]))

    def row(self, name: str, networks: Sequence[Heat]) -> Row:
        """Of networks with their own maps."""
        scores = []
        for heat in networks:
            maps = [one for one, known in zip(heat.maps, self.on, strict=True) if known]
            found = [agreement(resized(one), truth) for one, truth in zip(maps, self.truth, strict=True)]
            sure = heat.confidence.double().numpy()
            scores.append(self._scores(found, float(average_precision_score(self.on, sure))))
        return self._line(name, scores)

    def same(self, name: str, heat: np.ndarray) -> Row:
        """Of one map for all rows."""
        return self.of(name, [agreement(heat, truth) for truth in self.truth])

    def of(self, name: str, found: Sequence[Agreement], part: str = "") -> Row:
        """Of answers that are known; the ceiling tells what is on screen, the others do not."""
        return self._line(name, [self._scores(found, 1.0 if name == CEILING else float(self.on.mean()))], part)

    def _scores(self, found: Sequence[Agreement], precision: float) -> dict[str, float]:
        equal, half, hit = (np.array(values) for values in zip(*found, strict=True))
        every = {
            EQUAL.name: float((equal >= HALF).mean()),
            EQUAL_AUC.name: area_under_success(equal),
            PUBLISHED.name: float((half >= HALF).mean()),
            PUBLISHED_AUC.name: area_under_success(half),
            POINTING.name: float(hit.mean()),
            ON_SCREEN.name: precision,
        }
        return {metric.name: every[metric.name] for metric in self.metrics}

    def _line(self, name: str, scores: Sequence[dict[str, float]], part: str = "") -> Row:
        shares = (EQUAL.name, PUBLISHED.name, POINTING.name)
        return Row.of_seeds(name, part, scores, shares=shares, trials=len(self.truth))


def _gradient(network: Network, sides: Sequence[Features], seen: int) -> tuple[Tensor, Tensor]:
    """Gradient of each pair's score times the token, (B, N), and the score (B,).

    Where a network pools its tokens by their mean, what follows from the pooled vector counts as well. See
    `constant_scales` for layer norms.
    """
    pair, own = network.pair, sides[seen]
    tokens = own.tokens.detach().requires_grad_()
    with constant_scales(network.task), torch.enable_grad():
        mean = masked_mean(tokens, own.valid)
        given = list(sides)
        given[seen] = own._replace(tokens=tokens, pooled=own.pooled.detach() + mean - mean.detach())
        if pair.match is not None:
            score = pair.match(given[0], given[1])
        else:
            assert pair.embed is not None  # a pair has either
            score = (pair.embed[0](given[0]) * pair.embed[1](given[1])).sum(1)
        (slope,) = torch.autograd.grad(score.sum(), tokens)
    return (slope * tokens).sum(2).detach().float().cpu(), score.detach().float().cpu()


def _picked(features: Features, vectors: Tensor | None, index: Tensor) -> tuple[Features, Tensor | None]:
    own = index.to(features.tokens.device)
    valid = None if features.valid is None else features.valid[own]
    rows = features._replace(tokens=features.tokens[own], pooled=features.pooled[own], valid=valid)
    return rows, None if vectors is None else vectors[index]


def _are_seen_and_heard(*modalities: str) -> bool:
    return "audio" in modalities and any(modality in PICTURES for modality in modalities)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _boxes(cell: Any, where: str) -> np.ndarray:
    """float64 (K, 4), also of a list that is written as text; none for a cell that is empty."""
    written = list_of(cell) if isinstance(cell, str) else None
    try:
        found = np.asarray([] if cell is None else written or cell, dtype=np.float64).reshape(-1, 4)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {cell!r} is no box [left, top, right, bottom] and no list of such") from None
    found = found[~np.isnan(found).all(1)]
    if not np.isfinite(found).all() or (found[:, 2:] <= found[:, :2]).any():
        raise DataError(f"{where}: a box is [left, top, right, bottom], not ending before it begins; found {cell}")
    return found
