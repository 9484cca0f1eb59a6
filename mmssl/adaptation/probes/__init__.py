"""One probe a module: it learns from frozen features, trains an encoder along, or compares the two sides of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmssl import registry
from mmssl.adaptation.probes.base import Probe


def make_probe(name: str, options: Mapping[str, Any], where: str = "") -> Probe:
    """A probe by its name.

    Args:
        name: as `mmssl list` gives it.
        options: its hyper-parameters.
        where: file and key, for errors.

    Raises:
        RecipeError: for an unknown name or hyper-parameter.
    """
    kind = registry.find("probe", name, where)
    probe: Probe = kind(**registry.check_keywords(kind, options, where or f"probe {name}"))
    return probe
