"""Coverage-guided fuzzing of what reads hostile bytes.

    python tests/fuzz/fuzz.py TARGET [CORPUS...] [-max_total_time=60] [other options of libFuzzer]

TARGET is one of `TARGETS`. What fails is kept by libFuzzer as a file `crash-...` in the current folder.
"""

import json
import sys
from collections.abc import Callable
from datetime import UTC

import atheris

with atheris.instrument_imports(include=["agent"]):
    from agent.decode import capture as capture_v0
    from agent.decode import capture_v1
    from agent.decode.lines import Format
    from agent.decode.logfmt import Logfmt
    from agent.decode.objects import Json
    from agent.decode.request import Posted, Request
    from agent.decode.syslog import Syslog
    from agent.events import Instant, Read
    from agent.pack import inflate
    from agent.vouch import Door, Rules

AT = Instant(1_795_000_000_123_456, 1, "boot")
LONGEST = 4096


def _door(form: Format) -> Door:
    rules = Rules(
        source="fuzz",
        project="default",
        properties={"$lib": "capture-agent", "site": "berlin"},
        distinct_id="host",
        max_event=LONGEST,
        max_batch_events=1000,
        max_batch_size=2**20,
    )
    return Door(rules, form)


def lines_of(form: Format) -> Callable[[bytes], None]:
    """Lines through a door: nothing is raised, each is counted once, and what is let in is what it says."""
    door = _door(form)

    def fuzz(data: bytes) -> None:
        decoded = door.vouch([Read(data + b"\n", AT), Read(b"\n" + data[::2] + b"\n", AT)], 1)
        taken = 0
        for chunk in decoded.chunks:
            events = json.loads(b"[" + inflate(chunk.packed, chunk.size, chunk.crc) + b"]")
            assert len(events) == chunk.events
            for event in events:
                assert event["event"]
                assert event["distinct_id"].strip()
                assert isinstance(event["properties"], dict)
            taken += chunk.events
        assert taken + len(decoded.rejects) == sum(decoded.lines) == decoded.tally.received

    return fuzz


def capture(data: bytes) -> None:
    """A request by either protocol: an answer as PostHog has it, or as many lines as it tells of."""
    form, body = (data[0], data[1:]) if data else (0, b"")
    headers = {
        "content-type": ("application/json", "application/x-www-form-urlencoded")[form & 1],
        "content-encoding": ("", "gzip", "base64", "lz64")[form >> 1 & 3],
        "authorization": "Bearer phc_test",
        "posthog-sdk-info": "fuzz/1",
        "posthog-attempt": "1",
        "posthog-request-id": "0197a5c0-7e1c-7abc-8def-0123456789ab",
        "posthog-request-timestamp": "2026-01-02T03:04:05Z",
        "user-agent": "fuzz",
    }
    path = ("/batch", "/e/", "/engage", "/i/v1/analytics/events")[form >> 3 & 3]
    reader = capture_v1 if path.startswith("/i/v1") else capture_v0
    found = reader.read_request(Request(path, "", headers, body, AT, 100_000, bool(form & 32)))
    if isinstance(found, Posted):
        assert found.lines.count(b"\n") == found.events > 0
        HTTP_DOOR.vouch([Read(found.lines, AT)], 1)
        for refused in ({}, {0: "missing_event"}, dict.fromkeys(range(found.events), "buffer_full")):
            assert reader.answer(found, refused).status in (200, 204, 400, 503)
    else:
        assert 200 <= found.status < 600


HTTP_DOOR = _door(Json(LONGEST))
TARGETS: dict[str, Callable[[bytes], None]] = {
    "ndjson": lines_of(Json(LONGEST)),
    "capture": capture,
    "logfmt": lines_of(Logfmt(LONGEST)),
    "syslog": lines_of(
        Syslog(event="{app}", distinct_id="{hostname}", hostname="host", zone=UTC, max_event=LONGEST)
    ),
}


def main() -> None:
    """Fuzz one target."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py {'|'.join(TARGETS)} [CORPUS...] [OPTIONS]")
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
