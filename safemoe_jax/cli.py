"""The command line: `safemoe VERB`.

Exit codes: 0 done; 1 failed; 2 the user's mistake, in one line; 75 interrupted, saved, run again.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from safemoe_jax.planning.flags import add_plan
from safemoe_jax.serving import verbs
from safemoe_jax.training.flags import add_recording, recording_of

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 75

VERBS = {
    "fetch": "bring base model and corpora to this machine",
    "data": "build and pack the corpora; --show N prints rows with the loss mask coloured",
    "train-experts": "stage one: one LoRA expert per harm domain",
    "train-gate": "stage two: the router; writes the bundle",
    "evaluate": "compare the systems on held-out prompts",
    "report": "write the report of evaluated runs, or draw it again from its report.json",
    "run": "all of it, from where it was left",
    "plan": "what an experiment needs on a TPU slice, by the real compiler; needs no TPU",
    "sweep": "run an experiment at many points; resumes, and ends with a table and a plot",
    "generate": "answer prompts with a bundle",
    "chat": "talk with a bundle in the terminal, its gates in view",
    "serve": "an OpenAI-compatible server for a bundle, on this machine unless told otherwise",
    "export": "write a bundle for PEFT, merged into the base (both ungated), or gated for torch",
    "import": "make LoRA adapters trained elsewhere the experts that a gate is trained on",
}
# What verbs of an experiment take besides.
_MORE_USAGE = {
    "data": " [--show N]",
    "evaluate": " [--export-for-humans N] [--import-humans FILE]",
    "report": (
        " [--full | --no-texts]"
        "\n       safemoe report --runs DIR [DIR ...] [--out DIR] [--full | --no-texts]"
        "\n       safemoe report --results report.json [--out DIR]"
    ),
}
# Once interrupted, these have nothing to go on from.
_KEEP_NOTHING = ("report", "plan", "generate", "chat", "serve", "export", "import")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    # Outside a training loop, which saves first, SIGTERM ends a verb as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(arguments, rest)
    except KeyboardInterrupt:
        keeps = arguments.verb not in _KEEP_NOTHING
        remedy = "; the same command goes on from what is done" if keeps else ""
        return _say(f"interrupted{remedy}", EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


def entry() -> NoReturn:
    """The console command.

    A save that failed can leave a thread of Orbax behind that waits ten minutes for what will not
    come. The process does not: its message is said, and who started it wants the exit code.
    """
    # That torch is not installed is no news: only tokenizers and configs are wanted.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    code = main()
    left = [one for one in threading.enumerate() if type(one).__module__.startswith("orbax.")]
    if code and left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    # Imported here, so that --help and a mistyped verb need not wait for JAX.
    from safemoe_jax.errors import (
        Unreachable,
        UserError,
        refused_by_the_machine,
        without_echoes,
    )
    from safemoe_jax.parallel.hosts import set_up_jax
    from safemoe_jax.queues import Unfinished
    from safemoe_jax.training.interruption import Interrupted
    from safemoe_jax.training.observer import Diverged

    sys.unraisablehook = without_echoes
    try:
        if arguments.verb == "plan":
            _plan(arguments, rest)
            return 0
        if arguments.verb == "report" and arguments.config is None:
            return _report(arguments, rest)  # it needs no device, and no other host
        set_up_jax()
        others = {
            "generate": _generate,
            "chat": _chat,
            "serve": _serve,
            "export": _export,
            "import": _import,
            "sweep": _sweep,
        }
        others.get(arguments.verb, _experiment_verb)(arguments, rest)
    except (Diverged, Unfinished, Unreachable) as error:
        return _say(error, EXIT_FAILED)
    except UserError as error:
        return _say(error, EXIT_USER)
    except Interrupted as error:
        return _say(error, EXIT_INTERRUPTED)
    except Exception as error:
        if (message := refused_by_the_machine(error)) is None:
            raise  # a fault of this package keeps its traceback
        return _say(message, EXIT_FAILED)
    return 0


def _say(message: object, exit_code: int) -> int:
    print(f"safemoe: {message}", file=sys.stderr)
    return exit_code


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"safemoe: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="safemoe",
        description="SafeMoE: dynamic safety routing over LoRA experts of unsafe knowledge.",
        allow_abbrev=False,
    )
    own = {
        "plan": add_plan,
        "sweep": _add_sweep,
        "generate": verbs.add_generate,
        "chat": verbs.add_chat,
        "serve": verbs.add_serve,
        "export": _add_export,
        "import": _add_import,
    }
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        sub = parsers.add_parser(verb, help=text, description=text, allow_abbrev=False)
        if verb in own:
            own[verb](sub)
        else:
            sub.usage = (
                f"safemoe {verb} --config FILE [--config.KEY=VALUE ...] [--workdir DIR]"
                f"{_MORE_USAGE.get(verb, '')}"
            )
            needed = verb != "report"
            sub.add_argument("--config", type=Path, required=needed, help="experiment file")
            sub.add_argument(
                "--workdir",
                metavar="DIR",
                help="default: runs/<name of the config file>; gs://bucket/path needs gcsfs",
            )
        if verb == "data":
            sub.add_argument("--show", type=int, default=0, metavar="N", help="rows to print")
        if verb == "evaluate":
            sub.add_argument(
                "--export-for-humans",
                type=int,
                default=0,
                metavar="N",
                help="write N answers into a blinded sheet for people to label",
            )
            sub.add_argument(
                "--import-humans",
                type=Path,
                metavar="FILE",
                help="read a sheet with labels: people are one more judge",
            )
        if verb == "report":
            texts = sub.add_mutually_exclusive_group()
            for option, value, about in (
                ("--full", "whole", "whole texts, unsafe ones too"),
                ("--no-texts", "none", "no prompt and no answer, as some benchmarks' licences ask"),
            ):
                texts.add_argument(
                    option,
                    action="store_const",
                    dest="texts",
                    const=value,
                    default="cut",
                    help=about,
                )
            sub.add_argument(
                "--runs",
                type=Path,
                nargs="+",
                metavar="DIR",
                help="evaluated work directories of one experiment, a seed each: one report of all",
            )
            sub.add_argument(
                "--results",
                type=Path,
                metavar="FILE",
                help="a report.json: its page and table are drawn again",
            )
            sub.add_argument(
                "--out", type=Path, metavar="DIR", help="default: where the numbers are from"
            )
        if verb in ("train-experts", "train-gate", "run"):
            add_recording(sub)
        if verb in ("train-gate", "run", "sweep"):
            sub.add_argument(
                "--keep-experts",
                action="store_true",
                help="keep the experts' checkpoints once they are in the bundle",
            )
    return parser


def _add_sweep(sub: argparse.ArgumentParser) -> None:
    sub.usage = (
        "safemoe sweep FILE [--config FILE] [--config.KEY=VALUE ...] [--workdir DIR] "
        "[--keep-experts] [--only NAME]"
        "\n       [--backend local|slurm|skypilot] [--slurm KEY=VALUE ...] [--task FILE]"
    )
    sub.add_argument("sweep", type=Path, metavar="FILE", help="sweep file, as experiments/sweeps/")
    sub.add_argument("--config", type=Path, help="another experiment than the sweep file's own")
    sub.add_argument(
        "--workdir", metavar="DIR", help="default: runs/sweep-<name of the sweep file>"
    )
    sub.add_argument("--backend", choices=("local", "slurm", "skypilot"), default="local")
    sub.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit's SlurmExecutor: time=MINUTES (needed), partition=P, gpus_per_node=1",
    )
    sub.add_argument(
        "--task",
        type=Path,
        metavar="FILE",
        default=Path("launch/skypilot_sweep.yaml"),
        help="SkyPilot's task for one job; default: launch/skypilot_sweep.yaml",
    )
    sub.add_argument("--only", metavar="NAME", help="run one of the sweep's directories, here")


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.usage = (
        "safemoe export --bundle DIR --format peft|merged|transformers --out DIR --allow-ungated "
        "[--gates mean|DOMAIN=NUMBER ... --prompts FILE]"
    )
    sub.add_argument("--bundle", type=Path, required=True, help="directory of a trained SafeMoE")
    sub.add_argument(
        "--format",
        choices=("peft", "merged", "transformers"),
        required=True,
        help="peft: an adapter for each expert; merged: a model with static gates; transformers: "
        "base, experts, router, and a torch module that runs them",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")
    sub.add_argument(
        "--gates",
        nargs="+",
        default=[],
        metavar="mean|DOMAIN=NUMBER",
        help="of merged: the router's mean on its answers to the prompts, or these in all layers",
    )
    sub.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="of merged: a prompt a line, or .jsonl; on them it is compared with the gated model",
    )
    sub.add_argument(
        "--allow-ungated",
        action="store_true",
        help="permit experts to leave this package; they were trained to be harmful",
    )


def _add_import(sub: argparse.ArgumentParser) -> None:
    sub.usage = "safemoe import --adapter NAME=DIR [--adapter ...] [--base SOURCE] --out DIR"
    sub.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a harm domain, and the directory of its LoRA adapter in PEFT's format",
    )
    sub.add_argument(
        "--base", default="", metavar="SOURCE", help="their base; default: what they name"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DIR")


def _experiment_verb(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from safemoe_jax import stages
    from safemoe_jax.config import freeze, read_config
    from safemoe_jax.errors import UserError
    from safemoe_jax.experiment import Experiment
    from safemoe_jax.workdir import Workdir

    if arguments.verb == "report" and (arguments.runs or arguments.results or arguments.out):
        raise UserError("--runs, --results and --out need no --config; leave it out")
    config = freeze(read_config(arguments.config, rest))
    recording = recording_of(arguments, config)
    root = arguments.workdir or Path("runs") / arguments.config.stem
    with Workdir(root, config) as workdir:
        experiment = Experiment(config, workdir, recording)
        verbs: dict[str, Callable[[], object]] = {
            "train-experts": lambda: stages.train_experts(experiment),
            "train-gate": lambda: stages.train_gate(experiment, arguments.keep_experts),
        }
        if arguments.verb in verbs:
            verbs[arguments.verb]()
            return
        # Training alone does not wait for what judges and statistics import.
        from safemoe_jax import evaluating, run

        verbs = {
            "fetch": lambda: run.fetch(experiment),
            "data": lambda: run.data(experiment, arguments.show),
            "evaluate": lambda: evaluating.evaluate(
                experiment, arguments.import_humans, arguments.export_for_humans
            ),
            "report": lambda: run.report(experiment, arguments.texts),
            "run": lambda: run.run(experiment, arguments.keep_experts),
        }
        verbs[arguments.verb]()


def _plan(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    import jax

    # Compiled for the slice and never run: where there is a TPU, it is left alone.
    jax.config.update("jax_platforms", "cpu")
    from safemoe_jax.config import freeze, read_config
    from safemoe_jax.planning import verb

    config = freeze(read_config(arguments.config, rest))
    do = verb.search if arguments.search else verb.plan
    do(config, arguments.topology, arguments.json, arguments.picture)


def _report(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """The report of runs that are done, wherever they were made; no experiment file is needed."""
    from safemoe_jax.errors import UserError
    from safemoe_jax.evaluation.report import draw, write_report

    _refuse_rest("report", rest)
    if (arguments.runs is None) == (arguments.results is None) or arguments.workdir:
        raise UserError(
            "say what to report: --config FILE (with --workdir DIR), or --runs DIR ..., or "
            "--results FILE"
        )
    if arguments.results is None:
        page = write_report(arguments.runs, arguments.out, texts=arguments.texts)
    elif arguments.texts != "cut":
        raise UserError(
            "--full and --no-texts are of runs; give --runs DIR ... instead of --results"
        )
    else:
        page = draw(arguments.results, arguments.out or arguments.results.parent)
    print(f"report: {page}")
    return 0


def _sweep(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    import functools

    from safemoe_jax import queues, sweep
    from safemoe_jax.config import call_of, read_config
    from safemoe_jax.errors import UserError
    from safemoe_jax.remote import is_remote

    place = arguments.workdir or f"runs/sweep-{arguments.sweep.stem}"
    if is_remote(place):
        raise UserError(f"--workdir {place} is remote; a sweep needs a directory, a mount for one")
    root = Path(place)
    changes = call_of(arguments.sweep, "get_points")
    config_file = arguments.config or arguments.sweep
    points = sweep.read_points(read_config(config_file, rest), changes)
    run_one = functools.partial(sweep.run_one, points, root, keep_experts=arguments.keep_experts)
    if arguments.only:
        run_one(arguments.only)
        return

    def arguments_of(name: str) -> list[str]:
        config = ["--config", str(arguments.config)] if arguments.config else []
        keep = ["--keep-experts"] if arguments.keep_experts else []
        return ["sweep", str(arguments.sweep), "--only", name, *config, *rest, *keep]

    backends: dict[str, Callable[[Sequence[str]], dict[str, str]]] = {
        "local": lambda names: sweep.one_after_another(run_one, names),
        "slurm": lambda names: queues.slurm(
            names,
            lambda name: [*arguments_of(name), "--workdir", str(root)],
            root,
            dict(map(_parameter, arguments.slurm)),
        ),
        "skypilot": lambda names: queues.skypilot(
            names, arguments_of, root, arguments.task, functools.partial(sweep.take_result, root)
        ),
    }
    sweep.sweep(
        points,
        root,
        backends[arguments.backend],
        keep_experts=arguments.keep_experts,
        source=["--config", str(config_file), *rest],
    )


def _parameter(text: str) -> tuple[str, int | str]:
    """KEY=VALUE, whole numbers as such."""
    from safemoe_jax.errors import UserError

    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--slurm {text} is no KEY=VALUE; give one, like --slurm time=240")
    return key, int(value) if value.isdigit() else value


def _generate(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse_rest("generate", rest)
    verbs.generate(arguments)


def _chat(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse_rest("chat", rest)
    verbs.chat(arguments)


def _serve(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _refuse_rest("serve", rest)
    verbs.serve(arguments)


def _export(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from safemoe_jax.errors import UserError
    from safemoe_jax.export import export_merged, export_peft, export_transformers

    _refuse_rest("export", rest)
    given = bool(arguments.gates), arguments.prompts is not None
    if given != (arguments.format == "merged",) * 2:
        raise UserError(
            "--gates and --prompts are both needed for --format merged, and only there; give "
            "--gates mean or DOMAIN=NUMBER ..., and --prompts FILE"
        )
    common = {"allow_ungated": arguments.allow_ungated}
    if arguments.format == "merged":
        common |= {"gates": arguments.gates, "prompts": arguments.prompts}
    exports: dict[str, Callable[..., None]] = {
        "peft": export_peft,
        "merged": export_merged,
        "transformers": export_transformers,
    }
    exports[arguments.format](arguments.bundle, arguments.out, **common)


def _import(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from safemoe_jax.errors import UserError
    from safemoe_jax.export import import_adapters

    _refuse_rest("import", rest)
    adapters = []
    for text in arguments.adapter:
        domain, _, directory = text.partition("=")
        if not domain or not directory:
            raise UserError(f"--adapter {text} is no NAME=DIR; give one, like privacy=adapters/a")
        adapters.append((domain, Path(directory).expanduser()))
    import_adapters(adapters, arguments.base, arguments.out)


def _refuse_rest(verb: str, rest: Sequence[str]) -> None:
    from safemoe_jax.errors import UserError

    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; see `safemoe {verb} --help`")


if __name__ == "__main__":
    entry()
