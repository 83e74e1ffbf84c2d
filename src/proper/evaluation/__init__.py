"""Evaluation of predictions: metrics, statistics, routing figures and the results file."""
