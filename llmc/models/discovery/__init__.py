"""The parts of ``llmc/models/discover.py``: what a model's own code shows when it runs on random weights."""
