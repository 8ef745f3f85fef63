"""What a disk may hold after a power cut: a recording of all writes and syncs, cut anywhere, replayed."""

import json
import os
import random
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# What a disk writes whole or not at all.
SECTOR = 512

# As `recording.c` writes it.
HEAD = struct.Struct("=IIQQQ")


class Step(NamedTuple):
    """One call that changed a file, its folder, or what is surely on the disk; or a mark of the process'."""

    # Write, Truncate, Allocate, Punch a hole, Sync, E a sync that failed, Folder's sync, Create, Rename,
    # Link, Unlink, Mark.
    kind: str
    file: int
    at: int
    size: int
    names: tuple[str, ...]
    data: bytes


def mark(recording: Path, said: object) -> None:
    """Write into a recording what the process or its client knows at this moment."""
    text = json.dumps(said).encode()
    descriptor = os.open(recording, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, HEAD.pack(ord("M"), 0, 0, 0, len(text)) + text)
    finally:
        os.close(descriptor)


def steps(recording: Path) -> list[Step]:
    """A recording as it was made."""
    data, at, found = recording.read_bytes(), 0, []
    while at < len(data):
        kind, names, file, offset, size = HEAD.unpack_from(data, at)
        at += HEAD.size
        told = data[at : at + names].decode()
        at += names
        text = data[at : at + size] if chr(kind) in "WM" else b""
        at += len(text)
        found.append(Step(chr(kind), file, offset, size, tuple(told.split("\n")), text))
    return found


class File:
    """A file: what a sync has put on the disk, and what was done to it since.

    What a failed sync was for may never come to the disk, though each later one succeeds: the kernel takes
    those pages for written (fsync(2)). From the first such step on all are kept, with whether it is sure.
    """

    def __init__(self, number: int, content: bytes = b"") -> None:
        self.number = number
        self.safe = bytearray(content)
        self.doubtful: list[tuple[Step, bool]] = []
        self.since: list[Step] = []

    def sync(self, *, failed: bool = False) -> None:
        """All of it is on the disk, or nobody knows how much of it."""
        if self.doubtful or failed:
            self.doubtful += [(step, not failed) for step in self.since]
        else:
            for step in self.since:
                done(self.safe, step)
        self.since = []

    def left(self, fates: "Fates") -> bytes:
        """What a power cut leaves of it."""
        content = bytearray(self.safe)
        told = [(step, "kept" if sure else fates.of_failed()) for step, sure in self.doubtful]
        told += [(step, fates.of(number, len(self.since))) for number, step in enumerate(self.since)]
        for step, fate in told:
            if fate == "kept":
                done(content, step)
            elif fate == "torn" and step.kind == "W":
                for part in sectors(step):
                    if fates.chance.random() < 0.5:
                        done(content, part)
            elif fate == "long" and step.kind == "W":  # it has its length, and nothing in it
                content.extend(bytes(max(0, step.at + step.size - len(content))))
        return bytes(content)


def done(content: bytearray, step: Step) -> None:
    """Do one step."""
    match step.kind:
        case "W":
            content.extend(bytes(max(0, step.at - len(content))))
            content[step.at : step.at + step.size] = step.data
        case "T":
            del content[step.size :]
            content.extend(bytes(step.size - len(content)))
        case "A":
            content.extend(bytes(max(0, step.at + step.size - len(content))))
        case "P":
            size = max(0, min(step.size, len(content) - step.at))
            content[step.at : step.at + size] = bytes(size)


def sectors(step: Step) -> Iterator[Step]:
    """A write as the parts of it that are in one sector each."""
    at, end = step.at, step.at + step.size
    while at < end:
        until = min(end, at - at % SECTOR + SECTOR)
        yield step._replace(at=at, size=until - at, data=step.data[at - step.at : until - step.at])
        at = until


class Fates(NamedTuple):
    """What becomes of what no sync had reached: by a plan, or where it says so by chance."""

    plan: str
    chance: random.Random

    def of(self, number: int, count: int) -> str:
        """Of one of so many steps."""
        match self.plan:
            case "all":
                return "kept"
            case "none":
                return "lost"
            case "long":
                return "long"
            case "torn":
                return "torn"
            case "not the last":
                return "kept" if number < count - 1 else "lost"
            case "last torn":
                return "kept" if number < count - 1 else "torn"
            case "not the first":
                return "kept" if number else "lost"
            case "only the last":
                return "kept" if number == count - 1 else "lost"
            case "one lost":
                return "lost" if self.chance.randrange(count) == number else "kept"
            case "begun":
                return "kept" if self.chance.random() < 0.9 else "lost"
        return self.chance.choice(("kept", "kept", "lost", "torn", "long"))

    def of_failed(self) -> str:
        """Of a step for which a sync has failed."""
        if self.plan in ("all", "none"):
            return "kept" if self.plan == "all" else "lost"
        return self.chance.choice(("kept", "lost", "torn"))


PLANS = (
    "all", "none", "long", "torn", "not the last", "last torn", "not the first", "only the last", "one lost",
    "begun", "any",
)  # fmt: skip

