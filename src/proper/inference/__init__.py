"""Answers for many users at once, from a run folder."""

from proper.inference.personalized import Answer, PersonalizedModel, load

__all__ = ["Answer", "PersonalizedModel", "load"]
