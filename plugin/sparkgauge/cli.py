"""The command ``sparkgauge``: what is asked outside of a pytest session.

Exit status: 0 done, and nothing needs attention; 1 done, and something does (a failed check, a baseline that cannot
be read); 2 not done: bad arguments, or an input that is refused, with one line on standard error saying why;
130 interrupted.

A further command is one entry of :data:`COMMANDS`: how its arguments are declared, and what runs it. Nothing but the
standard library is imported before a command runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkgauge import __version__
from sparkgauge.errors import ConfigurationError, GaugeError

if TYPE_CHECKING:
    from sparkgauge.baselines import Stored

DONE, ATTENTION, REFUSED, INTERRUPTED = 0, 1, 2, 130

_DEFAULT_FOLDER = "baselines"


@dataclass(frozen=True)
class Command:
    """One command: ``declare`` adds its arguments to a parser, ``run`` returns the exit status."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of ``sparkgauge ARGUMENTS`` (the process's own by default)."""
    try:
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except GaugeError as error:
        print(f"sparkgauge: error: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:
        # the reader (head, less) has seen enough; Python must not complain about it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    epilog = "exit status: 0 done; 1 done, and something needs attention; 2 bad arguments or a refused input"
    description = "Looks after the machine and the stored baselines of performance tests; pytest runs the tests."
    parser = argparse.ArgumentParser("sparkgauge", description=description, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"sparkgauge {__version__}")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Command]) -> None:
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in commands.items():
        added = group.add_parser(name, help=command.help, description=command.help)
        added.set_defaults(run=command.run)
        command.declare(added)


def _declare_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="PATH", help="CIFAR-10 as for pytest --gauge-data")
    _declare_json(parser)


def _run_doctor(options: argparse.Namespace) -> int:
    from sparkgauge import doctor

    checks = doctor.examine(doctor.Machine(data=options.data))
    _print([doctor.to_json_text(checks)] if options.json else doctor.to_text(checks))
    return ATTENTION if doctor.worst(checks) == "fail" else DONE


def _declare_selfcheck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=3.0, metavar="M", help="time for the rounds (default: 3)")
    parser.add_argument("--executors", type=int, metavar="N", help="as for pytest --gauge-executors")
    parser.add_argument("--data", metavar="PATH", help="CIFAR-10 as for pytest --gauge-data")
    _declare_json(parser)


def _run_selfcheck(options: argparse.Namespace) -> int:
    from sparkgauge import selfcheck, selfcheck_rounds
    from sparkgauge.records import to_json

    settings = selfcheck_rounds.Settings(options.minutes, options.executors, options.data)
    check = selfcheck_rounds.run(settings, sys.stderr)
    _print([json.dumps(to_json(check), indent=2)] if options.json else selfcheck.to_text(check))
    return DONE if check.is_trustworthy else ATTENTION


def _declare_install_caffe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--apt", action="store_true", help="install missing Debian packages first (as root)")
    parser.add_argument("--source", type=Path, metavar="FILE", help="a source distribution that is here already")
    parser.add_argument("--rebuild", action="store_true", help="build although the user's cache has the wheel")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def _run_install_caffe(options: argparse.Namespace) -> int:
    from sparkgauge.caffe import build

    build.install(apt=options.apt, source=options.source, rebuild=options.rebuild, quiet=options.quiet)
    return DONE


def _declare_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports",
        nargs="*",
        type=Path,
        metavar="REPORT",
        help="files that pytest --gauge-report wrote; none: 2017 only",
    )
    parser.add_argument("--markdown", action="store_true", help="print it in Markdown")
    parser.add_argument(
        "--price", metavar="DEVICE=PRICE/h,...", help="add cost and break-even, as pytest --gauge-price does"
    )


def _run_table(options: argparse.Namespace) -> int:
    from sparkgauge import config
    from sparkgauge.report import gpu_lines, reference

    prices = config.prices(options.price, "--price") if options.price else {}
    runs = reference.read_reports(options.reports)
    table = reference.reference_table(runs)
    _print(reference.markdown_lines(table) if options.markdown else reference.text_lines(table))
    notes = [*gpu_lines.gpu_lines(runs), *gpu_lines.price_lines(runs, prices), *reference.software_lines(runs)]
    if notes:
        _print(["", "```text", *notes, "```"] if options.markdown else ["", *notes])
    return DONE


def _declare_baselines(parser: argparse.ArgumentParser) -> None:
    _add_commands(parser, BASELINE_COMMANDS)


def _declare_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tests", nargs="*", metavar="TEST", help="test id, function or pattern; all by default")
    _declare_folder(parser)
    _declare_narrowing(parser)
    _declare_stale(parser)
    _declare_json(parser)


