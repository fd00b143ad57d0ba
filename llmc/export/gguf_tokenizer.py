"""A checkpoint's tokenizer as GGUF stores it: byte-level BPE ("gpt2") or SentencePiece ("llama").

llama.cpp has the pre-tokenizers (regular expressions) of byte-level BPE built in, by name. Which one a tokenizer has is
told by the ids that it gives to one probing text (``gguf_probe.txt``); ``gguf_pre_tokenizers.json`` names them by the
SHA-256 of those ids. Both are llama.cpp's (``conversion/base.py``).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import ExportError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # ggml's types of tokens; SentencePiece's pieces too
_PADDING_SCORE, _ADDED_SCORE = -10000.0, -1000.0
_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # marked as ordinary by some models
_REMEDY = "write save_vllm or save_fake"


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF stores of a tokenizer, apart from merges, special ids and the chat template.

    Attributes:
        model: ``tokenizer.ggml.model``.
        pre: ``tokenizer.ggml.pre``.
        tokens: one for each row of the embedding.
        types: ggml's type of each.
        scores: of SentencePiece.
        space_prefix: whether SentencePiece puts a space in front of a text; None: it isn't SentencePiece.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    space_prefix: bool | None = None

    @property
    def covers_all_bytes(self) -> bool:
        """Whether any text can be said in it. Byte-level BPE always can."""
        return self.scores is None or self.types.count(BYTE) == 256


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of ``size`` tokens, padded where the tokenizer has fewer.

    Raises:
        ExportError: llama.cpp has no such tokenizer, or it isn't there.
    """
    backend = folder / "tokenizer.json"
    if backend.is_file():
        content = json.loads(backend.read_text(encoding="utf-8"))
        if content["model"].get("type") == "BPE" and '"ByteLevel"' in json.dumps(content.get("pre_tokenizer")):
            return _byte_level(backend, size)
    pieces = folder / "tokenizer.model"
    if pieces.is_file():
        return _sentence_pieces(pieces, size)
    raise ExportError(
        f"save_llamacpp: {folder} has neither a byte-level BPE in tokenizer.json nor a SentencePiece tokenizer.model",
        f"put tokenizer.model there if the model has one, or {_REMEDY}",
    )


# --- byte-level BPE --------------------------------------------------------------------------------------------------


def _byte_level(file: Path, size: int) -> Vocabulary:
    tokenizer = Tokenizer.from_file(str(file))
    named = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    _check_size(file, max(named, default=0), size)
    pre = _pre_tokenizer(file, tokenizer)
    added: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    tokens, types = [], []
    for index in range(size):
        token, kind = named.get(index, f"[PAD{index}]"), NORMAL if index in named else UNUSED
        if index in added:
            token, kind = _added(tokenizer, token, added[index])
        tokens.append(token)
        types.append(kind)
    return Vocabulary("gpt2", pre, tokens, types)


def _added(tokenizer: Tokenizer, token: str, entry: AddedToken) -> tuple[str, int]:
    """An added token as llama.cpp looks for it in a text: normalized, and with plain spaces."""
    if not entry.normalized:
        token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False).ids, skip_special_tokens=False)
    if entry.special or _looks_special(token):
        return token, CONTROL
    return token.replace("▁", " "), USER_DEFINED


def _looks_special(token: str) -> bool:
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token in _SPECIAL or any(token.startswith(left) and token.endswith(right) for left, right in pairs)


def _pre_tokenizer(file: Path, tokenizer: Tokenizer) -> str:
    data = files(__package__)
    probe = data.joinpath("gguf_probe.txt").read_bytes().decode("utf-8")
    known: dict[str, str] = json.loads(data.joinpath("gguf_pre_tokenizers.json").read_text(encoding="utf-8"))
    found = hashlib.sha256(str(tokenizer.encode(probe).ids).encode()).hexdigest()
    if found not in known:
        raise ExportError(
            f"save_llamacpp: {file}: llama.cpp has no pre-tokenizer for it (its fingerprint {found[:12]} isn't among "
            f"the {len(known)} known ones), and another would split text differently",
            f"is it the model's own, unchanged tokenizer? If so, {_REMEDY}",
        )
    return known[found]


def _check_size(file: Path, last: int, size: int) -> None:
    if last >= size:
        raise ExportError(
            f"save_llamacpp: {file} has the token {last}, but the embedding only {size} rows (vocab_size)",
            "do the tokenizer and the model belong together?",
        )


# --- SentencePiece ---------------------------------------------------------------------------------------------------


def _sentence_pieces(file: Path, size: int) -> Vocabulary:
    model = _load_pieces(file)
    pieces = list(model.pieces)
    _check_size(file, len(pieces) - 1, size)
    missing = range(len(pieces), size)
    tokens = [piece.piece for piece in pieces] + [f"[PAD{index}]" for index in missing]
    types = [int(piece.type) for piece in pieces] + [UNUSED for _ in missing]
    scores = [float(piece.score) for piece in pieces] + [_PADDING_SCORE for _ in missing]
    for index, (token, special) in _added_to_pieces(file.parent).items():
        _check_size(file, index, size)
        control = special or _looks_special(token)
        tokens[index] = token if control else token.replace("▁", " ")
        types[index], scores[index] = CONTROL if control else USER_DEFINED, _ADDED_SCORE
    prefix = _settings(file.parent).get("add_prefix_space")
    prefix = model.normalizer_spec.add_dummy_prefix if prefix is None else prefix
    return Vocabulary("llama", "default", tokens, types, scores, bool(prefix))


def _load_pieces(file: Path) -> Any:
    """SentencePiece's model.

    Raises:
        ExportError: its package is missing, the file is damaged, or it isn't a BPE.
    """
    try:
        from google.protobuf.message import DecodeError

        schema: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError as missing:
        raise ExportError(
            f"save_llamacpp: reading {file} needs the packages sentencepiece and protobuf",
            'install them: pip install "llmc[gguf]"',
        ) from missing
    model = schema.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as problem:
        raise ExportError(
            f"save_llamacpp: {file} isn't a SentencePiece model: {problem}", "fetch it again"
        ) from problem
    if model.trainer_spec.model_type != schema.TrainerSpec.BPE:
        raise ExportError(
            f"save_llamacpp: {file} is a SentencePiece model that isn't a BPE, which llama.cpp would split differently",
            _REMEDY,
        )
    return model


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def _added_to_pieces(folder: Path) -> dict[int, tuple[str, bool]]:
    """Tokens that were added beside the pieces, with whether they are special."""
    file = folder / "added_tokens.json"
    plain = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {int(index): (str(token), False) for token, index in plain.items()}
    described = _settings(folder).get("added_tokens_decoder", {})
    return found | {int(index): (one["content"], bool(one.get("special"))) for index, one in described.items()}
