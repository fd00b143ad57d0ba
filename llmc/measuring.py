"""From the evaluations of a configuration to what the pass over the blocks measures, and from that to results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .eval.divergence import Divergence
from .eval.measure import ORIGINAL, Evaluated, Text, Watch
from .eval.perplexity import CrossEntropy
from .quant import KvSpec
from .samples import Evaluation
from .stream.batch import Batch
from .stream.options import Batches

_DECODING = "decode_ppl"
_MEASURES: dict[str, type[CrossEntropy] | type[Divergence]] = {
    "ppl": CrossEntropy,
    _DECODING: CrossEntropy,
    "token_acc": Divergence,
}


def state_of(position: str, kv: KvSpec | None) -> str:
    """The state of the model that a position means; unless the KV cache is quantized, with and without it are one."""
    return "fake_quant" if position == "fake_quant_wo_kv" and kv is None else position


@dataclass(frozen=True)
class _Measured:
    """An evaluation, its measure, the batches of its text, and of its positions those that have a result: the original
    needs no comparison with itself."""

    evaluation: Evaluation
    watch: Watch
    measure: CrossEntropy | Divergence
    positions: tuple[str, ...]


class Measuring:
    """What a pass measures for some evaluations.

    A text goes through the model once, however many evaluations read it in the same windows and batches.

    Args:
        evaluations: what is wanted.
        kv: how the KV cache is quantized.
    """

    def __init__(self, evaluations: Sequence[Evaluation], kv: KvSpec | None) -> None:
        self._kv = kv
        self._batches: dict[bool, list[Batch]] = {False: [], True: []}
        self._known: dict[tuple[bool, str, int], range] = {}
        self._measured = [self._place(one) for one in evaluations]

    def _place(self, one: Evaluation) -> _Measured:
        decodes = one.kind == _DECODING
        batches, key = self._batches[decodes], (decodes, one.windows.sha256, len(one.batches[0]))
        if key not in self._known:
            first = len(batches)
            batches += [Batch(tokens) for tokens in one.batches]
            self._known[key] = range(first, len(batches))
        measure = _MEASURES[one.kind]()
        positions = tuple(position for position in one.positions if not measure.compares or position != ORIGINAL)
        states = frozenset(state_of(position, self._kv) for position in positions)
        return _Measured(one, Watch(measure, self._known[key], states), measure, positions)

    @property
    def prefilled(self) -> Batches:
        """Texts that go through the model window by window."""
        return self._read(decodes=False)

    @property
    def decoded(self) -> Batches:
        """Texts that go through it token by token, over a KV cache."""
        return self._read(decodes=True)

    def _read(self, *, decodes: bool) -> Batches:
        watches = [one.watch for one in self._measured if (one.evaluation.kind == _DECODING) == decodes]
        return Batches(self._batches[decodes], watches)

    @property
    def states(self) -> frozenset[str]:
        """The states of the model that are run."""
        return self.prefilled.states | self.decoded.states

    @property
    def stream_tokens(self) -> int:
        """Tokens of all streams: every state is run on every text of its kind."""
        reads = (self.prefilled, self.decoded)
        return sum(len(read.states) * sum(batch.tokens.numel() for batch in read.batches) for read in reads)

    def results(self) -> list[Evaluated]:
        """When the pass is done: a result for each evaluation and position."""
        return [
            one.measure.result(one.evaluation.kind, _text(one.evaluation), position, state_of(position, self._kv))
            for one in self._measured
            for position in one.positions
        ]


def _text(one: Evaluation) -> Text:
    count, length = one.windows.tokens.shape
    return Text(one.name, one.windows.protocol, one.windows.sha256, count, length)
