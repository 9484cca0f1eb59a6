"""What the encoder is worth: targets, frozen features, probes, fine-tuning, and the baselines of every number."""

from __future__ import annotations

from mmssl.adaptation.features import features
from mmssl.adaptation.table import Row, Table

__all__ = ["Row", "Table", "features"]