def _run_list(options: argparse.Namespace) -> int:
    from sparkgauge.report import baseline_text

    stored, broken = _stored(options)
    chosen = _chosen(stored, options.tests) if options.tests else stored
    if options.json:
        _print_json(baseline_text.list_json(chosen, _now(), options.stale_days))
    else:
        _print(baseline_text.list_lines(chosen, _now(), options.stale_days) or [f"no baselines in {options.baselines}"])
    return _complain(broken)


def _declare_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", metavar="FILE|TEST", help="a baseline file, or a test id, function or pattern")
    _declare_folder(parser)
    _declare_narrowing(parser)
    _declare_stale(parser)
    _declare_json(parser)


def _run_show(options: argparse.Namespace) -> int:
    from sparkgauge.records import to_json
    from sparkgauge.report import baseline_text

    found = _named(options, options.baseline)
    if options.json:
        _print_json([{"file": str(one.path), **to_json(one.baseline)} for one in found])
        return DONE
    for index, one in enumerate(found):
        _print(([""] if index else []) + baseline_text.show_lines(one, _now(), options.stale_days))
    return DONE


def _declare_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="A", help="a baseline file, or a test id, function or pattern")
    parser.add_argument(
        "new", metavar="B", nargs="?", help="another one; without it A is compared with the generation before it"
    )
    _declare_folder(parser)
    _declare_narrowing(parser)
    _declare_json(parser)


def _run_diff(options: argparse.Namespace) -> int:
    from sparkgauge.report import baseline_text
    from sparkgauge.store import generations

    first = _single(options, options.old)
    if options.new is not None:
        second = _single(options, options.new)
        old, new, names = first.baseline, second.baseline, (str(first.path), str(second.path))
    else:
        past = generations(first.baseline)
        if len(past) < 2:
            raise ConfigurationError(
                "Nothing to compare with: the baseline has no earlier generation", where=str(first.path)
            )
        old, new = past[-2], past[-1]
        names = (f"{first.path}, approved {old.approved.when}", f"{first.path}, approved {new.approved.when}")
    if options.json:
        _print_json({"old": names[0], "new": names[1], **baseline_text.diff_json(old, new)})
    else:
        _print(baseline_text.diff_lines(old, new, names))
    return DONE


def _declare_approve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tests", nargs="+", metavar="TEST", help="test id, function or pattern, as in the report")
    parser.add_argument("--why", required=True, metavar="REASON", help="kept in the file; must not be empty")
    parser.add_argument(
        "--from", dest="report", type=Path, required=True, metavar="REPORT", help="a file that --gauge-report wrote"
    )
    parser.add_argument("--force", action="store_true", help="approve although the test failed or cannot be compared")
    _declare_folder(parser)


def _run_approve(options: argparse.Namespace) -> int:
    from sparkgauge import baselines
    from sparkgauge.report import baseline_text
    from sparkgauge.store import BaselineStore

    approved = baselines.approval(options.why)
    report = baselines.read_report(options.report)
    known = [run.test_id for run in report.runs]
    tests = [test for wanted in options.tests for test in _matching(known, wanted, str(options.report))]
    written = baselines.approve(BaselineStore(options.baselines), report, tests, approved, force=options.force)
    for one in written:
        _print([*baseline_text.replacement_lines(one), f"  written: {baseline_text.shown_path(one.path)}"])
    return DONE


def _declare_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "listing",
        nargs="?",
        default="-",
        metavar="FILE",
        help="output of `pytest --collect-only -q`, or test ids one a line; standard input by default",
    )
    parser.add_argument("--yes", action="store_true", help="remove the files; without it they are only named")
    parser.add_argument(
        "--complete", action="store_true", help="the listing is of the whole suite: what is not on it is gone"
    )
    parser.add_argument(
        "--root", type=Path, default=Path(), metavar="DIR", help="pytest's root folder (default: the current one)"
    )
    _declare_folder(parser)


def _run_prune(options: argparse.Namespace) -> int:
    from sparkgauge import baselines
    from sparkgauge.report.baseline_text import shown_path

    collected = baselines.parse_listing(_read_listing(options.listing))
    stored, broken = baselines.stored_in(options.baselines)
    gone, unknown = baselines.vanished(stored, collected, options.root, complete=options.complete)
    if options.yes:
        baselines.remove(gone)
    verb = "removed" if options.yes else "would remove"
    _print(f"{verb} {shown_path(one.path)}: no test {one.baseline.test_id}" for one in gone)
    _print(f"kept {shown_path(one.path)}: its test file is there and was not listed" for one in unknown)
    done = "nothing was removed; --yes removes them" if gone and not options.yes else "done"
    count = f"{len(stored)} baseline{'' if len(stored) == 1 else 's'}"
    _print([f"{count}, {len(gone)} without a test; {done}"])
    return _complain(broken)


