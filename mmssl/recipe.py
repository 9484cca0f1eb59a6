"""The recipe: what a run is, in one YAML file of differences from the defaults.

A recipe is data: it is validated as a whole before anything is downloaded or built, saved resolved with the weights,
and never executed. Hyper-parameters of encoders and objectives are not repeated here: their constructors' signatures
are their schema (`mmssl.registry.check_keywords`). How sections are filled from YAML is in `mmssl.schema`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from mmssl.catalog import find_recipe
from mmssl.decode_settings import AudioDecode, ImageDecode, TextDecode, VideoDecode
from mmssl.errors import RecipeError, nearest
from mmssl.registry import components
from mmssl.schema import BelowOne, Positive, Section, Share, Steps, check_sizes, fill, override, read_yaml
from mmssl.shots import Shots

MOST_WORKERS, MOST_READERS = 256, 4096


class Data(Section):
    """Where rows come from and how they are decoded.

    Attributes:
        source: `toy`, a folder, a parquet / arrow / csv / jsonl file or glob, webdataset shards (`*.tar`), or the name
            of a data set on the Hub; `$NAME` is read from the environment.
        split: of the data set.
        config: configuration name of a Hub data set.
        streaming: read in order without keeping the data set on disk.
        columns: batch key -> column, for instance `{image: img}`; a key that is left out means a column of that name.
            `center` names a column of seconds: windows of sounds and clips lie around them, as far as the clip reaches,
            and where the column is empty as `start` says.
        image, text, audio, video: decode settings; a modality that the objective does not need is not decoded.
        start: which part of a longer sound or clip is taken: one random window a row and epoch, the middle, the start.
        windows: how many windows of a sound or clip probes, `embed` and `predict` see, spread evenly from its start to
            its end: features are averaged over them. A row of training is one window.
        readers: virtual readers that share a stream, each with its own part of the files: a row of the global batch
            always comes from the same ones, on any number of processes that divides theirs.
        shuffle_buffer: rows that a stream permutes at a time, of all readers together.
        limit: use only that many rows.
        max_bad: share of rows that may be undecodable before the run stops.
        cache: folder in which training keeps decoded pictures, and sounds and clips where `start` is not `random` or
            there is a center, so that they are decoded once; `$NAME` is read from the environment. Probes decode anew.
        cache_gb: what the folder may take, in 10^9 bytes; rows that find no room are decoded every time.
    """

    source: str
    split: str = "train"
    config: str | None = None
    streaming: bool = False
    columns: dict[str, str] = Field(default_factory=dict)
    image: ImageDecode = ImageDecode()
    text: TextDecode = TextDecode()
    audio: AudioDecode = AudioDecode()
    video: VideoDecode = VideoDecode()
    start: Literal["random", "middle", "first"] = "random"
    windows: Annotated[int, Field(ge=1, le=100)] = 1
    readers: Annotated[int, Field(ge=1, le=MOST_READERS)] = 64
    shuffle_buffer: Positive = 4096
    limit: Positive | None = None
    max_bad: Share = 0.01
    cache: Annotated[str, Field(min_length=1)] | None = None
    cache_gb: Annotated[float, Field(gt=0)] = 64.0

    @model_validator(mode="after")
    def _spreads_or_centers(self) -> Data:
        if self.windows > 1 and "center" in self.columns:
            raise ValueError(
                f"windows = {self.windows} are spread over a clip, and columns.center places one; drop one"
            )
        return self

    @property
    def for_probes(self) -> Data:
        """The same rows, pictures as probes see them, decoded anew."""
        return self.model_copy(update={"image": self.image.for_probes, "cache": None})


def _one_or_many(value: Any) -> str:
    """Tag of what `data` holds, so that an error is reported for that and not as two failed alternatives."""
    if isinstance(value, Mapping) and value and "source" not in value:
        return MANY if all(isinstance(v, Mapping | Data) for v in value.values()) else ONE
    return ONE


ONE, MANY = "(one source)", "(named sources)"
OneOrMany = Annotated[
    Annotated[Data, Tag(ONE)] | Annotated[dict[str, Data], Tag(MANY)],
    Discriminator(_one_or_many),
]


class Optimizer(Section):
    """Optimizer settings.

    `lr` is the peak learning rate for the recipe's global batch; it is not rescaled. With `weight_decay_end` the weight
    decay moves there along a cosine over the run. `decay`: what is decayed, and adapted by LARS and LAMB: `weights`,
    without biases, norms and what the network's library leaves out (class tokens, positions), or `all` parameters.
    """

    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    decay: Literal["weights", "all"] = "weights"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: BelowOne = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Optimizer:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov is for sgd with momentum")
        return self


class Schedule(Section):
    """Learning rate over the run: linear warm-up, then the named decay.

    Times are in epochs where `training.epochs` is given, and else in steps.

    Attributes:
        name: `cosine` and `linear` fall to `final` times the peak at the end of the run; `multistep` multiplies by
            `gamma` at each of `milestones`; `inverse_sqrt` falls with the square root of time from the end of the
            warm-up (Raffel et al. 2020; Vaswani et al. 2017, equation 3); `constant` stays.
        warmup: time until the peak.
        final: of cosine and linear.
        milestones: of multistep, ascending.
        gamma: of multistep.
    """

    name: Literal["cosine", "linear", "multistep", "inverse_sqrt", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0
    final: Share = 0.0
    milestones: tuple[Annotated[float, Field(gt=0)], ...] = ()
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if (self.name == "multistep") != bool(self.milestones):
            raise ValueError("milestones are for the schedule multistep, which needs some")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} should ascend")
        if self.name == "inverse_sqrt" and self.warmup == 0:
            raise ValueError("inverse_sqrt falls from the end of the warm-up, which is 0")
        return self


def _number_or_auto(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 0 <= value <= MOST_WORKERS):
        return value
    raise ValueError(f"{value!r} should be 0 to {MOST_WORKERS}, or auto")


class Training(Section):
    """The loop.

    Attributes:
        steps: optimizer steps; worked out where `epochs` is given.
        epochs: passes through the data, in place of steps: the longest source, whose size has to be known.
        batch_size: rows of the global batch, whatever the number of processes and micro-batches.
        accumulate: micro-batches into which each process cuts its rows.
        precision: of the forward pass; `fp64` runs everything in double precision, for proofs.
        clip: largest norm of the whole gradient; none by default.
        compile: torch.compile the objective's forward.
        checkpointing: compute activations of each block anew in the backward pass: less memory, about a third more
            time, the same bits.
        sharded: each of several processes holds a part of every weight, gradient and moment (FSDP2); else all hold all.
        gather_precision: of the features and gradients that processes send each other in a loss; `bf16` halves them.
        seed: of initialization, order and every draw.
        workers: processes that decode; 0 decodes in the main one, and `auto` takes one for each core that a process of
            the training has, less its own, 16 at most.
        save_every, log_every: in steps; the last step is always saved and logged.
        trackers: in addition to metrics.jsonl and TensorBoard, by accelerate's names: wandb, mlflow, trackio ...
    """

    steps: Steps = 1000
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    batch_size: Annotated[int, Field(gt=0, le=2**22)] = 64
    accumulate: Annotated[int, Field(gt=0, le=2**16)] = 1
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    clip: Annotated[float, Field(gt=0)] | None = None
    compile: bool = False
    checkpointing: bool = False
    sharded: bool = False
    gather_precision: Literal["full", "bf16"] = "full"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = 0
    save_every: Steps = 500
    log_every: Steps = 10
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    trackers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulate = {self.accumulate} equal parts"
            )
        end, unit = (self.steps, "steps") if self.epochs is None else (self.epochs, "epochs")
        for key, times in (("warmup", (self.schedule.warmup,)), ("milestones", self.schedule.milestones)):
            if max(times, default=0) >= end:
                raise ValueError(
                    f"schedule.{key} is at {max(times):g} of the run's {end:g} {unit} and has to be before the end; "
                    f"lower training.schedule.{key} or raise training.{unit}"
                )
        return self

    @property
    def steps_per_unit(self) -> float:
        """Steps of an epoch where the run is given in epochs, else 1."""
        return 1.0 if self.epochs is None else self.steps / self.epochs

    def in_steps(self, steps_per_epoch: int | None) -> Training:
        """The same with the steps that its epochs are.

        Raises:
            ValueError: where the size of an epoch is not known.
        """
        if self.epochs is None:
            return self
        if steps_per_epoch is None:
            raise ValueError(
                "training.epochs needs data of known size, and that of this stream is not; give training.steps"
            )
        return self.model_copy(update={"steps": max(1, round(self.epochs * steps_per_epoch))})


class Probe(Section):
    """A probe on labeled rows, during training and in the report.

    Other keys are the probe's hyper-parameters, such as `k` of `knn`; `mmssl list knn` says which there are.

    Attributes:
        data: labeled source with the same decode settings as the training data; `none` uses the training source.
        label: column of the label; where left out `mask` of segmentation, `boxes` of detection, and `label` of others.
        target: what the labels are: `classes`, `labels`, `values` ...; by the column's cells where left out.
        probe: `knn`, `ridge`, `logistic`, `svm`, `mlp`, `attentive`, `finetune`, `retrieval` ...
        encoder: whose features are probed; the first encoder where left out.
        layers: probe every depth as well.
        shots: learn from only so many rows a class, or a share of all labeled ones: `1%`.
        groups: column of what the choice of hyper-parameters must not divide, such as drawings of one thing.
        limit: use only that many rows, of training and of test rows each.
        every: steps between probes during training; 0 only at the end.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    data: str | None = None
    label: str | None = None
    target: str | None = None
    probe: str = "knn"
    encoder: str | None = None
    layers: bool = False
    shots: Shots | None = None
    groups: str | None = None
    every: Annotated[int, Field(ge=0)] = 0
    limit: Positive | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The probe's hyper-parameters."""
        return dict(self.model_extra or {})


