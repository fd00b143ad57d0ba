"""What a run left, as typed values: the content of ``metrics.json``, each number that may be missing as None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Plain = Mapping[str, Any]

ORIGINAL, COMPRESSED = "pretrain", ("fake_quant", "fake_quant_wo_kv")


@dataclass(frozen=True)
class Evaluation:
    """One entry of ``evaluation``.

    Attributes:
        kind: ``ppl``, ``decode_ppl``, ``token_acc``, ``lm_eval`` or ``generate_only``.
        name: the text or task.
        position: which model.
        value: the number; None where there is none (texts).
        protocol: how it was measured, in words.
        identity: what two runs must share for their numbers to be comparable (the tokens' digest, else the protocol).
        metric: of a task, which number it is.
        stderr: of that.
        top5: share of tokens whose original choice is among the five likeliest.
        kl: mean KL divergence from the original, nats per token.
        texts: pairs of prompt and continuation.
    """

    kind: str
    name: str
    position: str
    value: float | None
    protocol: str
    identity: str
    metric: str | None = None
    stderr: float | None = None
    top5: float | None = None
    kl: float | None = None
    texts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, entry: Plain) -> Evaluation:
        """From ``metrics.json``."""
        samples = entry.get("samples")
        texts = samples if isinstance(samples, list) else []
        protocol = str(entry.get("protocol") or "")
        return cls(
            kind=entry["kind"],
            name=entry["name"],
            position=entry["position"],
            value=entry.get("value"),
            protocol=protocol,
            identity=str(entry.get("tokens_sha256") or protocol),
            metric=entry.get("metric"),
            stderr=entry.get("stderr"),
            top5=entry.get("top5"),
            kl=entry.get("kl"),
            texts=tuple((str(one["prompt"]), str(one["text"])) for one in texts),
        )


@dataclass(frozen=True)
class LayerRow:
    """One Linear of one block.

    Attributes:
        error: relative error of its output, |(W - W')X|² / |WX|².
        cosine: between its output and the original's.
        sqnr_db: signal to noise of its output, dB.
        kurtosis: of its weight, the whole tensor.
        clipped: share of its weights beyond the grid's range.
        zeros: share of its codes that are zero.
        bits: for a weight, scales and zero points included.
        sparsity: share of its weights that were pruned.
        damp: what its factorization needed.
        fallback: why it was treated by a simpler method.
    """

    error: float | None = None
    cosine: float | None = None
    sqnr_db: float | None = None
    kurtosis: float | None = None
    clipped: float | None = None
    zeros: float | None = None
    bits: float | None = None
    sparsity: float | None = None
    damp: float | None = None
    fallback: str | None = None

    @classmethod
    def of(cls, note: Plain) -> LayerRow:
        """From a block's ``layers``."""
        weight = note.get("weight") or {}
        return cls(
            error=note.get("error"),
            cosine=note.get("cosine"),
            sqnr_db=note.get("sqnr_db"),
            kurtosis=(weight.get("kurtosis") or {}).get("tensor"),
            clipped=weight.get("clipped"),
            zeros=weight.get("zeros"),
            bits=note.get("bits"),
            sparsity=note.get("sparsity"),
            damp=note.get("damp"),
            fallback=note.get("fallback"),
        )


@dataclass(frozen=True)
class Spread:
    """How the values of a subset's input are spread.

    Attributes:
        kurtosis: of the whole tensor; ``channel`` and ``token`` are means over those.
        outliers: number of outlier channels.
        share: of the energy that is in these.
        worst: pairs of channel and how many times the median it is.
        clipped: share of the values beyond a static grid's range.
    """

    kurtosis: float | None
    channel: float | None
    token: float | None
    outliers: int | None
    share: float | None
    worst: tuple[tuple[int, float], ...]
    clipped: float | None

    @classmethod
    def of(cls, entry: Plain | None) -> Spread | None:
        """From ``activations``."""
        if entry is None:
            return None
        found = [(one["channel"], one["ratio"]) for one in (entry.get("outliers") or {}).get("worst") or ()]
        kurtosis, outliers = entry.get("kurtosis") or {}, entry.get("outliers") or {}
        return cls(
            kurtosis=kurtosis.get("tensor"),
            channel=(kurtosis.get("channel") or {}).get("mean"),
            token=(kurtosis.get("token") or {}).get("mean"),
            outliers=outliers.get("count"),
            share=outliers.get("share"),
            worst=tuple(sorted(found, key=lambda pair: -pair[1])),
            clipped=entry.get("clipped"),
        )


@dataclass(frozen=True)
class BlockRow:
    """One block.

    Attributes:
        number: in the original model.
        seconds: that it took.
        error: relative error of the compressed model's hidden state behind it to the original's.
        layers: by name in the block.
        inputs: original and transformed, by the subset's key.
    """

    number: int
    seconds: float | None
    error: float | None
    layers: Mapping[str, LayerRow]
    inputs: Mapping[str, tuple[Spread | None, Spread | None]]

    @classmethod
    def of(cls, row: Plain) -> BlockRow:
        """From ``blocks``, or a line of the journal."""
        inputs = row.get("activations") or {}
        return cls(
            number=int(row["unit"].rpartition("-")[2]),
            seconds=row.get("seconds"),
            error=row.get("error"),
            layers={name: LayerRow.of(note) for name, note in row["layers"].items()},
            inputs={
                key: (Spread.of(found.get("original")), Spread.of(found.get("transformed")))
                for key, found in inputs.items()
            },
        )


@dataclass(frozen=True)
class Output:
    """One written folder.

    Attributes:
        name: its key in ``save``.
        folder: where.
        size: bytes.
        bits: for a weight of the whole model; None where a format holds no model.
        serve: the command that uses it.
    """

    name: str
    folder: str
    size: int
    bits: float | None
    serve: str


@dataclass(frozen=True)
class Experts:
    """How the experts of one block were calibrated; ``tokens`` by expert where they are known."""

    block: str
    count: int
    fewest: int
    median: float
    most: int
    scarce: tuple[int, ...]
    wanted: int | None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: of its folder, as its configuration has it.
        folder: where it was read.
        finished: whether it came to its end.
        config: its resolved configuration.
        versions: of libraries.
        model: the section ``model``; empty where the run isn't finished.
        blocks: those that are done.
        facts: the other sections, as they are.
        evaluations: what was measured.
        outputs: what was written.
        experts: of each block of a mixture.
        surfaces: the file with activation surfaces, if there is one.
    """

    name: str
    folder: Path
    finished: bool
    config: Plain
    versions: Mapping[str, str]
    model: Plain
    blocks: tuple[BlockRow, ...]
    facts: Plain = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    outputs: tuple[Output, ...] = ()
    experts: tuple[Experts, ...] = ()
    surfaces: Path | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order in which they were applied."""
        quant, sparse = self.config.get("quant") or {}, self.config.get("sparse") or {}
        pruner = [sparse["method"]] if sparse.get("method") else []
        return (*pruner, *quant.get("method", ()))

    @property
    def looked_at(self) -> Plain:
        """Which text the statistics of layers and inputs come from; empty where there are none."""
        return self.facts.get("analysis") or {}

    @property
    def model_name(self) -> str:
        """Last part of the model's path."""
        path = str((self.config.get("model") or {}).get("path") or self.model.get("path") or "model")
        return path.rstrip("/").rpartition("/")[2] or path

    def find(self, kind: str, *positions: str) -> list[Evaluation]:
        """Measured numbers of a kind."""
        return [one for one in self.evaluations if one.kind == kind and (not positions or one.position in positions)]

    @property
    def fallbacks(self) -> list[tuple[int, str, str]]:
        """Block, layer and reason of every Linear that was treated by a simpler method."""
        return [
            (block.number, name, layer.fallback)
            for block in self.blocks
            for name, layer in block.layers.items()
            if layer.fallback
        ]
