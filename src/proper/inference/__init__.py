"""Inference for mixed-user batches: `load` a run folder, then generate or score for any of its users."""

from proper.inference.personalized import Answer, PersonalizedModel, load

__all__ = ["Answer", "PersonalizedModel", "load"]
