"""The two things llmc asks of a tokenizer: token ids of a text, and the text of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmc.errors import DataError

Message = dict[str, str]
"""One turn of a chat: ``{"role": "user", "content": "..."}``."""


class Tokenizer(Protocol):
    """What llmc uses of a transformers tokenizer."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Return a mapping whose ``input_ids`` are the text's token ids."""

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> Any:
        """Return the conversation as the text the model was trained on."""


def encode(tokenizer: Tokenizer, text: str, *, special: bool) -> Tensor:
    """Tokenize one text, however long, without truncation and without the "longer than max length" warning.

    Args:
        tokenizer: any transformers tokenizer.
        text: the text.
        special: whether the tokenizer may add its special tokens (a BOS, say).

    Returns:
        Token ids, ``[n]`` int64.
    """
    encoded = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Write a conversation as text with the tokenizer's chat template.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the calibration asks for a chat template, and this model's tokenizer has none",
            "set calib.apply_chat_template to false and choose a preset other than ultrachat_general",
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:  # the template is a program from the checkpoint: it may raise anything
        roles = [message.get("role", "?") for message in messages]
        raise DataError(
            f"the tokenizer's chat template refuses a conversation with the roles {roles}: {error}",
            "remove that conversation, or write its turns the way this model's template expects them",
        ) from error
