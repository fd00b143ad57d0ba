"""The command line: arguments to configuration to run. No logic of its own."""

from __future__ import annotations

import argparse
import errno
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import LlmcError

# Between two collections of garbage. Importing makes a million objects that stay: to look at them after every few
# hundred takes a fifth of the time. A run collects behind every block.
_NEW_OBJECTS = 1_000_000

_DESCRIPTION = """\
Make a large language model small without making it worse: calibrate, compress,
evaluate and export it in one pass, one block at a time."""

_EXAMPLES = """\
examples:
  python -m llmc --config configs/awq/awq_w4a16.yml --dry-run
      show what would be done to every layer, and what it would need
  python -m llmc --config configs/awq/awq_w4a16.yml --set model.path=./my-model --set save.save_path=./out
      run it on another model; keys are those of the YAML file
  python -m llmc --config run.yml
      run it; after a crash or a kill the same command goes on where it was

further commands, each with a --help of its own:
  python -m llmc eval --config run.yml --set eval.type=token_acc
      measure a finished run by what it wrote, without calibrating again
  python -m llmc export --from ./out --to fake
      write another format of a finished run, without calibrating again
  python -m llmc verify ./out/vllm_quant_model --against ./out/fake_quant_model
      look whether a written or fetched folder is whole and holds what it should
  python -m llmc report ./out ./out-2
      compare runs in one HTML page; of one run, write its report again
  python -m llmc sensitivity --config run.yml
      measure what fewer or more bits would do to each layer
  python -m llmc inspect ./my-model
      show the blocks and Linears of a model, what can be done to them, and what can't
  python -m llmc check-data ./prompts.jsonl
      look whether data of your own is what is expected, and what is in it

An error in the configuration or the input ends with code 2 and one message that says what to do."""

_EVAL = """\
Measure a finished run by the section eval of a configuration, from what the run wrote: nothing is calibrated again, and
the numbers are those that the run would have given. A configuration without quant and sparse measures its model as it
is."""

_EXPORT = """\
Write further formats of a finished run, from the codes and scales that it stored: nothing is calibrated again, and the
files are those that the run would have written."""

_VERIFY = """\
Look at a folder of a model, written by llmc or by others: its files, every tensor's name, shape and dtype, scales and
zero points, and, against another folder, the values. Ends with 0 if it's clean, 1 if something was found, and 2 if
it can't be judged."""

_REPORT = """\
Write the report of a run, finished or not, as one HTML file that needs nothing else; of several runs, a page that
compares them."""

_INSPECT = """\
Show a model's blocks, the Linears that share an input, what can absorb a scale of it, and what can't be done and why.
Needs only the model's config.json; no weight is read. Architectures that nobody declared are explored by running their
own code on random weights; those that somebody did are compared with what that finds."""

_CHECK_DATA = """\
Look at a file of texts, prompts, chats or questions of your own, and say what it holds. Ends with 0 if every record is
right, 1 if one isn't, and 2 if the file can't be read."""


_SENSITIVITY = """\
Measure what each layer would lose with each candidate scheme, and write sensitivity.json into save.save_path; nothing
is compressed. quant.mix_bits.budget then chooses by it (quant.mix_bits.from). Interrupted, it starts again."""


def parser() -> argparse.ArgumentParser:
    """The arguments of a run."""
    made = argparse.ArgumentParser(
        "python -m llmc",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file with the sections model, calib, eval, quant, save"
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a value, such as quant.weight.bit=3; may be repeated",
    )
    made.add_argument("--task_id", metavar="NAME", help="name of the run, shown in its summary")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and show the plan, without reading a weight or writing anything",
    )
    made.add_argument("--version", action="version", version=f"llmc {__version__}")
    return made


def eval_parser() -> argparse.ArgumentParser:
    """The arguments of ``eval``."""
    made = argparse.ArgumentParser("python -m llmc eval", description=_EVAL)
    made.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file whose section eval says what to measure"
    )
    made.add_argument(
        "--from", type=Path, dest="run", metavar="RUN", help="save_path of a finished run; default: the configuration's"
    )
    made.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a value"
    )
    made.add_argument("--no-write", action="store_true", help="leave the run's metrics.json as it is")
    return made


def export_parser() -> argparse.ArgumentParser:
    """The arguments of ``export``."""
    made = argparse.ArgumentParser("python -m llmc export", description=_EXPORT)
    made.add_argument("--from", required=True, type=Path, dest="run", metavar="RUN", help="save_path of a finished run")
    made.add_argument(
        "--to",
        required=True,
        nargs="+",
        dest="targets",
        metavar="FORMAT",
        help="keys save_* without save_, such as fake",
    )
    made.add_argument("--model", metavar="FOLDER", help="the original model, if it isn't any more where the run had it")
    return made


def verify_parser() -> argparse.ArgumentParser:
    """The arguments of ``verify``."""
    made = argparse.ArgumentParser("python -m llmc verify", description=_VERIFY)
    made.add_argument("folder", type=Path, metavar="FOLDER", help="a model's folder, or a GGUF file")
    made.add_argument(
        "--against",
        type=Path,
        metavar="MODEL",
        help="compare values and side files: save_fake's folder, or the original",
    )
    made.add_argument("--load", choices=("transformers", "vllm"), help="load it and let it continue a prompt")
    made.add_argument("--text", type=Path, metavar="FILE", help="with --load: measure the perplexity on this text")
    return made


