"""Predictions in, numbers out: metrics, statistics, routing figures and the results file."""
