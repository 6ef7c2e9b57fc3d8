"""The command line: flags become a command's dataclass, the command runs, its table is printed, errors take one line."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from jaxprune import _hosts, _terminate
from jaxprune._json import write_json
from jaxprune._progress import table
from jaxprune.commands import bench, evaluate, export, generate, inspect, prune, recover, search, size, sparsify, verify
from jaxprune.commands import run as everything
from jaxprune.commands._common import pairs, say
from jaxprune.commands._compute import using
from jaxprune.commands._devices import prepared

COMMANDS: dict[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    everything.Run: ("run", everything.run),
    prune.Prune: ("prune", prune.run),
    sparsify.Sparsify: ("sparsify", sparsify.run),
    recover.Recover: ("recover", recover.run),
    evaluate.Evaluate: ("evaluate", evaluate.run),
    search.Search: ("search", search.run),
    bench.Bench: ("bench", bench.run),
    export.Export: ("export", export.run),
    generate.Generate: ("generate", generate.run),
    verify.Verify: ("verify", verify.run),
    size.Size: ("size", size.run),
    inspect.Inspect: ("inspect", inspect.run),
    inspect.Methods: ("methods", inspect.run_methods),
}
DESCRIPTION = (
    "Make a LLaMA-family language model, or a Mamba, smaller. `jaxprune run MODEL --out DIR` does all of it for LLaMA, the "
    "other commands are its steps; `jaxprune COMMAND --help` explains each."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0; 1 where `verify` found a difference; 2 after a user's error or Ctrl-C, said in one line.

    SIGTERM is as Ctrl-C, but the status is 0 where the command left something to go on from.
    """
    args = _parse(argv)
    _, command = COMMANDS[type(args)]
    try:
        # The handler comes after the processes have met, for JAX has one of its own.
        with prepared(getattr(args, "devices", None), getattr(args, "hosts", None)), using(args), _terminate.as_interrupt():
            with _hosts.alike():
                _check_place(args.output.json)
            result = command(args)
        if _hosts.first():
            _show(result)
            if args.output.json is not None:
                write_json(args.output.json, result)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXPRUNE_TRACEBACK"):
            raise
        _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut off the message
        kept = args.kept() if hasattr(args, "kept") else None
        if kept is not None and stopped.args == (signal.SIGTERM,):
            say(f"jaxprune: stopped by SIGTERM; {kept}")
            sys.exit(0)
        _fail("interrupted; outputs that were not complete are gone, checkpoints are kept")
    sys.exit(1 if result.get("exact") is False else 0)


def _parse(argv: Sequence[str] | None) -> Any:
    commands = tuple(Annotated[flags, tyro.conf.subcommand(name)] for flags, (name, _) in COMMANDS.items())
    return tyro.cli(
        Union[commands],  # type: ignore[call-overload]  # noqa: UP007
        prog="jaxprune",
        description=DESCRIPTION,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _check_place(path: Path | None) -> None:
    if path is not None and _hosts.first() and (path.is_dir() or not path.parent.is_dir()):
        raise FileNotFoundError(f"json: {path} given; name a file in a folder that is there")


def _show(result: dict[str, Any]) -> None:
    lists = [rows for rows in result.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    for part in (pairs(result), *lists):
        if part:
            print(table(part))


def _fail(message: str) -> None:
    if _hosts.first():
        print(f"jaxprune: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
