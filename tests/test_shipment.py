"""`agent.deliver.shipment`: exactly the poison is buried, and nothing is lost or doubled."""

import json
from collections.abc import Callable, Sequence
from math import ceil, log2
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from agent import pack
from agent.buffer import DeadEvent
from agent.deliver.cargo import opened
from agent.deliver.shipment import MOST_REPLAYED, UNWITNESSED, Shipment
from agent.deliver.verdict import Accepted, Batch, Damaged, Refused, Rejected, Retry, Split, Verdict
from agent.events import GIVEN, Burial, Chunk

AT = 1_700_000_000_000_000


def event(number: int) -> bytes:
    # Spaces and an escape, so that an event that was read and written anew would be noticed.
    return b'{ "event":"\\u0065%d", "properties":{"n": [1e2,{}]} }' % number


def chunk(events: Sequence[bytes], *, boot: str = "b", step: int = 0) -> Chunk:
    data = b",".join(events)
    return Chunk(
        project="default",
        events=len(events),
        size=len(data),
        crc=pack.crc32(data),
        received_at=AT + step,
        boot=boot,
        monotonic=7,
        packed=pack.deflate(data),
    )


def chunks_of(sizes: Sequence[int]) -> list[Chunk]:
    numbers = iter(range(sum(sizes)))
    return [chunk([event(next(numbers)) for _ in range(size)]) for size in sizes]


def events_in(chunks: Sequence[Chunk]) -> list[bytes]:
    return [event for chunk in chunks for event in opened(chunk) or []]


def refuse(poison: set[int], verdict: Verdict) -> Callable[[Batch], Verdict]:
    """A server that answers `verdict` where any of those events is among the batch's."""
    bad = {event(number) for number in poison}
    return lambda batch: verdict if bad & set(events_in(batch.pieces)) else Accepted()


def deliver(shipment: Shipment, server: Callable[[Batch], Verdict | Damaged]) -> list[Batch]:
    asked = []
    while (batch := shipment.next_batch()) is not None:
        asked.append(batch)
        assert batch.events == sum(piece.events for piece in batch.pieces) > 0
        assert batch.size == len(b",".join(events_in(batch.pieces)))
        shipment.receive(server(batch))
    return asked


def everything(shipment: Shipment) -> list[bytes]:
    return [dead.event for dead in shipment.dead(AT)] + events_in(shipment.rest)


REJECTED = Rejected("cannot parse")
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)
generous: dict[str, Any] = {"max_events": 10_000, "max_size": 10_000_000}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.data())
def test_a_witnessed_shipment_buries_exactly_the_poison(sizes: list[int], data: st.DataObject) -> None:
    """k poison events among n are buried in at most 1 + 2·k·⌈log2 n⌉ requests, and no innocent with them."""
    count = sum(sizes)
    poison = data.draw(st.sets(st.integers(0, count - 1), max_size=5))
    shipment = Shipment(chunks_of(sizes), **generous)
    asked = deliver(shipment, refuse(poison, REJECTED))
    if shipment.hold is None:
        assert {dead.event for dead in shipment.dead(AT)} == {event(number) for number in poison}
        assert shipment.accepted == count - len(poison)
        assert shipment.rest == []
    else:
        assert (shipment.hold, shipment.progressed) == ("rejected", False)
        assert len(asked) <= UNWITNESSED
    assert len(asked) <= 1 + 2 * len(poison) * ceil(log2(count))


