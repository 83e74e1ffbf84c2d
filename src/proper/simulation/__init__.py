"""Discrete-event simulation of very many users on very many replicas; knows nothing of torch or of a run folder."""
