"""A run in `mteb`, the Massive Text Embedding Benchmark: its tasks of texts, pictures and sounds.

    import mteb
    from mmssl.suites.mteb import MtebEncoder

    model = MtebEncoder("runs/mine", name="me/mine")
    tasks = mteb.get_tasks(tasks=["Banking77Classification", "CIFAR10ZeroShot"])
    print(mteb.evaluate(model, tasks).to_dataframe())

Muennighoff et al. 2023, arXiv 2210.07316; Xiao et al. 2025, "MIEB", arXiv 2504.10471; Enevoldsen et al. 2025, "MMTEB",
arXiv 2502.13595. The protocol is that of `mteb` 2: `encode` gets batches of the task's own loader.

Known traps:
    - `mteb` keeps results under a model's name and revision and does not evaluate these again: the revision here is a
      digest of the weights, and how things are read is part of the name of the results.
    - Vectors of two encoders compare in the space that a task trained, and nowhere else: pooled features of a picture
      and a text have an inner product that means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.adaptation.cache import digest_of
from mmssl.adaptation.features import POOLED, extract, inputs_of
from mmssl.adaptation.pairs import Network, encode_side, network_of
from mmssl.batch import Batch
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.mode import evaluating
from mmssl.suites import Given, open_model

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta

READ = ("text", "image", "audio")
NAME = re.compile(r"[^/\s]+/[^/\s]+")


class MtebEncoder:
    """What `mteb.evaluate` takes.

    A task of one modality gets the pooled features of the encoder that reads it, as every probe does. A task of two
    gets unit vectors of the space in which the run's task compares them; what is both, such as a picture with its
    caption, their sum.

    Args:
        given: a run, its directory, its name on the Hub, an encoder, or a task.
        name: under which results are kept, `organization/name`; `mmssl/` and the network's where left out.
        read: modality -> settings of `Encoder.read` in place of the run's, such as `{"text": {"length": 256}}`.
        trust: import the objective or encoder of your own that a run's directory names.

    Raises:
        RecipeError: for a name of another form, a network that reads none of these modalities, or a setting for one
            that it does not read; where `mteb` is not installed.
        RunError: for a run that cannot be read.
    """

    def __init__(
        self,
        given: Given,
        *,
        name: str | None = None,
        read: Mapping[str, Mapping[str, Any]] | None = None,
        trust: bool = False,
    ) -> None:
        model = open_model(given, trust=trust)
        self.task = model.task
        self.encoders: dict[str, Encoder] = {}
        for encoder in model.encoders.values():
            if encoder.modality in READ:
                self.encoders.setdefault(encoder.modality, encoder)
        if not self.encoders:
            raise RecipeError(f"mteb asks encoders of {', '.join(READ)}, and this one reads {model.encoder.modality}")
        self.settings = {modality: dict(own) for modality, own in (read or {}).items()}
        if odd := self.settings.keys() - self.encoders.keys():
            raise RecipeError(f"read: there is no encoder of {min(odd)}; there are those of {', '.join(self.encoders)}")
        self.name = name or f"mmssl/{next(iter(self.encoders.values())).spec['model'].replace('/', '-')}"
        if not NAME.fullmatch(self.name):
            raise RecipeError(f"name = '{self.name}': mteb keeps results under organization/name")
        self.mteb_model_meta = self._meta()

    def _meta(self) -> ModelMeta:
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise RecipeError("mteb is not installed: pip install 'mmssl[suites]'") from error
        networks = [self.task] if self.task is not None else [*self.encoders.values()]
        return ModelMeta.create_empty(
            {
                "name": self.name,
                "revision": "-".join(digest_of(network)[:16] for network in networks),
                "modalities": [*self.encoders],
                "embed_dim": next(iter(self.encoders.values())).dim,
                "n_parameters": sum(p.numel() for network in networks for p in network.parameters()),
                "framework": ["PyTorch"],
                "use_instructions": False,
                "experiment_kwargs": {
                    f"{modality}_{key}": value for modality, own in self.settings.items() for key, value in own.items()
                }
                or None,
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """Vectors of all rows, float32 (N, D).

        Args:
            inputs: batches with `text` (strings), `image` (PIL) or `audio` (`array` and `sampling_rate`).
            task_metadata: whose `modalities` say whether vectors are compared with those of another encoder.
            hf_split: not used, nor are the following: the encoder has no prompts.
            hf_subset: see `hf_split`.
            prompt_type: see `hf_split`.
            **options: see `hf_split`; the batches are those of `inputs`.

        Raises:
            RecipeError: for a modality that is not read, or two that are not compared.
            DataError: for a thing that cannot be decoded.
            RunError: where vectors are not finite.
        """
        network = self._compares(task_metadata.name, task_metadata.modalities)
        vectors: list[Tensor] = []
        for batch in inputs:
            there = [modality for modality in task_metadata.modalities if modality in batch]
            if not there or not self.encoders.keys() >= {*there}:
                given = ", ".join(there or batch)
                raise RecipeError(
                    f"{task_metadata.name} gives {given}, and this network reads {', '.join(self.encoders)}"
                )
            found = [self._vectors(modality, batch[modality], network) for modality in there]
            vectors.append(torch.stack(found).sum(0))
        return torch.cat(vectors).numpy()

    def _compares(self, task: str, modalities: Sequence[str]) -> Network | None:
        """What has a space for all of these; None where they are one and need none."""
        if len(modalities) == 1:
            return None
        for pair in self.task.pairs if self.task is not None else ():
            if pair.embed is not None:
                network = network_of(self.task, pair.a, pair.b) if self.task is not None else None
                if network is not None and {*modalities} <= {*network.modalities}:
                    return network
        raise RecipeError(f"{task} compares {' and '.join(modalities)}, for which this network has no common space")

    def _vectors(self, modality: str, things: Sequence[Any], network: Network | None) -> Tensor:
        """(B, D) on the CPU."""
        if network is None:
            encoder = self.encoders[modality]
            (features,), _ = extract([encoder], [self._batch(encoder, things)])
            return features[POOLED]
        side = network.modalities.index(modality)
        with evaluating(network.task), torch.no_grad():
            _, vectors = encode_side(network, side, self._batch(network.encoders[side], things))
        assert vectors is not None  # the pair has a space
        return vectors

    def _batch(self, encoder: Encoder, things: Sequence[Any]) -> Batch:
        key, valid_key = inputs_of(encoder)
        if key == "audio":  # of a decoder of `datasets`, too, which is no mapping
            things = [{name: thing[name] for name in ("array", "sampling_rate")} for thing in things]
        x, valid = encoder.read(list(things), **self.settings.get(key, {}))
        return {key: x} if valid is None else {key: x, valid_key: valid}

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines of all pairs, (N, M)."""
        return _unit(embeddings1) @ _unit(embeddings2).mT

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Cosines row by row, (N,)."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(1)


def _unit(vectors: Any) -> Tensor:
    return F.normalize(torch.as_tensor(vectors).float(), dim=-1)
