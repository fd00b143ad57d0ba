"""Decoders: one short file a way of storing weights. Which of them a checkpoint needs is found from its headers."""

from .registry import open_checkpoint

__all__ = ["open_checkpoint"]
