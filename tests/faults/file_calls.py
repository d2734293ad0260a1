"""Which calls change files: they are seen one by one, before and after, wherever they are made.

Python's profiler reports every call of a builtin function, also those of libraries. An exception
that is raised before a call takes the place of the call.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Functions of the operating system, methods of files and arrays, and the writer of safetensors.
SYSTEM = set(
    "open write writev pwrite fsync fdatasync rename replace unlink remove mkdir rmdir chmod "
    "fchmod chown fchown lchown link symlink truncate ftruncate posix_fallocate sendfile "
    "copy_file_range utime setxattr".split()
)
OF_FILES = {"write", "writelines", "flush", "truncate", "close"}
ELSEWHERE = {"serialize_file", "tofile", "writerow", "writerows"}
# Functions of ours that call the operating system through ctypes, which the profiler does not see.
OURS = {"exchange"}
FILES = (io.FileIO, io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper)

Watcher = Callable[[str, bool], object]  # the name of the call, and whether it is done


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` before and after every file-changing call of this thread."""

    def profile(frame, event: str, subject) -> None:
        if event in ("c_call", "c_return", "c_exception"):
            if _changes_files(subject):
                watcher(subject.__name__, event != "c_call")
        elif (
            frame.f_code.co_name in OURS and frame.f_globals.get("__package__") == "hsa_mini.files"
        ):
            watcher(frame.f_code.co_name, event == "return")

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def _changes_files(function) -> bool:
    name = function.__name__
    owner = getattr(function, "__self__", None)
    if name in ELSEWHERE:
        return True
    if isinstance(owner, FILES):
        return name in OF_FILES and owner not in (sys.stdout, sys.stderr)
    if getattr(owner, "__name__", "") in (os.name, "io", "_io"):
        return name in SYSTEM
    return False
