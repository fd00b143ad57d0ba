"""What a person sees while a run goes on and when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..eval.results import Generated, TaskScore, side_by_side
from .evaluations import facts as evaluation_facts
from .evaluations import line as evaluation_line
from .experts import collapsed, fallbacks

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.records import Found
    from ..eval.measure import Evaluated
    from ..export import Exporter, Layer
    from ..exporting import Exported
    from ..plan import Estimate
    from ..reevaluating import Reevaluated
    from ..run import Result
    from ..verify import Report


_MOST_FINDINGS = 40


def human(size: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 05 s`` or ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _size(original: int, output: Mapping[str, Any]) -> str:
    """Size of a written folder, beside the original's weights, and the bits of a weight in its files."""
    size, bits = output["bytes"], output["bits_per_weight"]
    if bits is None:
        return human(size)
    return f"{human(original)} -> {human(size)} ({size / original:.0%}), {bits:.2f} bits per weight overall"


def _alike(layers: Sequence[Layer]) -> list[tuple[str, Layer]]:
    """Rows of a table: experts of which the same becomes are one, with all their numbers."""
    kinds: dict[tuple[int, int, str], dict[str, Layer]] = {}
    for layer in layers:
        kinds.setdefault((layer.rows, layer.columns, layer.describe()), {})[layer.name] = layer
    rows = {members[0]: name for kind in kinds.values() for name, members in collapsed(kind).items()}
    return [(rows[layer.name], layer) for layer in layers if layer.name in rows]


