"""What the encoder is worth: frozen features, probes, fine-tuning, and the baselines that any number stands beside."""

from __future__ import annotations

from mmssl.adaptation.adapt import adapt
from mmssl.adaptation.during import ProbeDuring
from mmssl.adaptation.features import features
from mmssl.adaptation.scores import RetrievalRow, RetrievalScores, Row, Scores

__all__ = ["ProbeDuring", "RetrievalRow", "RetrievalScores", "Row", "Scores", "adapt", "features"]
