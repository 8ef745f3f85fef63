"""Takes for damage that Python cannot read what SQLite says of a file."""

from collections.abc import Iterator
from contextlib import contextmanager

from agent.buffer.file import Damage


@contextmanager
def unreadable_is_damage() -> Iterator[None]:
    """Raises `Damage` where the words of an error have a damaged name in them that is no UTF-8.

    Python's sqlite3 then raises `UnicodeDecodeError`, which is none of its own errors.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise Damage("the schema is damaged, and its names cannot be read") from error
