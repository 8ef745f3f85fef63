"""Which values the settings of shaping may have; each answer says what is wrong with one that may not."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from agent.config import Common
from agent.globs import Names, wrong_glob
from agent.patterns import PATTERNS

# What is wrong, and of which setting.
Wrong = tuple[str, str]

# How `rename` writes a property.
PROPERTY = "properties."
# The id beside the properties, as `hash` names it.
DISTINCT_ID = "distinct_id"
# Names of events are cut there (`agent/envelope.py`): a longer one would never be met, or be cut again.
LONGEST = 200
# RFC 2104 wants 32 bytes for SHA-256; 16 are what nobody can guess. Whoever has the key can try out ids.
SHORTEST_KEY = 16


def of(source: Common) -> Iterator[Wrong]:
    """What is wrong with how a source shapes its events."""
    yield from _globs("drop", source.drop)
    yield from _globs("keep", source.keep)
    if not 0 <= source.sample <= 1:
        yield "sample", "must be from 0 to 1: the share of persons that is taken"
    for old, new in source.rename.items():
        if wrong := _wrong_renaming(old, new):
            yield f"rename.{old}", wrong
    patterns = [name for name in source.redact if name.startswith("@")]
    yield from _globs("redact", source.redact)
    for name in patterns:
        if name not in PATTERNS:
            close = get_close_matches(name, PATTERNS, 1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            yield f"redact.{name}", f"is none of {', '.join(PATTERNS)}{meant}"
    yield from _of_hash(source)


def _of_hash(source: Common) -> Iterator[Wrong]:
    for number, name in enumerate(source.hash, 1):
        if not name:
            yield f"hash[{number}]", "is empty"
        elif name in PATTERNS or "*" in name:
            yield f"hash[{number}]", f"{name!r} is no name: what is hashed is named whole"
        elif name.startswith(PROPERTY):
            yield f"hash[{number}]", f"is written without {PROPERTY!r}: {name.removeprefix(PROPERTY)!r}"
    key = source.hash_key.reveal()
    if source.hash and not key:
        yield "hash_key", "is missing: hash needs a secret, or anybody could try which id a hash is of"
    elif key and not source.hash:
        yield "hash_key", "is of no use without hash"
    elif key and len(key.encode()) < SHORTEST_KEY:
        yield (
            "hash_key",
            f"must have at least {SHORTEST_KEY} characters: openssl rand -hex 32 makes a good one",
        )


def warnings(source: Common) -> Iterator[Wrong]:
    """What is allowed, but hides less than it seems to."""
    hidden = Names([*(name for name in source.redact if name not in PATTERNS), *source.hash])
    for old, new in source.rename.items():
        name = old.removeprefix(PROPERTY)
        if old.startswith(PROPERTY) and name in hidden and new not in hidden:
            yield f"rename.{old}", f"comes before redact and hash, which name {name!r} and not {new!r}"
    if source.format != "syslog" or DISTINCT_ID in source.hash:
        return
    for name in ("hostname", "app"):
        if f"{{{name}}}" in source.distinct_id and name in hidden:
            yield (
                DISTINCT_ID,
                f"tells the {name} that redact or hash names: add {DISTINCT_ID!r} to hash, or set another",
            )


def _globs(setting: str, globs: Sequence[str]) -> Iterator[Wrong]:
    for number, glob in enumerate(globs, 1):
        if wrong := wrong_glob(glob):
            yield f"{setting}[{number}]", wrong
        elif setting == "redact" and glob.startswith(PROPERTY):
            yield f"{setting}[{number}]", f"is written without {PROPERTY!r}: {glob.removeprefix(PROPERTY)!r}"


def _wrong_renaming(old: str, new: str) -> str:
    if not old or old == PROPERTY:
        return "names nothing"
    if not new or new.isspace():
        return "the new name is blank"
    if old.startswith(PROPERTY):
        return f"the new name is written without {PROPERTY!r}" if new.startswith(PROPERTY) else ""
    if new.startswith(PROPERTY):
        return f"an event cannot become a property: write {PROPERTY + old!r} to rename one"
    return f"is longer than {LONGEST} characters" if max(len(old), len(new)) > LONGEST else ""
