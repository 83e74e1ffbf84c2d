"""Inference for mixed-user batches: `load` a run folder, then generate or score for any of its users."""

from proper.inference.generate import Answer
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel

__all__ = ["Answer", "PersonalizedModel", "load"]
