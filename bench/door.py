"""Measures the door alone: what a thousand lines of JSON cost to validate, complete and pack.

    python bench/door.py [--runs 21] [--beside CHECKOUT]

With `--beside` another checkout of the agent is measured in turn with this one, and the median of the ratios
told: a change to the hot path is judged by it, as both meet the same neighbours on a shared machine.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINES, READ_BYTES, ROUNDS = 1000, 32 * 1024, 100
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64)",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7)",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X)",
)


def event(number: int) -> bytes:
    """A line like the loader's: about 340 bytes, no two alike."""
    mixed = number * 2654435761 % 2**32
    properties = {
        "n": number,
        "plan": ("free", "pro", "scale", "enterprise")[mixed >> 8 & 3],
        "$current_url": f"https://shop.example.com/products/{mixed % 5000}?ref={mixed >> 12:x}",
        "amount": mixed % 50000 / 100,
        "$session_id": f"{mixed:08x}-{mixed & 0xFFFF:04x}-7{mixed >> 5 & 0xFFF:03x}-8000-{mixed * 31:012x}",
        "user_agent": AGENTS[mixed % 3],
        "screen_width": 800 + mixed % 1200,
        "logged_in": mixed % 2 == 0,
        "country": "DE",
    }
    name = ("$pageview", "signup", "checkout started", "item added", "search")[mixed % 5]
    line = {"event": name, "distinct_id": f"user-{mixed % 100000}", "properties": properties}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def measure() -> float:
    """CPU milliseconds for a thousand lines, with the agent that is first on the path."""
    from agent.events import Instant, Read
    from agent.texts import RANDOM_BITS
    from agent.vouch import Door, Rules

    at = Instant(wall=1_790_000_000_000_000, monotonic=10_000_000, boot="0" * 32)
    reads, some = [], b""
    for number in range(LINES):
        some += event(number)
        if len(some) >= READ_BYTES or number == LINES - 1:
            reads.append(Read(some, at))
            some = b""
    rules = Rules(
        source="app",
        project="default",
        properties={"$lib": "capture-agent", "$lib_version": "1.0.0", "$geoip_disable": True},
        distinct_id="",
        max_event=900 * 1024,
        max_batch_events=1000,
        max_batch_size=5 * 1024 * 1024,
    )
    door = Door(rules)
    gc.collect()
    gc.freeze()  # as the agent does: what is loaded is not looked through again
    began = time.process_time()
    for number in range(ROUNDS):
        vouched = door.vouch(reads, number % 2**RANDOM_BITS)
        if sum(chunk.events for chunk in vouched.chunks) != LINES:
            sys.exit(f"bench: the door refused {vouched.rejects[:1]}")
    return (time.process_time() - began) / ROUNDS * 1000


def measured(checkout: Path) -> float:
    """The same in a process of its own."""
    command = [sys.executable, str(HERE / "door.py"), "--once"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Measure, in turn where there are two."""
    parser = argparse.ArgumentParser(description="What the door costs.")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(measure())
        return
    checkouts = [HERE.parent] + ([asked.beside.resolve()] if asked.beside else [])
    figures: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
    for _ in range(asked.runs):
        for checkout in checkouts:
            figures[checkout].append(measured(checkout))
    for checkout in checkouts:
        median = statistics.median(figures[checkout])
        print(f"{checkout}: {median:.2f} ms for {LINES} lines (median of {asked.runs})")
    if asked.beside:
        pairs = zip(*figures.values(), strict=True)
        print(f"ratio: {statistics.median(this / other for this, other in pairs):.3f}")


if __name__ == "__main__":
    main()
