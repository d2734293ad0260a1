"""What a file system may keep when power is lost, from a record of what a writer did.

A record is a series of pictures of a small folder, one before and one after every file-changing
call. The content of a file is durable once the file was synced, and a name once its folder was
synced. Until then a file may hold what it held at its last sync, half of what was written or all
of it; and any subset of the changes of names may have reached the disk, as long as the changes of
one name keep their order. A rename is one change.
"""

import itertools
import os
import random
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from faults.file_calls import watched

Inode = tuple[int, int]
Name = tuple[Inode, str]  # a folder and a name in it
RENAMES = {"rename", "replace", "exchange"}
MAX_SUBSETS = 32  # of the changes of names at one moment; a seeded sample of more


@dataclass
class Picture:
    """The names in every folder, and the content of every file or link, at one moment."""

    folders: dict[Inode, dict[str, Inode]] = field(default_factory=dict)
    contents: dict[Inode, bytes] = field(default_factory=dict)
    links: set[Inode] = field(default_factory=set)


@dataclass
class Change:
    """Names that change in one step, to a file or a folder or to nothing.

    A rename from one folder to another is one step, so that it is durable as soon as one of the two
    folders was synced.
    """

    names: dict[Name, Inode | None]
    synced: bool = False


@dataclass
class Moment:
    """What is certain and what is not after one call."""

    call: str
    folders: dict[Inode, dict[str, Inode]]  # the durable names
    pending: list[Change]
    contents: dict[Inode, list[bytes]]  # what each file may hold, the oldest first
    links: set[Inode]

    def differs(self, other: "Moment") -> bool:
        """Whether another tree may be found than at the other moment."""
        return (self.folders, self.pending, self.contents) != (
            other.folders,
            other.pending,
            other.contents,
        )


class Recorder:
    """Records what happens in the folder `root` while `recording`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top: Inode = _inode(root.stat())
        self.moments: list[Moment] = []
        self._pins: dict[Inode, int] = {}
        self._last = self._picture()
        self._durable = {inode: dict(names) for inode, names in self._last.folders.items()}
        self._versions = {inode: [content] for inode, content in self._last.contents.items()}
        self._pending: list[Change] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every call in this block."""
        with ExitStack() as stack:
            for name in ("fsync", "fdatasync"):
                stack.enter_context(mock.patch.object(os, name, self._syncing(getattr(os, name))))
            stack.callback(self._release)
            with watched(self._note):
                yield
            self._note("the last call", True)

    def _syncing(self, sync):
        def synced(handle) -> None:
            sync(handle)
            self._sync(_inode(os.fstat(handle if isinstance(handle, int) else handle.fileno())))

        return synced

    def _sync(self, inode: Inode) -> None:
        if inode in self._versions:
            del self._versions[inode][:-1]
        for change in self._pending:
            change.synced |= any(folder == inode for folder, _ in change.names)
        self._settle()
        self._keep("sync")

    def _settle(self) -> None:
        """A synced change is certain if nothing uncertain precedes it."""
        waiting: list[Change] = []
        for change in self._pending:
            names = {name for earlier in waiting for name in earlier.names}
            if change.synced and not names & change.names.keys():
                _apply(self._durable, change)
            else:
                waiting.append(change)
        self._pending = waiting

    def _note(self, call: str, done: bool) -> None:
        """Compare the folder with the last picture."""
        now = self._picture()
        changed: dict[Name, Inode | None] = {}
        for folder, names in now.folders.items():
            before = self._last.folders.get(folder, {})
            self._durable.setdefault(folder, {})
            for name in before.keys() | names.keys():
                if before.get(name) != names.get(name):
                    changed[folder, name] = names.get(name)
        for inode, content in now.contents.items():
            versions = self._versions.setdefault(inode, [b""])
            if versions[-1] != content:
                versions.append(content)
        one_step = call in RENAMES and done
        groups = [changed] if one_step else [{name: inode} for name, inode in changed.items()]
        for names in filter(None, groups):
            self._pending.append(Change(names))
        self._last = now
        self._keep(f"{call}{'' if done else ' is called'}")

    def _keep(self, call: str) -> None:
        contents = {inode: _may_hold(versions) for inode, versions in self._versions.items()}
        for link in self._last.links:
            contents[link] = contents[link][-1:]
        pending = [Change(dict(c.names), c.synced) for c in self._pending]
        durable = {inode: dict(names) for inode, names in self._durable.items()}
        moment = Moment(call, durable, pending, contents, set(self._last.links))
        if not self.moments or moment.differs(self.moments[-1]):
            self.moments.append(moment)

    def _picture(self) -> Picture:
        picture = Picture()
        self._look(self.root, picture)
        return picture

    def _look(self, folder: Path, picture: Picture) -> None:
        names = picture.folders.setdefault(_inode(folder.stat()), {})
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            inode = _inode(status)
            names[entry.name] = inode
            self._pin(inode, entry.path)
            if stat.S_ISDIR(status.st_mode):
                self._look(Path(entry.path), picture)
            elif stat.S_ISLNK(status.st_mode):
                picture.links.add(inode)
                picture.contents[inode] = os.fsencode(os.readlink(entry.path))
            elif stat.S_ISREG(status.st_mode):
                picture.contents[inode] = Path(entry.path).read_bytes()

    def _pin(self, inode: Inode, path: str) -> None:
        """Hold the file, so that its number is not given to another one."""
        if inode not in self._pins:
            self._pins[inode] = os.open(path, os.O_PATH | os.O_NOFOLLOW)

    def _release(self) -> None:
        for handle in self._pins.values():
            os.close(handle)
        self._pins.clear()


