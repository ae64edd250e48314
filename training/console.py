"""What all programs share on the command line: mistakes in one line, and lines beside bars."""

import argparse
import getpass
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache

from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's or of their machine: one line, no traceback, exit code 2."""


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes raise UserError, without the usage text."""

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def command(program: str, run: Callable, stopped: str = "the same command goes on") -> None:
    """Runs `run(argv)` and prints what it returns, if anything, in the first process.

    A UserError ends it with one line and exit code 2; so does an OSError of a file. stopped: what
    to say after Ctrl-C.
    """
    rank = int(os.environ.get("RANK", 0))
    logging.lastResort = LineHandler()  # for warnings of libraries
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold any byte
    try:
        find_home()
        try:
            result = run(sys.argv[1:])
        finally:
            close_bars()
        if result and rank == 0:
            print(result)
        sys.stdout.flush()
    except UserError as error:
        fail(program, str(error), rank)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:  # no file
            raise
        fail(program, f"{error.filename}: {error.strerror}", rank)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\nstopped; {stopped}", file=sys.stderr)
        sys.exit(130)


def early(program: str, parse: Callable) -> None:
    """Reads the command line before a program's slow imports: --help and mistakes answer at once.

    parse(argv): may raise UserError. The program parses it again when it runs.
    """

    def read(argv):  # prints nothing
        parse(argv)

    command(program, read)


def fail(program: str, message: str, rank: int) -> None:
    """Ends the process with exit code 2 and one line, whatever the message holds."""
    if rank > 0:
        # If the first process fails too, torchrun ends this one before it repeats the message.
        time.sleep(10)
    line = " ".join(message.splitlines())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > 1000:
        line = f"{line[:700]} ... {line[-250:]}"
    print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(line: str) -> None:
    """A line for the user, above the progress bars."""
    tqdm.write(line, file=sys.stderr)


@cache
def say_once(line: str) -> None:
    say(line)


class LineHandler(logging.Handler):
    """Warnings of libraries as lines above the progress bars."""

    def __init__(self):
        super().__init__(logging.WARNING)

    def emit(self, record):
        say(self.format(record))


def close_bars() -> None:
    """Ends the lines of progress bars that an exception left open, before the next message."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def find_home() -> None:
    """Sets HOME and USER, which libraries need for their caches, where a container has neither."""
    name = f"uid-{os.getuid()}"
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = name
    if os.path.expanduser("~") != "~":
        return
    home = os.path.join(tempfile.gettempdir(), f"vision-ekipl-{name}")
    os.makedirs(home, mode=0o700, exist_ok=True)
    if os.stat(home).st_uid != os.getuid():  # somebody else made it
        home = tempfile.mkdtemp()
    os.environ["HOME"] = home
