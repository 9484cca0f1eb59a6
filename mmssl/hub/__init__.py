"""Run directory <-> Hub: native exports, model card, upload, and a download that is checked before it is built."""

from __future__ import annotations

from mmssl.hub.card import model_card
from mmssl.hub.classifier import is_classifier, load_classifier, load_saved
from mmssl.hub.export import export
from mmssl.hub.export_classifier import export_classifier
from mmssl.hub.load import load
from mmssl.hub.pull import check_folder, download
from mmssl.hub.push import push, push_classifier

__all__ = [
    "check_folder",
    "download",
    "export",
    "export_classifier",
    "is_classifier",
    "load",
    "load_classifier",
    "load_saved",
    "model_card",
    "push",
    "push_classifier",
]