Tree = dict[str, bytes | str | None]  # path -> content, target of a link, or None for a folder


def states(moment: Moment, top: Inode, rng: random.Random) -> Iterator[Tree]:
    """The trees that a file system may hold after power was lost at this moment."""
    for subset in _subsets(moment.pending, rng):
        folders = {inode: dict(names) for inode, names in moment.folders.items()}
        for change in subset:
            _apply(folders, change)
        uncertain = [inode for inode, held in moment.contents.items() if len(held) > 1]
        sizes = [len(moment.contents[inode]) for inode in uncertain]
        choices = [[min(i, size - 1) for size in sizes] for i in range(max(sizes, default=1))]
        if len(uncertain) > 1:
            choices += [[rng.randrange(size) for size in sizes] for _ in range(4)]
        for choice in choices:
            chosen = {inode: moment.contents[inode][i] for inode, i in zip(uncertain, choice)}
            held = {inode: chosen.get(inode, held[0]) for inode, held in moment.contents.items()}
            yield dict(_tree(top, "", folders, held, moment.links))


def materialise(tree: Tree, folder: Path) -> None:
    """Write a tree into `folder`, in the place of what it holds."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir()
        elif isinstance(content, str):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)


def _inode(status: os.stat_result) -> Inode:
    return status.st_dev, status.st_ino


def _apply(folders: dict[Inode, dict[str, Inode]], change: Change) -> None:
    for (folder, name), inode in change.names.items():
        names = folders.setdefault(folder, {})
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _may_hold(versions: list[bytes]) -> list[bytes]:
    """What a file may hold, whose first version is durable and whose last one was written."""
    if len(versions) == 1:
        return versions[:]
    durable, last = versions[0], versions[-1]
    appended = last.startswith(durable)
    half = last[: (len(durable) + len(last)) // 2 if appended else len(last) // 2]
    return list(dict.fromkeys([*versions[:-1], half, last]))


def _subsets(pending: list[Change], rng: random.Random) -> Iterator[list[Change]]:
    """Subsets of changes in which no change of a name is without the earlier ones of this name."""
    before = [
        [i for i in range(k) if pending[i].names.keys() & pending[k].names.keys()]
        for k in range(len(pending))
    ]

    def closed(kept: tuple[bool, ...]) -> bool:
        return all(all(kept[i] for i in before[k]) for k in range(len(kept)) if kept[k])

    if 2 ** len(pending) <= 2 * MAX_SUBSETS:
        candidates = itertools.product((False, True), repeat=len(pending))
    else:
        ends = [(x,) * len(pending) for x in (False, True)]
        prefixes = [tuple(k < n for k in range(len(pending))) for n in range(len(pending))]
        drawn = (_drawn(before, rng) for _ in range(MAX_SUBSETS))
        candidates = dict.fromkeys([*ends, *prefixes, *drawn])
    for kept in candidates:
        if closed(kept):
            yield [change for change, keep in zip(pending, kept) if keep]


def _drawn(before: list[list[int]], rng: random.Random) -> tuple[bool, ...]:
    kept: list[bool] = []
    for earlier in before:
        kept.append(all(kept[i] for i in earlier) and rng.random() < 0.6)
    return tuple(kept)


def _tree(
    top: Inode, prefix: str, folders, held, links
) -> Iterator[tuple[str, bytes | str | None]]:
    """Path and content of everything below a folder."""
    for name, inode in sorted(folders.get(top, {}).items()):
        if inode in folders:
            yield prefix + name, None
            yield from _tree(inode, f"{prefix}{name}/", folders, held, links)
        elif inode in held:
            yield prefix + name, os.fsdecode(held[inode]) if inode in links else held[inode]
