"""Makes books balance whose buffer was damaged: what is missing is entered, and called what it is."""

from agent.buffer import Books, Entry
from agent.events import SHED_AT_THE_DOOR

# Entries of which nobody knows any more whose they were.
NOBODYS = ""


def balanced(books: Books, events: int, letters: int) -> Books:
    """The books of a buffer that holds so many events and dead letters.

    What was accepted and is not there is `damaged`. Where entries are lost too, the totals begin anew, with
    no more than what there is.
    """
    result = +books

    def total(*joints: str, at_the_door: bool | None = None) -> int:
        return sum(
            count
            for entry, count in result.items()
            if entry.joint in joints and at_the_door in (None, entry.reason in SHED_AT_THE_DOOR)
        )

    def enter(joint: str, reason: str, count: int) -> None:
        if count > 0:
            result[Entry(joint, NOBODYS, reason)] += count

    missing = total("dead") - total("replayed", "purged", "dead_evicted") - letters
    enter("dead_evicted", "", missing)
    enter("dead", "rejected", -missing)
    missing = total("received") - total("accepted", "rejected") - total("shed", at_the_door=True)
    enter("accepted", "", missing)
    enter("received", "", -missing)
    missing = total("accepted", "replayed") - total("delivered", "dead") - events
    missing -= total("shed", at_the_door=False)
    enter("shed", "damaged", missing)
    enter("accepted", "", -missing)
    enter("received", "", -missing)
    return result


def balance(books: Books, events: int, letters: int) -> bool:
    """Whether nothing is missing."""
    return balanced(books, events, letters) == +books
