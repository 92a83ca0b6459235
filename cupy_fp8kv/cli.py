"""The command line: arguments and exit codes. What a command does is in the module it imports."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, terminal
from .formats import KV_FORMATS
from .jit.compiler import ARCHITECTURES
from .jit.covering import ALIKE, SETS

INTERRUPTED = 130
_EXIT_CODES = "exit codes: 0 all is well, 1 a failure (wrong result, compile error, spill, no GPU), 2 usage, 130 Ctrl-C"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("cupy_fp8kv: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has gone; closing stdout at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (terminal.CommandError, RuntimeError, OSError, MemoryError) as error:
        print(f"cupy_fp8kv: {error or type(error).__name__}", file=sys.stderr)
        return 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _architectures(text: str) -> list[int]:
    archs = []
    for name in text.split(","):
        digits = name.strip().removeprefix("sm_")
        if not digits.isdigit() or int(digits) < 80:
            raise argparse.ArgumentTypeError(f"expected architectures from sm_80 on like sm_80,sm_90, got {name!r}")
        archs.append(int(digits))
    return archs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cupy_fp8kv", description="Attention over FP8 KV caches: try it, look at it, measure it.",
        epilog=_EXIT_CODES,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"cupy_fp8kv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, help: str, description: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  python -m cupy_fp8kv {name} {example}".rstrip() for example in examples)
        made = commands.add_parser(
            name, help=help, description=description, epilog=f"examples:\n{lines}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(run=run, parser=made)
        return made

    demo = command(
        "demo", _demo, "run the field's example on what this machine has",
        "Decodes one batch over a quantised cache, on the GPU if there is one and in NumPy otherwise, and holds the\n"
        "result against float64, on the same bytes and on the values before they were quantised.",
        "", "--backend numpy --batch 2 --kv-len 300", "--num-kv-heads 8 --kv-len 8192 --kv-format e5m2",
    )  # fmt: skip
    demo.add_argument("--backend", choices=("cuda", "numpy"), help="force one (default: cuda where there is a GPU)")
    for name, default, what in (
        ("batch", 16, "requests"), ("kv-len", 1024, "rows of each cache"), ("num-qo-heads", 32, "query heads"),
        ("num-kv-heads", 32, "cache heads"), ("head-dim", 128, "a multiple of 16 up to 256"),
    ):  # fmt: skip
        demo.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{what} (default {default})")
    demo.add_argument("--kv-format", choices=tuple(KV_FORMATS), default="e4m3", help="of K and V (default e4m3)")

    info = command(
        "info", _info, "versions, devices, folders, and what is wrong",
        "Shows what this machine has as far as the package cares, what is wrong with it and how to mend that.",
        "", "--json",
    )  # fmt: skip
    info.add_argument("--json", action="store_true", help="the same as JSON")

    everything = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
    alike = ", ".join(f"{chosen} for sm_{arch} (like sm_{other})" for arch, (other, chosen) in ALIKE.items())
    compile_ = command(
        "compile", _compile, "compile kernels for any architecture, without a GPU",
        "Compiles specialisations with NVRTC and shows what each takes: registers, spills, stack, shared memory.\n"
        "Fails if one does not compile or spills registers. Nothing is kept.",
        "", "--arch sm_90 --set all-formats", "--arch sm_80,sm_90 --match 'd=128 columns=8'",
    )  # fmt: skip
    compile_.add_argument(
        "--arch", type=_architectures, default=list(ARCHITECTURES), metavar="LIST", help=f"default {everything}"
    )
    compile_.add_argument(
        "--set", choices=tuple(SETS),
        help="which specialisations: the common ones and pairs of all properties (covering), those of them that may "
        "convert FP8 (conversions), what planners choose for E4M3 at common head dimensions (defaults), all pairs of "
        f"formats, all head dimensions, or what tune may choose (options); default covering, but {alike}",
    )  # fmt: skip
    compile_.add_argument("--match", metavar="TEXT", default="", help="only those whose printed form contains TEXT")
    compile_.add_argument("--quiet", action="store_true", help="list only those that fail")
    compile_.add_argument("--json", type=Path, metavar="FILE", help="write a record")

    bench = command(
        "bench", _bench, "the speed table, against the read limit (needs a GPU)",
        "Times decode calls next to kernels that only read the same bytes, in the same run, and next to other systems\n"
        "that can be imported: torch's SDPA, FlashInfer, vLLM's kernels. Each of those runs in a process of its own.\n"
        "Operations on caches (suite cache) are timed next to a copy of as many bytes.",
        "", "--suite decode --shapes gqa4,mha.b1 --quick", "--suite ragged --peers torch,fi --json ragged.json",
        "--from ragged.json --plot ragged.png", "--suite paged --shapes gqa4.b64 --peers fi",
        "--suite cache --shapes append,merge", "--suite start",
    )  # fmt: skip
    bench.add_argument(
        "--suite", choices=("decode", "ragged", "small", "formats", "paged", "cache", "start"), default="decode",
        help="large batches (decode, the default), lengths that differ (ragged), single requests (small), formats with "
        "layouts, scales and groups (formats), caches in pages that lie in random order (paged), what writes, moves, "
        "merges and shares parts of caches (cache), or the time from starting Python to the first result (start)",
    )  # fmt: skip
    bench.add_argument(
        "--shapes", metavar="PREFIXES", default="", help="only shapes (or operations) whose names start so: a,b,…"
    )
    bench.add_argument(
        "--peers", metavar="PREFIXES", default="",
        help="only peers whose names start so, or none (default: all that are installed; torch's SDPA if torch is)",
    )  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="without peers and the comparison with an fp16 cache")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    bench.add_argument("--from", dest="source", type=Path, metavar="FILE", help="show a record instead of measuring")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the fractions of the limit; needs matplotlib")
    bench.add_argument("--markdown", action="store_true", help="print the table as Markdown")

    tune = command(
        "tune", _tune, "find the fastest plan for a problem on this GPU, and keep it",
        "Times every sensible plan for decode calls of a kind, on caches of its own, and keeps the fastest on disk\n"
        "beside the compiled kernels. Such calls use it from then on, until the package or its kernels change.",
        "--batch 16 --kv-len 4096 --num-qo-heads 32 --num-kv-heads 8", "--kv-len 131072 --no-save --json tuned.json",
        "--clear",
    )  # fmt: skip
    for name, default, what in (
        ("batch", 1, "requests"), ("kv-len", 8192, "rows of each cache"), ("num-qo-heads", 32, "query heads"),
        ("num-kv-heads", 8, "cache heads"), ("head-dim", 128, "a multiple of 16 up to 256"),
    ):  # fmt: skip
        tune.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"{what} (default {default})")
    tune.add_argument("--kv-format", choices=tuple(KV_FORMATS), default="e4m3", help="of K and V (default e4m3)")
    tune.add_argument("--kv-layout", choices=("NHD", "HND"), default="NHD", help="default NHD")
    tune.add_argument("--q-format", choices=("f16", "bf16"), default="f16", help="of q and the result (default f16)")
    tune.add_argument("--no-save", action="store_true", help="only show what would be kept")
    tune.add_argument("--clear", action="store_true", help="remove all tuned plans instead; needs no GPU")
    tune.add_argument("--json", type=Path, metavar="FILE", help="write a record")

    study = command(
        "study", _study, "the planner against an exhaustive search, on random shapes (needs a GPU)",
        "Searches random shapes (batches, lengths, heads, head dims, groups) of 4 MB to 1 GB as tune does, keeping\n"
        "nothing, and shows what the planner's choice loses against the best plan: each, the median, and the worst.\n"
        "All kernels are compiled first. A line on stderr tells of each shape when it is done.",
        "", "--seed 3 --count 10 --seconds 60 --json study.json",
    )  # fmt: skip
    study.add_argument("--seed", type=int, default=0, metavar="N", help="of the shapes (default 0)")
    study.add_argument("--count", type=_positive, default=40, metavar="N", help="shapes (default 40)")
    study.add_argument(
        "--seconds", type=_positive, default=240, metavar="N",
        help="no shape is begun after so long; what is left out is said (default 240)",
    )  # fmt: skip
    study.add_argument(
        "--json", type=Path, metavar="FILE", help="write a record with the time of every plan, anew after each shape"
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    try:
        example = demo.example(
            options.batch, options.kv_len, options.num_qo_heads, options.num_kv_heads, options.head_dim,
            options.kv_format,
        )  # fmt: skip
    except ValueError as error:
        options.parser.error(str(error))
    return demo.run(example, options.backend)


def _info(options: argparse.Namespace) -> int:
    from . import info

    facts = info.gather()
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        console = terminal.console()
        for part in info.render(facts):
            console.print(part)
    return 0


def _compile(options: argparse.Namespace) -> int:
    from . import offline

    jobs = offline.jobs(options.set, options.arch, options.match)
    if not jobs:
        of_set = f"of set {options.set}" if options.set else "compiled by default"
        options.parser.error(f"--match: no specialisation {of_set} contains {options.match!r}")
    reports, seconds = offline.compile_all(jobs)
    terminal.console().print(offline.render(reports, options.arch, seconds, options.quiet))
    for report in reports:
        if report.error:
            print(f"\n{report.spec} for sm_{report.arch}:\n{report.error}", file=sys.stderr)
    if options.json:
        terminal.write_json(options.json, offline.record(reports, seconds))
    return 1 if any(offline.is_bad(report) for report in reports) else 0


def _bench(options: argparse.Namespace) -> int:
    from .bench import command

    return command.run(options)


def _tune(options: argparse.Namespace) -> int:
    from .bench.suites import Shape
    from .jit.device import cupy_problem
    from .tuning import report, study

    if options.clear:
        print(report.clear())
        return 0
    shape = Shape(
        "tune", options.batch, options.kv_len, options.num_qo_heads, options.num_kv_heads, options.head_dim,
        options.q_format, options.kv_format, options.kv_format, options.kv_layout,
    )  # fmt: skip
    try:
        study.problem_of(shape)
    except ValueError as error:
        options.parser.error(str(error))
    if problem := cupy_problem():
        raise terminal.CommandError(f"tune needs a GPU: {problem}")
    result = report.run(shape, save=not options.no_save)
    for part in report.render(result):
        terminal.console().print(part)
    if options.json:
        terminal.write_json(options.json, result.record())
    return 0


def _study(options: argparse.Namespace) -> int:
    from .jit.device import cupy_problem
    from .tuning import study

    if problem := cupy_problem():
        raise terminal.CommandError(f"study needs a GPU: {problem}")

    def keep(found: study.Study) -> None:
        if options.json:
            terminal.write_json(options.json, study.record(found))

    terminal.console().print(study.render(study.run(options.seed, options.count, options.seconds, keep)))
    return 0