class Recipe(Section):
    """A whole run.

    Attributes:
        encoders: name -> `{model: library/name, ...}`; the name is the modality unless `modality` says otherwise, and
            with `frozen: true` it keeps the weights that it starts from.
        objective: `{name: ..., hyper-parameter: value, ...}`.
        data: one source, or name -> source where an objective mixes several.
        training: the loop.
        probe: optional labeled set, and what is asked of it.
        probes: several of these, in place of one.
        license: of the weights, for the model card.
    """

    encoders: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    objective: dict[str, Any]
    data: OneOrMany
    training: Training = Training()
    probe: Probe | None = None
    probes: Annotated[tuple[Probe, ...], BeforeValidator(lambda value: () if value is None else value)] = ()
    license: str | None = None

    @field_validator("data")
    @classmethod
    def _not_nothing(cls, value: Data | dict[str, Data]) -> Data | dict[str, Data]:
        for name, data in {"": value}.items() if isinstance(value, Data) else value.items():
            if not data.source.strip() or not data.split.strip():
                raise ValueError(f"{name + ': ' if name else ''}source and split are names, and one of them is empty")
        return value

    @field_validator("objective")
    @classmethod
    def _named(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("name"), str):
            raise ValueError("needs a name, for instance {name: rotation}")
        return value

    @field_validator("encoders")
    @classmethod
    def _has_model(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, arguments in value.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"'{name}' names files and folders; use letters, digits, _ and -")
            if not isinstance(arguments.get("model"), str):
                raise ValueError(f"'{name}' needs a model, for instance {{model: timm/resnet18}}")
            modality, known = arguments.get("modality", "image"), components("encoder")
            if not isinstance(modality, str) or ("." not in modality and modality not in known):
                raise ValueError(f"'{name}': modality = {modality!r} is none{nearest(str(modality), known)}")
            check_sizes(arguments, name)
        return value

    @model_validator(mode="after")
    def _one_or_several_probes(self) -> Recipe:
        if self.probe and self.probes:
            raise ValueError("probe and probes are both given; put all into the list probes")
        return self

    def every_probe(self) -> tuple[Probe, ...]:
        """The one or the several."""
        return (self.probe,) if self.probe else self.probes

    def sources(self) -> dict[str, Data]:
        """Name -> source; the name is empty where there is only one."""
        return {"": self.data} if isinstance(self.data, Data) else dict(self.data)

    def decoding(self, needs: Collection[str], *modalities: str) -> Data:
        """The first source from which a task takes all of these modalities: how probes decode rows of them.

        Args:
            needs: batch keys of the task, with the source's name before them where there are several.
            *modalities: out of `image`, `text`, `audio`, `video`.
        """
        sources = self.sources()
        fitting = (
            data
            for name, data in sources.items()
            if {f"{name}/{key}" if name else key for key in modalities} <= {*needs}
        )
        return next(fitting, next(iter(sources.values()))).for_probes

    def dump(self) -> str:
        """The resolved recipe as YAML; loading it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def data_section(source: str | Data, overrides: Mapping[str, Any]) -> Data:
    """The data section of a source, with dotted keys in place of the defaults; see `load`."""
    tree = {"source": source} if isinstance(source, str) else source.model_dump(mode="json", exclude_unset=True)
    return fill(Data, override(tree, overrides, "--set"), "--set")


def load(path: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file, the name of one that comes along, or the mapping that one would hold.
        overrides: dotted key -> value, for instance `{"training.steps": 200}`; strings are read as YAML.

    Raises:
        RecipeError: one sentence with the file, the key, what was expected and the nearest valid name.
    """
    if not isinstance(path, Mapping):
        path = find_recipe(path)
    where, tree = ("recipe", path) if isinstance(path, Mapping) else (str(path), read_yaml(path))
    return validate(override(tree, overrides or {}, where), where)


def validate(tree: Mapping[str, Any], where: str) -> Recipe:
    """Validate against the schema; see `load`."""
    return fill(Recipe, tree, where)


def in_steps(recipe: Recipe, steps_per_epoch: int | None, where: str) -> Recipe:
    """The recipe with the steps that its epochs are; see `Training.in_steps`."""
    try:
        return recipe.model_copy(update={"training": recipe.training.in_steps(steps_per_epoch)})
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from None
