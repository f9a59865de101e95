"""Metrics, the evaluation of a pipeline on a dataset, and its plots."""
