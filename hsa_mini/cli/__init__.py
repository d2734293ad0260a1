"""The command line: `python -m hsa_mini COMMAND`, one module per command.

Only modules that load in a moment are imported here, so that `main` takes over Ctrl-C at once.
"""

import os
import signal
import sys

__all__ = ["main"]


def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    words: the command and its arguments; if None, those of this process, whose signals are then
    taken over.
    0: done. 2: refused or failed, with one line on standard error that says why. 130: stopped by
    Ctrl-C. 141: the reader of standard output has gone, as after `| head`. 143: stopped by SIGTERM.
    Other exceptions are faults of this package and are raised.
    """
    stop = Stop()
    if words is None:
        stop.take_over_signals()
    return _run(words, stop)


class Stop:
    """What Ctrl-C and SIGTERM do.

    Until `working` is set, they end the process at once. Then they raise KeyboardInterrupt, so that
    what is half-written is removed. KeyboardInterrupt would not do from the start: a module that is
    being imported may turn it into another error, or lose it.
    """

    def __init__(self) -> None:
        self.working = False
        self.number = 0  # of the signal that was received

    def take_over_signals(self) -> None:
        """Handle both signals from now on, except one that this process was told to ignore."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        self.number = number
        if self.working:
            raise KeyboardInterrupt
        try:
            os.write(2, f"{self.message}\n".encode())
        finally:
            os._exit(self.status)

    @property
    def message(self) -> str:
        """What is said at the end."""
        word = "terminated" if self.number == signal.SIGTERM else "interrupted"
        return f"\n{word}; nothing half-written was left behind"

    @property
    def status(self) -> int:
        """The exit status, as a shell counts it."""
        return 128 + (self.number or signal.SIGINT)


def _run(words: list[str] | None, stop: Stop) -> int:
    """Run one command and return its exit status; see `main`."""
    import logging

    from hsa_mini.cli.entry import build_parser
    from hsa_mini.cli.report import LineHandler, one_line, standard_streams

    name = "hsa-mini"
    logging.basicConfig(level=logging.WARNING, handlers=[LineHandler()])
    with standard_streams() as output:
        try:
            try:
                arguments = build_parser().parse_args(words)
            except SystemExit as ended:  # the parser has explained or refused
                status = int(ended.code or 0)
            else:
                name += f" {arguments.name}"
                if arguments.name != "fetch":
                    import torch  # noqa: F401  # all others need it, and `working` comes after it
                stop.working = True
                status = arguments.command(arguments)
            output.finish()
            return status
        except BrokenPipeError:
            return 141
        except (Exception, KeyboardInterrupt) as error:
            if stop.number or isinstance(error, KeyboardInterrupt):
                print(stop.message, file=sys.stderr)
                return stop.status
            if not _is_expected(error):
                raise
            message = one_line(str(error)) or type(error).__name__
            print(f"{name}: error: {message}", file=sys.stderr)
            return 2
        finally:
            stop.working = False


def _is_expected(error: BaseException) -> bool:
    """Whether input, disk or machine can be the cause; other errors are faults of this package."""
    import lzma
    import tarfile
    import zlib

    from safetensors import SafetensorError

    if isinstance(error, RuntimeError):  # torch reports a lack of memory as a RuntimeError too
        return "memory" in str(error)
    input_errors = (ValueError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
    disk_errors = (OSError, SafetensorError)
    machine_errors = (ImportError, FloatingPointError, MemoryError)
    return isinstance(error, (*input_errors, *disk_errors, *machine_errors))