@pytest.mark.parametrize("count", [2, 3, 16, 17, 999, 1000, 1024, 4096])
def test_a_few_poison_events_among_many_always_have_a_witness(count: int) -> None:
    """The usual case, one broken event in a full batch, is solved at first sight wherever it stands."""
    for poison in ({0}, {count - 1}, {count // 3}):
        shipment = Shipment(chunks_of([count]), **generous)
        asked = deliver(shipment, refuse(poison, REJECTED))
        assert {dead.event for dead in shipment.dead(AT)} == {event(number) for number in poison}
        assert len(asked) <= 1 + 2 * ceil(log2(count))


@pytest.mark.parametrize(
    ("every", "good"),
    [*((every, False) for every in (2, 3, 4, 8, 11, 20)), *((every, True) for every in (2, 3, 4, 8, 11))],
)
def test_much_poison_evenly_mixed_has_a_witness(every: int, *, good: bool) -> None:
    """A program that breaks each second event, or nine of ten, holds nobody else up: all of it is found."""
    poison = {number for number in range(1000) if (number % every == 0) != good}
    shipment = Shipment(chunks_of([1000]), **generous)
    deliver(shipment, refuse(poison, REJECTED))
    assert (shipment.hold, shipment.accepted) == (None, 1000 - len(poison))
    assert {dead.event for dead in shipment.dead(AT)} == {event(number) for number in poison}


verdicts = st.one_of(
    st.just(Accepted()),
    st.just(REJECTED),
    st.just(Split("too large")),
    st.just(Retry(None, "busy")),
    st.just(Refused("key", "HTTP 401")),
    st.just("damaged"),
    st.just("stop"),
)


@given(sizes, st.integers(1, 60), st.integers(100, 3000), st.lists(verdicts, max_size=60))
def test_nothing_is_lost_or_doubled(
    sizes: list[int], max_events: int, max_size: int, script: list[Verdict | str]
) -> None:
    """Accepted, dead, damaged and rest are together the lease, whatever the server says and when it ends."""
    chunks = chunks_of(sizes)
    shipment = Shipment(chunks, max_events, max_size)
    taken: list[bytes] = []
    for verdict in script:
        batch = shipment.next_batch()
        if batch is None:
            break
        whole = [piece for piece in batch.pieces if any(piece is chunk for chunk in chunks)]
        if verdict == "stop":
            shipment.stop()
        elif verdict == "damaged":
            if whole:
                shipment.receive(Damaged(whole[-1], "broken"))
        else:
            assert not isinstance(verdict, str)
            shipment.receive(verdict)
            taken += events_in(batch.pieces) if verdict == Accepted() else []
    found = taken + everything(shipment) + events_in(shipment.damaged)
    assert sorted(found) == sorted(events_in(chunks))
    assert shipment.accepted == len(taken)
    assert not shipment.dead(AT) or shipment.accepted


@given(sizes, st.integers(1, 30), st.integers(60, 900))
def test_batches_keep_the_limits(sizes: list[int], max_events: int, max_size: int) -> None:
    """No batch is over the limits, unless it is of one event that is so alone; each event is sent once."""
    chunks = chunks_of(sizes)
    asked = deliver(Shipment(chunks, max_events, max_size), lambda _: Accepted())
    for batch in asked:
        assert batch.events == 1 or (batch.events <= max_events and batch.size <= max_size)
    assert [event for batch in asked for event in events_in(batch.pieces)] == events_in(chunks)


def test_untouched_chunks_travel_and_come_back_as_they_are() -> None:
    """Nothing is opened as long as nothing is refused."""
    chunks = chunks_of([3, 4])
    shipment = Shipment(chunks, **generous)
    batch = shipment.next_batch()
    assert batch is not None
    assert all(piece is chunk for piece, chunk in zip(batch.pieces, chunks, strict=True))
    shipment.receive(Refused("host", "HTTP 404"))
    assert all(left is chunk for left, chunk in zip(shipment.rest, chunks, strict=True))
    assert (shipment.hold, shipment.why, shipment.progressed) == ("host", "HTTP 404", False)
    assert shipment.next_batch() is None


def test_whole_chunks_are_tried_before_one_is_opened() -> None:
    """A refused batch of several chunks is halved between them."""
    shipment = Shipment(chunks_of([8, 8, 8, 8]), **generous)
    asked = deliver(shipment, refuse({9}, REJECTED))
    assert [batch.events for batch in asked[:5]] == [32, 16, 16, 8, 8]


def test_a_sibling_is_tried_before_going_deeper() -> None:
    """After a refused half the other half is asked, and then the latest refused one is halved."""
    shipment = Shipment(chunks_of([16]), **generous)
    asked = deliver(shipment, refuse({0, 15}, REJECTED))
    assert [batch.events for batch in asked][:5] == [16, 8, 8, 4, 4]


def test_all_planned_batches_are_asked_before_any_is_halved() -> None:
    """Company testifies: a newer batch of the same lease is the witness against an older one."""
    shipment = Shipment(chunks_of([1, 50]), max_events=50, max_size=10_000_000)
    asked = deliver(shipment, refuse({0}, REJECTED))
    assert [batch.events for batch in asked] == [1, 50]
    assert [dead.event for dead in shipment.dead(AT)] == [event(0)]


def test_a_lone_refused_event_is_kept() -> None:
    """Without a witness nobody is condemned: the project is held and the lease goes back."""
    shipment = Shipment(chunks_of([1]), **generous)
    deliver(shipment, refuse({0}, REJECTED))
    assert (shipment.hold, shipment.why, shipment.progressed) == ("rejected", "cannot parse", False)
    assert shipment.dead(AT) == []
    assert events_in(shipment.rest) == [event(0)]


@pytest.mark.parametrize("verdict", [REJECTED, Split("too large")])
def test_some_refusals_without_a_witness_are_enough(verdict: Verdict) -> None:
    """A server that refuses everything is asked so often, and nothing is lost by it."""
    shipment = Shipment(chunks_of([1000]), **generous)
    assert len(deliver(shipment, lambda _: verdict)) == UNWITNESSED
    assert (shipment.hold, shipment.progressed) == ("rejected", False)
    assert events_in(shipment.rest) == [event(number) for number in range(1000)]


@pytest.mark.parametrize("before", [0, 1, UNWITNESSED - 1])
def test_another_shipment_testifies(before: int) -> None:
    """What is accepted of the same key while this is under way is a witness: all of it may be bad."""
    shipment = Shipment(chunks_of([100]), **generous)
    asked = 0
    while shipment.next_batch() is not None:
        if asked == before:
            shipment.testify()
        shipment.receive(REJECTED)
        asked += 1
    assert (shipment.hold, shipment.accepted, shipment.progressed, asked) == (None, 0, True, 199)
    assert len(shipment.dead(AT)) == 100
    assert shipment.rest == []


def test_a_dead_event_tells_what_a_person_needs() -> None:
    """Its bytes, PostHog's text, where it came from and how often it was tried."""
    shipment = Shipment(chunks_of([2, 2]), **generous)
    server = refuse({2}, REJECTED)
    batch = shipment.next_batch()
    shipment.receive(Retry(1.0, "busy"))
    assert shipment.next_batch() is batch
    deliver(shipment, server)
    assert shipment.dead(at=AT + 5) == [
        DeadEvent(
            project="default",
            event=event(2),
            reason="rejected",
            detail="cannot parse",
            at=AT + 5,
            received_at=AT,
            boot="b",
            monotonic=7,
            marks=0,
            attempts=4,
        )
    ]


def test_a_number_beyond_a_double_is_found_at_once() -> None:
    """What the door cannot afford to see is looked for once a batch is refused: four requests, not twenty."""
    events = [event(number) for number in range(1000)]
    events[700] = b'{"event":"e","properties":{"n":[1,{"x":-1e999}]}}'
    shipment = Shipment([chunk(events)], **generous)
    bad = events[700]
    posts = deliver(shipment, lambda sent: REJECTED if bad in events_in(sent.pieces) else Accepted())
    assert [post.events for post in posts] == [1000, 700, 299, 1]
    assert [dead.event for dead in shipment.dead(AT)] == [bad]


def test_a_wrong_guess_condemns_nobody() -> None:
    """PostHog decides: an odd event that it takes is delivered, the true culprit is found by halving."""
    events = [event(number) for number in range(100)]
    events[3] = b'{"n":1e999}'
    shipment = Shipment([chunk(events)], **generous)
    bad = events[60]
    deliver(shipment, lambda sent: REJECTED if bad in events_in(sent.pieces) else Accepted())
    assert [dead.event for dead in shipment.dead(AT)] == [bad]
    assert shipment.accepted == 99


def replayed(*numbers: int) -> list[Chunk]:
    """Dead events on their way again."""
    burial = Burial(1, "rejected", "no", 1)
    return [replace(chunk([event(number)]), burials=(burial,)) for number in numbers]


def test_a_replayed_event_needs_no_witness() -> None:
    """It had one when it was buried: refused again it is dead again, and nobody is held."""
    shipment = Shipment(replayed(*range(20)), **generous)
    posts = deliver(shipment, refuse(set(range(20)), REJECTED))
    assert (shipment.hold, shipment.rest) == (None, [])
    assert len(shipment.dead(at=AT)) == 20
    assert {dead.burials for dead in shipment.dead(at=AT)} == {(Burial(1, "rejected", "no", 1),)}
    assert len(posts) == 39


def test_replayed_events_travel_apart() -> None:
    """What is refused of them costs no fresh event a request."""
    shipment = Shipment([*chunks_of([10]), *replayed(20, 21), *chunks_of([10])], **generous)
    posts = deliver(shipment, refuse({20}, REJECTED))
    assert [post.events for post in posts] == [10, 2, 10, 1, 1]
    assert len(shipment.dead(at=AT)) == 1


def test_replayed_events_that_are_refused_again_make_way() -> None:
    """What is known after so many requests is settled, and the rest goes behind whatever waits."""
    left: Sequence[Chunk] = replayed(*range(300))
    for _ in range(40):
        shipment = Shipment(left, **generous)
        posts = deliver(shipment, refuse(set(range(0, 300, 2)), REJECTED))
        assert len(posts) <= MOST_REPLAYED
        assert (shipment.hold, shipment.progressed) == (None, True)
        assert len(shipment.dead(AT)) + shipment.accepted + len(shipment.rest) == len(left)
        left = shipment.rest
        if not left:
            break
    assert not left


def test_replayed_events_make_way_once_something_is_known() -> None:
    """Where very many batches come before any is halved, a shipment does not end as it began."""
    numbers = range(3 * MOST_REPLAYED)
    pairs = [
        replace(one, boot=f"b{number // 2}") for number, one in zip(numbers, replayed(*numbers), strict=True)
    ]
    shipment = Shipment(pairs, **generous)
    deliver(shipment, refuse(set(numbers), REJECTED))
    assert shipment.progressed
    assert shipment.rest


SAME, OTHER, THIRD, FOURTH = (f"00000000-0000-4000-8000-00000000000{digit}" for digit in "abcd")


@pytest.mark.parametrize(
    ("uuids", "batches"),
    [
        ([SAME, OTHER], [2]),
        ([SAME, SAME.upper()], [1, 1]),
        ([SAME, OTHER, SAME], [2, 1]),
        ([SAME, "", OTHER], [1, 1, 1]),
        ([f"{SAME} {OTHER}", THIRD], [3]),
        ([f"{SAME} {OTHER}", f"{THIRD} {OTHER}", FOURTH], [2, 3]),
        ([f"{SAME} {SAME}", OTHER, THIRD], [2, 2]),
    ],
)
@pytest.mark.parametrize("burials", [(), (Burial(1, "rejected", "no", 1),)], ids=["fresh", "replayed"])
@pytest.mark.parametrize("protocol", ["v1", "auto"])
def test_events_with_uuids_of_clients_share_a_batch_of_v1(
    protocol: Literal["v1", "auto"], uuids: list[str], batches: list[int], burials: tuple[Burial, ...]
) -> None:
    """As far as they are known to differ: v1 refuses a batch that has one twice."""
    texts = [[b'{"uuid":"%s"}' % one.encode() for one in chunk.split()] for chunk in uuids]
    unread = [b'{"uuid":7}']
    chunks = [replace(chunk(text or unread), marks=GIVEN, burials=burials) for text in texts]
    posts = deliver(Shipment(chunks, **generous, protocol=protocol), lambda _: Accepted())
    assert [post.events for post in posts] == batches


def test_a_lone_event_that_is_too_large_is_a_suspect_too() -> None:
    """With a witness it is buried as `too_large`, and says nothing about the size of batches."""
    shipment = Shipment(chunks_of([64]), **generous)
    deliver(shipment, refuse({5}, Split("HTTP 413")))
    (dead,) = shipment.dead(AT)
    assert (dead.reason, dead.detail, dead.event) == ("too_large", "HTTP 413", event(5))
    assert shipment.split_size is None


def test_the_smallest_batch_that_was_too_large_is_told() -> None:
    """A limit of the server is found by halving, and reported for the worker to stay below."""
    shipment = Shipment(chunks_of([64]), **generous)
    asked = deliver(shipment, lambda batch: Split("HTTP 413") if batch.size > 1000 else Accepted())
    assert shipment.accepted == 64
    assert shipment.split_size == min(batch.size for batch in asked if batch.size > 1000)


def test_suspects_are_kept_where_the_end_came_early() -> None:
    """A hold in the middle condemns nobody, witness or not; what was accepted is not sent again."""
    shipment = Shipment(chunks_of([4]), **generous)
    for verdict in (REJECTED, Accepted(), REJECTED, REJECTED, Refused("key", "HTTP 401")):
        assert shipment.next_batch() is not None
        shipment.receive(verdict)
    assert shipment.next_batch() is None
    assert (shipment.hold, shipment.progressed, shipment.dead(AT)) == ("key", True, [])
    (left,) = shipment.rest
    assert events_in([left]) == [event(2), event(3)]
    assert (left.received_at, left.boot, left.monotonic, left.project) == (AT, "b", 7, "default")


def test_clocks_that_differ_never_share_a_batch() -> None:
    """Each batch has one `sent_at`, which must be true for all of it."""
    chunks = [chunk([event(0)]), chunk([event(1)], step=900_000), chunk([event(2)], step=1_100_000)]
    chunks += [chunk([event(3)], step=1_100_000, boot="another")]
    asked = deliver(Shipment(chunks, **generous), lambda _: Accepted())
    assert [batch.events for batch in asked] == [2, 1, 1]


DAMAGES = {
    "not deflate": {"packed": b"\xff\xff"},
    "another checksum": {"crc": 1},
    "fewer events than it says": {"events": 9},
    "not JSON": {"packed": pack.deflate(b"{" * 99), "size": 99, "crc": pack.crc32(b"{" * 99)},
    "a nesting bomb": {
        "packed": pack.deflate(b"[" * 9999),
        "size": 9999,
        "crc": pack.crc32(b"[" * 9999),
    },
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_chunk_is_set_aside_alone(damage: dict[str, object], place: int) -> None:
    """It is found when it must be opened; its neighbours are delivered, and a hold is not its fault."""
    chunks = chunks_of([8, 8, 8])
    broken = chunks[place] = replace(chunks[place], **damage)
    shipment = Shipment(chunks, **generous)
    while (batch := shipment.next_batch()) is not None:
        shipment.receive(REJECTED if any(piece is broken for piece in batch.pieces) else Accepted())
    assert shipment.damaged == [broken]
    assert (shipment.accepted, shipment.rest, shipment.dead(AT), shipment.hold) == (16, [], [], None)


def test_a_damaged_lone_event_is_damaged_and_not_dead() -> None:
    """A chunk of one event that cannot be opened has no event to bury."""
    broken = replace(chunk([event(0)]), crc=1)
    shipment = Shipment([broken, *chunks_of([3])], **generous)
    while (batch := shipment.next_batch()) is not None:
        shipment.receive(REJECTED if batch.pieces[0] is broken else Accepted())
    assert (shipment.damaged, shipment.accepted, shipment.dead(AT), shipment.hold) == ([broken], 3, [], None)


def test_a_chunk_found_damaged_before_sending_leaves_the_batch() -> None:
    """What `wire.body` could not open is taken out, and the same events go on without it."""
    chunks = chunks_of([2, 2, 2])
    shipment = Shipment(chunks, **generous)
    assert shipment.next_batch() is not None
    shipment.receive(Damaged(chunks[1], "broken"))
    asked = deliver(shipment, lambda _: Accepted())
    assert [piece for batch in asked for piece in batch.pieces] == [chunks[0], chunks[2]]
    assert (shipment.damaged, shipment.progressed) == ([chunks[1]], True)


def test_a_chunk_of_no_events_is_no_batch() -> None:
    """Neither an empty lease nor an empty chunk becomes an empty `batch`, which PostHog answers with 400."""
    empty = chunk([])
    assert Shipment([], **generous).next_batch() is None
    assert Shipment([empty], **generous).next_batch() is None
    shipment = Shipment([empty, *chunks_of([2]), empty, *chunks_of([1])], **generous)
    asked = deliver(shipment, lambda _: Accepted())
    assert [len(batch.pieces) for batch in asked] == [2]
    assert shipment.rest == []


def test_an_event_keeps_its_bytes_through_halving() -> None:
    """What is opened and packed again is byte for byte what was stored: the uuid, the spaces, the escapes."""
    shipment = Shipment(chunks_of([9]), **generous)
    asked = deliver(shipment, refuse({4}, REJECTED))
    sent = {event for batch in asked for event in events_in(batch.pieces)}
    assert sent == {event(number) for number in range(9)}
    assert json.loads(event(4))["event"] == "e4"


def test_a_verdict_without_a_question_is_a_mistake() -> None:
    """The loop that asks and answers out of step is told so."""
    with pytest.raises(ValueError, match="not asked"):
        Shipment(chunks_of([1]), **generous).receive(Accepted())