# How a folder's entries reach the disk. "journal": in their order, and with any sync, as on ext4, XFS and
# btrfs. "posix": each for itself, and surely only with a sync of the folder.
FOLDERS = ("journal", "posix")


# Files of which a recording begins, by name: their numbers and what they hold.
Before = Mapping[str, tuple[int, bytes]]
NOTHING: Before = {}


def laid(files: Mapping[str, bytes], folder: Path) -> Before:
    """Write what a cut left, to begin there."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: ((folder / name).stat().st_ino, content) for name, content in files.items()}


class Disk:
    """The files of one folder while the recording is replayed; `before` are those that were there."""

    def __init__(self, folder: str, before: Before) -> None:
        self._journal = folder == "journal"
        self._files = {number: File(number, content) for number, content in before.values()}
        self._safe = {name: self._files[number] for name, (number, _) in before.items()}
        self.now = dict(self._safe)
        self._since: list[tuple[str, tuple[str, ...], File]] = []

    def step(self, step: Step) -> None:
        """Go on by one step."""
        match step.kind:
            case "W" | "T" | "A" | "P":
                self._files[step.file].since.append(step)
            case "E":
                self._files[step.file].sync(failed=True)
            case "S":
                self._files[step.file].sync()
                if self._journal:
                    self._settle_names()
            case "F":
                self._settle_names()
            case "C":
                known = self.now.get(step.names[0])
                if known is None or known.number != step.file:
                    self._name(step, File(step.file))
                    self._files[step.file] = self.now[step.names[0]]
            case "R" | "L" | "U":
                self._name(step, self.now[step.names[0]])

    def _name(self, step: Step, file: File) -> None:
        change = (step.kind, step.names, file)
        renamed(self.now, *change)
        self._since.append(change)

    def _settle_names(self) -> None:
        for change in self._since:
            renamed(self._safe, *change)
        self._since = []

    def holds(self) -> dict[str, bytes]:
        """What programs see now."""
        return self._told(self.now, Fates("all", random.Random()))

    def left(self, fates: Fates) -> dict[str, bytes]:
        """What a power cut at this moment leaves."""
        names = dict(self._safe)
        # A journal is written in order, so that it has a beginning of them.
        upto = fates.chance.randint(0, len(self._since))
        for number, change in enumerate(self._since):
            if fates.plan in ("all", "none"):
                kept = fates.plan == "all"
            else:
                kept = number < upto if self._journal else fates.chance.random() < 0.5
            if kept:
                renamed(names, *change)
        return self._told(names, fates)

    def _told(self, names: dict[str, File], fates: Fates) -> dict[str, bytes]:
        return {name: file.left(fates) for name, file in names.items()}


def renamed(names: dict[str, File], kind: str, told: tuple[str, ...], file: File) -> None:
    """Change a folder's entries."""
    if kind in "RU":
        names.pop(told[0], None)
    if kind in "CRL":
        names[told[-1]] = file


class Cut(NamedTuple):
    """A power cut before a step of a recording, and what it did to what was under way."""

    at: int
    folder: str
    plan: str
    seed: int


def cuts(recorded: list[Step], most: int) -> list[Cut]:
    """So many of the cuts that are possible, of all kinds, spread over the whole recording.

    Before a sync most is under way, and behind a change of names or sizes most may be amiss: of three cuts
    one each is there.
    """
    chance = random.Random(6)
    kinds = ("SEF", "CRLUPT", "WTAPSEFCRLU")
    places = [[at for at, step in enumerate(recorded) if step.kind in kind] for kind in kinds]
    found: list[Cut] = []
    for number in range(most):
        some = places[number % len(kinds)]
        share = (number + chance.random()) / most
        at = some[int(share * len(some))] + (number % len(kinds) == 1)
        found.append(Cut(at, chance.choice(FOLDERS), PLANS[number % len(PLANS)], number))
    return sorted(found)


def states(
    recorded: list[Step], chosen: list[Cut], before: Before = NOTHING
) -> Iterator[tuple[Cut, dict[str, bytes]]]:
    """What each cut leaves, in their order."""
    disks = {folder: Disk(folder, before) for folder in FOLDERS}
    waiting = iter(chosen)
    cut = next(waiting, None)
    for number in range(len(recorded) + 1):
        while cut is not None and cut.at == number:
            yield cut, disks[cut.folder].left(Fates(cut.plan, random.Random(cut.seed)))
            cut = next(waiting, None)
        if number < len(recorded):
            for disk in disks.values():
                disk.step(recorded[number])


def replayed(recorded: list[Step], before: Before = NOTHING) -> dict[str, bytes]:
    """The files at the end, by the recording."""
    disk = Disk("journal", before)
    for step in recorded:
        disk.step(step)
    return disk.holds()


def marks(recorded: list[Step]) -> Iterator[tuple[int, Any]]:
    """What was said, and before which step."""
    for number, step in enumerate(recorded):
        if step.kind == "M":
            yield number, json.loads(step.data)
