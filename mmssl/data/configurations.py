"""Which files belong to which split, as the README.md of a data set of the Hub declares it; nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from mmssl.data.files import BUILDERS, JSON, TEXT, extension, split_by_name
from mmssl.errors import DataError, nearest

README = "README.md"


class Configuration(NamedTuple):
    """Files of one configuration.

    Attributes:
        splits: name -> tables of one kind, of which there are some.
        note: where the splits come from, a sentence.
    """

    splits: dict[str, list[str]]
    note: str


def find_configuration(root: Path, files: Sequence[Path], name: str | None) -> Configuration | None:
    """The tables that the head of a folder's README.md lists; None where it lists none.

    Args:
        root: the folder.
        files: all that are below it.
        name: of the configuration; the only one, or the default one, where left out.

    Raises:
        DataError: where there are several and none is named, or none has that name or files of one kind that are there.
    """
    declared = _declared(root / README)
    if not declared:
        return None
    if name is None:
        default = [key for key, one in declared.items() if len(declared) == 1 or key == "default" or one.get("default")]
        if not default:
            raise DataError(
                f"{root}: its {README} declares several configurations ({', '.join(declared)}); name one with "
                "data.config, or a folder or file of it as data.source"
            )
        name = default[0]
    elif name not in declared:
        raise DataError(f"{root}: its {README} declares no configuration '{name}'{nearest(name, declared)}")
    splits = _splits(root, {file for file in files if _reader(file)}, declared[name])
    kinds = {_reader(file) for own in splits.values() for file in own}
    if not kinds:
        return None  # of pictures, sounds and clips, whose folders tell
    if len(kinds) > 1:
        raise DataError(f"{root}: its {README} declares tables of several kinds as configuration '{name}'")
    left = sum(_reader(file) is not None for file in files) - len({file for own in splits.values() for file in own})
    note = f"splits as {README} declares them, configuration '{name}': {', '.join(splits)}"
    return Configuration(splits, note + (f"; {left} tables that it does not list are left out" if left else ""))


def _reader(file: Path | str) -> str | None:
    return (BUILDERS | TEXT | JSON).get(extension(file))


def _declared(readme: Path) -> dict[str, Mapping[str, Any]]:
    """Name -> what is declared of each configuration that says where its files are; a damaged head declares none."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        head = metadata_load(readme) if readme.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    listed = (head or {}).get("configs")
    named = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return {str(one.get("config_name", "default")): one for one in named if "data_files" in one or "data_dir" in one}


def _splits(root: Path, tables: set[Path], declared: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of the tables below the folder, and of no other file, whatever a pattern says."""
    from datasets.data_files import sanitize_patterns

    base = root / str(declared.get("data_dir", ""))
    if "data_files" not in declared:
        own = sorted(str(file) for file in tables if file.is_relative_to(base))
        return split_by_name(own, base)[0]
    try:
        patterns = sanitize_patterns(declared["data_files"])
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{root}: the data_files that its {README} declares cannot be read: {error}") from error
    found = {
        str(split): sorted({str(base / name) for one in own for name in glob(str(one), root_dir=base, recursive=True)})
        for split, own in patterns.items()
    }
    return {split: kept for split, own in found.items() if (kept := [file for file in own if Path(file) in tables])}
