"""Backbone loading, and the personalized model: a backbone with the method's layers in its target modules."""

from proper.models.backbone import Backbone, load_backbone
from proper.models.personal import ProperModel

__all__ = ["Backbone", "ProperModel", "load_backbone"]
