"""Reproducing published numbers: suites of configurations, what they are compared with, and what came out."""
