"""Run directory <-> Hub: native exports, model card, upload, and a download that is checked before it is built."""

from __future__ import annotations

from mmssl.hub.card import model_card
from mmssl.hub.export import export
from mmssl.hub.load import load
from mmssl.hub.pull import check_folder, download
from mmssl.hub.push import push

__all__ = ["check_folder", "download", "export", "load", "model_card", "push"]
