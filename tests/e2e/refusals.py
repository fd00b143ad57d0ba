"""What is asked of the message that refuses a run."""

from __future__ import annotations


def contains(message: str, *parts: str) -> None:
    assert [part for part in parts if part not in message] == [], message
