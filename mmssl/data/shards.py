"""Webdataset shards: which parts their samples have, where not every sample has the same ones."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from mmssl.data.files import EXTENSIONS

if TYPE_CHECKING:
    from datasets import Features

SAMPLES = 100


def shard_features(shard: str) -> tuple[Features, dict[str, list[str]]]:
    """Columns of a set of shards, from the first samples of one.

    `datasets` refuses shards whose first samples differ in their parts. Here the columns are those of all samples that
    were looked at, and where one of them is a picture (sound, clip), every extension of pictures is a column, so that
    a later `png` or `JPG` among `jpg` is not lost.

    Args:
        shard: path or address of a tar file.

    Returns:
        Features, media as plain bytes; and column -> the extensions that are one column together.
    """
    import datasets
    import pyarrow as pa
    from datasets.download import StreamingDownloadManager
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    files = StreamingDownloadManager().iter_archive(shard)
    samples = list(islice(WebDataset._get_pipeline_from_tar(shard, files), SAMPLES))
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
