"""What is entered into the books: of a put, of a settlement, and of what the kernel dropped."""

from collections.abc import Sequence

from agent.buffer import Books, DeadEvent, Entry, Lease
from agent.events import Chunk, Tally, label_of


def newly_dropped(noted: int, total: int) -> int:
    """How far a socket's count has gone on; the kernel keeps 32 bits of it.

    One that seems to have gone back is another socket's, where boots cannot be told apart.
    """
    more = (total - noted) % 2**32
    return more if more < 2**31 else total


def entries_put(tally: Tally, taken: int, refused: int) -> Books:
    """What a put enters: `refused` events of the tally's were shed by `drop_newest`."""
    books = Books(
        {
            Entry("received", tally.source, ""): tally.received,
            Entry("accepted", tally.source, ""): taken,
            Entry("shed", tally.source, "full_newest"): refused,
            Entry("shed", tally.source, "shutdown"): tally.given_up,
            Entry("truncated", tally.source, ""): tally.truncated,
            Entry("restamped", tally.source, ""): tally.restamped,
        }
    )
    for reason, count in tally.rejected.items():
        books[Entry("rejected", tally.source, reason)] += count
    return +books


def entries_settle(
    lease: Lease, dead: Sequence[DeadEvent], rest: Sequence[Chunk], damaged: int, warned: int
) -> Books:
    """What a settlement enters: what is neither dead, kept nor damaged was delivered."""
    label = label_of(lease.project, lease.key)
    leased_events = sum(chunk.events for chunk in lease.chunks)
    kept = sum(chunk.events for chunk in rest)
    books = Books(
        {
            Entry("delivered", label, ""): leased_events - len(dead) - kept - damaged,
            Entry("warned", label, ""): warned,
            Entry("shed", label, "damaged"): damaged,
        }
    )
    for event in dead:
        books[Entry("dead", label, event.reason)] += 1
    return +books