def inspect_parser() -> argparse.ArgumentParser:
    """The arguments of ``inspect``."""
    made = argparse.ArgumentParser("python -m llmc inspect", description=_INSPECT)
    made.add_argument("model", metavar="MODEL", help="a model's folder, or a hub id, org/name or org/name@revision")
    made.add_argument("--trust-remote-code", action="store_true", help="let the model's own Python files run")
    return made


def check_data_parser() -> argparse.ArgumentParser:
    """The arguments of ``check-data``."""
    made = argparse.ArgumentParser("python -m llmc check-data", description=_CHECK_DATA)
    made.add_argument("file", type=Path, metavar="FILE", help=".jsonl, .json or .txt, or a folder with a samples.json")
    return made


def report_parser() -> argparse.ArgumentParser:
    """The arguments of ``report``."""
    made = argparse.ArgumentParser("python -m llmc report", description=_REPORT)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="save_path of a run")
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the HTML file (default: report.html in the run, or comparison.html here)",
    )
    made.add_argument("--plots", type=Path, metavar="FOLDER", help="write the charts as PNG and SVG files too")
    return made


def sensitivity_parser() -> argparse.ArgumentParser:
    """The arguments of ``sensitivity``."""
    made = argparse.ArgumentParser("python -m llmc sensitivity", description=_SENSITIVITY)
    made.add_argument("--config", required=True, metavar="FILE", help="YAML file of a run")
    made.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as in a run")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    gc.set_threshold(_NEW_OBJECTS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name in _COMMANDS:
        make_parser, command = _COMMANDS[name]
        return _guarded(command, make_parser().parse_args(given[1:]))
    return _guarded(_main, parser().parse_args(given))


def _guarded(command: Callable[[Any], int], given: Any) -> int:
    """Errors that are the user's to mend become one message and code 2."""
    try:
        return command(given)
    except LlmcError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        print(f"\nerror: {error}\n  -> mend that; the same command goes on from here", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _main(given: Any) -> int:
    from .budget.budgeting import ready
    from .configuring import load_config
    from .report.console import Console
    from .run import run

    loaded = load_config(given.config, given.overrides)
    console = Console(given.task_id)
    console.warn(loaded.warnings)
    prepared, spending = ready(loaded)
    console.warn(prepared.warnings)
    if given.dry_run:
        decoded = prepared.checkpoint.says
        console.plan(prepared.layers, prepared.estimate, prepared.exporters, prepared.recipe.drop_blocks, decoded)
        if spending is not None:
            console.budget(spending.budget.describe())
        return 0
    with console.progress() as listener:
        result = run(prepared, listener, spending)
    console.summary(result)
    return 0


def _eval(given: Any) -> int:
    from .configuring import load_config
    from .reevaluating import reevaluate
    from .report.console import Console

    loaded = load_config(given.config, given.overrides)
    console = Console()
    console.warn(loaded.warnings)
    with console.progress() as listener:
        done = reevaluate(loaded, given.run, write=not given.no_write, listener=listener)
    console.warn(done.warnings)
    console.evaluated(done)
    return 0


def _export(given: Any) -> int:
    from .exporting import export
    from .report.console import Console

    done = export(given.run, given.targets, given.model)
    console = Console()
    console.warn(done.warnings)
    console.exported(done)
    return 0


def _verify(given: Any) -> int:
    from .report.console import Console
    from .verify import verify

    report = verify(given.folder, given.against, load=given.load, text=given.text)
    Console().verified(report)
    return report.exit_code


def _report(given: Any) -> int:
    from .report.console import Console
    from .report.page import report

    Console().reported(report(given.runs, given.output, given.plots))
    return 0


def _inspect(given: Any) -> int:
    from .inspecting import inspect_model
    from .report.inspection import show

    show(inspect_model(given.model, trust_remote_code=given.trust_remote_code))
    return 0


def _check_data(given: Any) -> int:
    from .data.records import check_records
    from .report.console import Console

    found = check_records(given.file)
    Console().data(found)
    return 1 if found.problems or not found.records else 0


def _sensitivity(given: Any) -> int:
    from .budget.sensing import sensitivity
    from .configuring import load_config
    from .report.console import Console
    from .report.sensitivities import show

    loaded, console = load_config(given.config, given.overrides), Console()
    console.warn(loaded.warnings)
    with console.progress() as listener:
        found, file = sensitivity(loaded, listener.phase)
    show(found, file)
    return 0


_COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[Any], int]]] = {
    "eval": (eval_parser, _eval),
    "export": (export_parser, _export),
    "verify": (verify_parser, _verify),
    "report": (report_parser, _report),
    "inspect": (inspect_parser, _inspect),
    "check-data": (check_data_parser, _check_data),
    "sensitivity": (sensitivity_parser, _sensitivity),
}
