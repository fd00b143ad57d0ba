"""Measures of a model that the pass over its blocks computes."""
