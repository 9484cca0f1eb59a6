"""What a Hugging Face data set says of its columns: which hold media, and what their classes are called."""

from __future__ import annotations

from typing import Any


def undecoded(dataset: Any) -> Any:
    """Pictures, sounds and clips as their stored bytes and path: decoding is ours, and `datasets` needs torchcodec."""
    import datasets

    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    streaming = isinstance(dataset, datasets.IterableDataset)
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            # On a table the feature's own switch costs nothing; in a stream it would still ask for torchcodec.
            dataset = dataset.cast_column(column, stored if streaming else type(feature)(decode=False))
    return dataset


def names_of_classes(dataset: Any, column: str) -> list[str] | None:
    """Names of the classes whose numbers a column holds; None where the data set says none."""
    return getattr((dataset.features or {}).get(column), "names", None)