def _declare_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baselines",
        type=Path,
        default=Path(_DEFAULT_FOLDER),
        metavar="DIR",
        help=f"folder of the stored baselines (default: {_DEFAULT_FOLDER})",
    )


def _declare_narrowing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", metavar="NAME", help="only baselines of this profile")
    parser.add_argument("--hardware-class", metavar="NAME", help="only baselines of this hardware class")


def _declare_stale(parser: argparse.ArgumentParser) -> None:
    # a literal: the constant lives where scipy is not far, and the parser must be built at once
    parser.add_argument(
        "--stale-days", type=_days, default=90.0, metavar="N", help="age from which a baseline is stale (default: 90)"
    )


def _declare_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _days(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


_days.__name__ = "number of days"  # argparse names it in its message


def _stored(options: argparse.Namespace) -> tuple[list[Stored], list[Any]]:
    """Return the baselines in the folder that the options narrow down to, and what cannot be read."""
    from sparkgauge.baselines import stored_in

    stored, broken = stored_in(options.baselines)
    wanted = {"profile": options.profile, "hardware_class": options.hardware_class}
    for one in list(stored):
        has = {"profile": one.baseline.profile, "hardware_class": one.baseline.environment.hardware_class}
        if any(value is not None and has[name] != value for name, value in wanted.items()):
            stored.remove(one)
    return stored, broken


def _named(options: argparse.Namespace, name: str) -> list[Stored]:
    """Return the baseline in the file ``name``, or those of the tests it names; one error for neither."""
    from sparkgauge.baselines import Stored
    from sparkgauge.store import BaselineStore

    if name.endswith(".json") or Path(name).is_file():
        baseline = BaselineStore(options.baselines).read(Path(name))
        if baseline is None:
            raise ConfigurationError("No such baseline file", actual=repr(name))
        return [Stored(Path(name), baseline)]
    stored, broken = _stored(options)
    _complain(broken)
    return _chosen(stored, [name])


def _single(options: argparse.Namespace, name: str) -> Stored:
    found = _named(options, name)
    if len(found) > 1:
        raise ConfigurationError(
            "More than one baseline fits",
            expected="a file, or a test with --profile and --hardware-class",
            actual=", ".join(str(one.path) for one in found),
        )
    return found[0]


def _chosen(stored: Sequence[Stored], wanted: Iterable[str]) -> list[Stored]:
    known = [one.baseline.test_id for one in stored]
    ids = {test for name in wanted for test in _matching(known, name, "the stored baselines")}
    return [one for one in stored if one.baseline.test_id in ids]


def _matching(known: Sequence[str], wanted: str, where: str) -> list[str]:
    from sparkgauge.baselines import matching

    found = matching(known, wanted)
    if not found:
        some = sorted(set(known))
        expected = ", ".join(some[:5]) + (f" or {len(some) - 5} more" if len(some) > 5 else "")
        raise ConfigurationError(
            "No such test", expected=f"one of {expected}" if some else None, actual=repr(wanted), where=where
        )
    return found


def _read_listing(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError("Cannot read the listing", actual=reason, where=name) from error


def _complain(broken: Sequence[object]) -> int:
    for error in broken:
        print(f"sparkgauge: {error}", file=sys.stderr)
    return ATTENTION if broken else DONE


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


BASELINE_COMMANDS: dict[str, Command] = {
    "list": Command("list the stored baselines: test, quantities, who, when, age", _declare_list, _run_list),
    "show": Command("show one baseline: samples, machine, phases, history", _declare_show, _run_show),
    "diff": Command("compare two baselines, or one with the generation before it", _declare_diff, _run_diff),
    "approve": Command("make runs of a report the baselines of their tests", _declare_approve, _run_approve),
    "prune": Command("remove baselines whose tests no longer exist", _declare_prune, _run_prune),
}

COMMANDS: dict[str, Command] = {
    "doctor": Command("examine this machine before a measured run", _declare_doctor, _run_doctor),
    "selfcheck": Command("find out how often the gate errs on this machine", _declare_selfcheck, _run_selfcheck),
    "baselines": Command("look after the stored baselines", _declare_baselines, lambda options: DONE),
    "table": Command("the rows of the 2017 report beside today's runs", _declare_table, _run_table),
    "install-caffe": Command(
        "build the real Caffe with its Python interface, once, and install it",
        _declare_install_caffe,
        _run_install_caffe,
    ),
}
"""The commands of ``sparkgauge``; another one is one more entry."""


if __name__ == "__main__":
    sys.exit(main())
