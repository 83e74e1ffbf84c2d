"""Discrete-event simulation of very many users on very many replicas, without torch and without a run folder."""