class ProgressListener:
    """Shows the pass over the blocks; on a terminal as a bar, in a log as a line now and then."""

    def __init__(self, rich: Rich, bar: Progress) -> None:
        self._rich, self._bar = rich, bar
        self._task = bar.add_task("reading", total=None)
        self._blocks = 0

    def started(self, blocks: int, done: int) -> None:
        """The pass begins."""
        self._blocks = blocks
        self._bar.update(self._task, total=blocks, completed=done)
        if done:
            self._rich.print(f"resuming: {done} of {blocks} blocks were written before")

    def block(self, index: int, row: Mapping[str, Any]) -> None:
        """A block is finished."""
        self._bar.update(self._task, completed=index + 1)
        if not self._rich.is_terminal and (index + 1) % max(1, self._blocks // 10) == 0:
            error = "" if row.get("error") is None else f", relative error {row['error']:.2e}"
            self._rich.print(f"block {index + 1}/{self._blocks}: {row['seconds']:.1f} s{error}")
        for line in fallbacks(row):
            self._rich.print(f"[yellow]warning:[/] {line}")
        if row["tuning"] is not None and row["tuning"]["stopped"]:
            self._rich.print(f"[yellow]warning:[/] {row['unit']}: {row['tuning']['stopped']}; kept the best before it")

    def phase(self, text: str) -> None:
        """What is going on now."""
        self._bar.update(self._task, description=text)


class Console:
    """Prints; ``task`` is the run's name, if it has one."""

    def __init__(self, task: str | None = None) -> None:
        self._rich = Rich(highlight=False, soft_wrap=True)
        self._task = task

    def warn(self, warnings: Sequence[str]) -> None:
        """One line each."""
        for warning in dict.fromkeys(warnings):
            self._rich.print(f"[yellow]note:[/] {warning}", markup=True)

    @contextmanager
    def progress(self) -> Iterator[ProgressListener]:
        """A bar while the context lasts."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._rich, disable=not self._rich.is_terminal) as bar:
            yield ProgressListener(self._rich, bar)

    def plan(
        self,
        layers: Sequence[Layer],
        estimate: Estimate,
        exporters: Sequence[Exporter],
        drop_blocks: int = 0,
        decoded: str = "",
    ) -> None:
        """What a dry run found out; ``decoded`` says what is made dense as it's read."""
        table = Table("layer", "out x in", "scheme", box=None, pad_edge=False)
        for name, layer in _alike(layers):
            scheme = layer.describe() or "[yellow]kept[/]"
            table.add_row(name, f"{layer.rows} x {layer.columns}", scheme)
        self._rich.print(table)
        schemes = Counter(layer.describe() or "kept" for layer in layers)
        self._rich.print("\n[bold]Plan[/]" + (f" {self._task}" if self._task else ""))
        self._facts(
            {
                **({"input": decoded} if decoded else {}),
                "layers": "; ".join(f"{count} x {scheme}" for scheme, count in schemes.items()),
                **({"dropped": f"{drop_blocks} blocks, which ones the run finds out"} if drop_blocks else {}),
                "left alone": "embeddings, norms, routers, head: they are never quantized or pruned",
                "exports": ", ".join(f"{e.name} (checked)" for e in exporters) or "none",
                "read": human(estimate.read),
                "disk": f"about {human(estimate.disk)}",
                "host memory": f"about {human(estimate.host)}",
                **({"device memory": f"about {human(estimate.device)}"} if estimate.device else {}),
            }
        )

    def budget(self, text: str) -> None:
        """What schemes are, or will be, chosen out of."""
        self._facts({"budget": text})

    def summary(self, result: Result) -> None:
        """The numbers of a finished run, and where things are."""
        metrics = result.metrics
        self.warn(result.warnings)
        self._evaluations(result.evaluations)
        self.answers(result.answers)
        self._rich.print("\n[bold green]Done[/]" + (f" {self._task}" if self._task else ""))
        facts: dict[str, str] = {}
        if metrics["model"]["input"] is not None:
            facts["input"] = metrics["model"]["input"]
        original = metrics["model"]["bytes"]
        for name, output in result.outputs.items():
            facts[f"size ({name})"] = _size(original, output)
        if metrics["kv_scheme"] is not None:
            facts["bits per key and value"] = f"{metrics['kv_scheme']['bits_per_element']:.2f} in the KV cache"
        if metrics["bits_per_weight"] is not None:
            facts["bits per weight"] = f"{metrics['bits_per_weight']:.2f} in the quantized layers"
        if (budget := metrics["bit_budget"]) is not None:
            for name, setting in budget["mix_bits"].items():
                facts[f"chosen ({name})"] = ", ".join(setting["layer_name"])
            facts["expected loss"] = f"{budget['loss']:.4g} nats per token; metrics.json has the choice as YAML"
        if metrics["encoder"] is not None:
            last = metrics["encoder"]["blocks"][-1]["error"]
            told = "" if last is None else f", relative error {last:.2e} behind the last"
            facts["image encoder"] = f"{len(metrics['encoder']['blocks'])} blocks compressed{told}"
        if (surveyed := metrics["blocks_dropped"]) is not None:
            dropped = [f"{index} ({surveyed['influence'][index]:.3f})" for index in surveyed["dropped"]]
            kept = metrics["model"]["blocks"] - len(dropped)
            facts["blocks"] = f"{kept} of {metrics['model']['blocks']} kept"
            facts["dropped (influence)"] = ", ".join(dropped)
        if metrics["sparsity"] is not None:
            facts["sparsity"] = f"{metrics['sparsity']['mean']:.2%} of the weights in the pruned layers are zero"
        facts |= evaluation_facts(result.evaluations)
        facts["time"] = duration(metrics["seconds"])
        facts["peak memory"] = human(metrics["peak_host_bytes"])
        if metrics["peak_device_bytes"]:
            facts["peak device memory"] = human(metrics["peak_device_bytes"])
        if scarce := sum(len(one["solved_with_all_tokens"]) for one in metrics["experts"]):
            count = sum(one["experts"] for one in metrics["experts"])
            facts["experts"] = f"{scarce} of {count} saw few calibration tokens and were solved with those of all"
        if metrics["fallbacks"]:
            facts["fallbacks"] = f"{len(metrics['fallbacks'])} layers were rounded or pruned plainly, see metrics.json"
        for name, output in result.outputs.items():
            facts[f"written ({name})"] = f"{output['folder']} (read back and compared: equal)"
        if result.save_path is not None:
            facts["all numbers"] = str(result.save_path / "metrics.json")
        if result.report is not None:
            facts["report"] = str(result.report)
        for name, output in result.outputs.items():
            facts[f"use ({name})"] = output["serve"]
        self._facts(facts)

    def answers(self, answers: Sequence[TaskScore | Generated]) -> None:
        """A line for each score, and texts below their prompts."""
        scores = [one.line for one in answers if isinstance(one, TaskScore)]
        for line in (*scores, *side_by_side([one for one in answers if isinstance(one, Generated)])):
            self._rich.print(line, markup=False)

    def evaluated(self, done: Reevaluated) -> None:
        """What was measured of a finished run, or of a model as it came."""
        self._evaluations(done.evaluations)
        self.answers(done.answers)
        self._rich.print("\n[bold green]Done[/]")
        written = {} if done.written is None else {"all numbers": str(done.written)}
        times = {"time": duration(done.seconds), "peak memory": human(done.peak_host)}
        self._facts(evaluation_facts(done.evaluations) | times | written)

    def _evaluations(self, evaluated: Sequence[Evaluated]) -> None:
        for one in evaluated:
            self._rich.print(evaluation_line(one), markup=False)

    def exported(self, done: Exported) -> None:
        """What was made from a finished run."""
        self._rich.print("\n[bold green]Done[/]")
        facts = {"codes and scales": f"{done.source} (read, not computed again)"}
        for name, output in done.outputs.items():
            facts[f"size ({name})"] = _size(done.original_bytes, output)
            facts[f"written ({name})"] = f"{output['folder']} (read back and compared: equal)"
            facts[f"use ({name})"] = output["serve"]
        self._facts(facts)

    def reported(self, written: Sequence[Path]) -> None:
        """The files of a report."""
        for file in written:
            self._rich.print(f"written: {file}", markup=False)

    def verified(self, report: Report) -> None:
        """What was looked at, and each finding on a line of its own."""
        for checked in report.checked:
            self._rich.print(f"  {checked}", markup=False)
        for note in report.notes:
            self._rich.print(f"  note: {note}", markup=False)
        for finding in report.findings[:_MOST_FINDINGS]:
            self._rich.print(f"FOUND {finding}", markup=False)
        more = len(report.findings) - _MOST_FINDINGS
        if more > 0:
            self._rich.print(f"... and {more} more")
        if report.findings:
            count = len(report.findings)
            self._rich.print(f"\n[bold red]{count} finding{'s' * (count > 1)}[/]")
        elif report.unjudged:
            self._rich.print(f"\n[bold yellow]can't be judged:[/] {escape(report.unjudged)}")
        else:
            self._rich.print("\n[bold green]clean[/]")

    def data(self, found: Found) -> None:
        """What a file of records holds, and each problem on a line of its own."""
        for problem in found.problems[:_MOST_FINDINGS]:
            self._rich.print(f"FOUND {problem}", markup=False)
        if len(found.problems) > _MOST_FINDINGS:
            self._rich.print(f"... and {len(found.problems) - _MOST_FINDINGS} more")
        further = ", ".join(f"{name} ({count})" for name, count in sorted(found.further.items()))
        self._facts(
            {
                "file": str(found.file),
                "records": ", ".join(f"{count} {kind}" for kind, count in found.records.items()) or "none",
                "text": f"{found.characters} characters",
                **({"not read": further} if further else {}),
                **({"wrong": f"{len(found.problems)} records"} if found.problems else {}),
            }
        )

    def _facts(self, facts: Mapping[str, str]) -> None:
        width = max(map(len, facts), default=0)
        for key, value in facts.items():
            self._rich.print(f"  {key:<{width}}  {value}", markup=False)
