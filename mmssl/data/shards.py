"""Webdataset shards: which parts their samples have, where not every sample has the same ones."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from mmssl.data.files import EXTENSIONS

if TYPE_CHECKING:
    from datasets import Features

SAMPLES = 100


def shard_features(shard: str) -> tuple[Features, dict[str, list[str]]]:
    """Columns of a set of shards, from the first samples of one.

    `datasets` refuses shards whose first samples differ in their parts. Here the columns are those of all samples that
    were looked at, and where one of them is a picture (sound, clip), every extension of pictures is a column, so that
    a later `png` or `JPG` among `jpg` is not lost. A column of whole numbers and names, such as `cls`, is one of names.

    Args:
        shard: path or address of a tar file.

    Returns:
        Features, media as plain bytes; and column -> the extensions that are one column together.
    """
    import datasets
    import pyarrow as pa
    from datasets.download import StreamingDownloadManager
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    take_names()
    files = StreamingDownloadManager().iter_archive(shard)
    samples = list(islice(WebDataset._get_pipeline_from_tar(shard, files), SAMPLES))
    for name in {name for sample in samples for name, cell in sample.items() if isinstance(cell, str)}:
        for sample in samples:
            if isinstance(sample.get(name), int):
                sample[name] = str(sample[name])
    tables = [pa.Table.from_pylist([sample]) for sample in samples]
    schema = pa.concat_tables(tables, promote_options="permissive").schema
    features = datasets.Features.from_arrow_schema(schema)
    merged: dict[str, list[str]] = {}
    for extensions in EXTENSIONS.values():
        spelled = [spelling for extension in extensions for spelling in (extension, extension.upper())]
        found = [name for name in features if name.lower() in extensions]
        if found:
            merged[found[0]] = list(dict.fromkeys([*found, *spelled]))
            features |= {name: datasets.Value("binary") for name in merged[found[0]]}
    return features, merged


def take_names() -> None:
    """Have `datasets` read `cls`, and other parts that it takes for whole numbers, as names where they are none.

    It knows one table of decoders, of the whole process, so that a worker has to call this as well.
    """
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    WebDataset.DECODERS.update({part: _number_or_name for part, read in WebDataset.DECODERS.items() if read is int})


def _number_or_name(content: bytes) -> Any:
    try:
        return int(content)
    except ValueError:
        return content.decode().strip()
