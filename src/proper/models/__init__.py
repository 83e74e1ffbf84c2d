"""Backbones, and how the method's layers get into them."""

from proper.models.backbone import Backbone, load_backbone
from proper.models.personal import ProperModel

__all__ = ["Backbone", "ProperModel", "load_backbone"]
