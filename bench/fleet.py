"""A thousand agents after an hour without PostHog: what it sees when it is back, on virtual time.

    python bench/fleet.py [--agents 1000] [--rate 100] [--picture FILE.svg] [--json]

Each agent is the agent's own `Pace` with the default settings, a queue that fills at a rate, and a server
that answers in 50 ms, or not at all. No second of it is waited for.
"""

import argparse
import heapq
import json
import random
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import NamedTuple

from agent.config import Delivery
from agent.deliver.pace import Pace, Pass
from agent.deliver.verdict import Accepted, Retry

LATENCY = 0.05
DOWN, UP = 60.0, 3660.0  # an hour
END = UP + 1800.0
AWAY = Retry(None, "cannot connect: Connection refused", cut=False)
FIRST_MINUTE = 60


class World:
    """Virtual time: what is to happen, and what PostHog has seen by the second."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.requests: dict[int, int] = {}
        self.drained: list[float] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        """Have something done."""
        self._number += 1
        heapq.heappush(self._agenda, (self.now + seconds, self._number, what))

    def run(self, end: float) -> None:
        """Let time pass."""
        while self._agenda and self._agenda[0][0] < end:
            self.now, _, what = heapq.heappop(self._agenda)
            what()

    def is_up(self) -> bool:
        """Whether PostHog answers."""
        return not DOWN <= self.now < UP


class Agent:
    """One host: events come in steadily, workers carry them away at its pace."""

    def __init__(self, world: World, rate: float, settings: Delivery) -> None:
        self.pace = Pace(settings)
        self._world, self._rate, self._settings = world, rate, settings
        self._taken = rate * world.random.uniform(0, settings.linger)  # hosts do not start in step
        self._workers = 0
        self._alarm = inf
        self._caught_up = False
        self._look()

    def _waiting(self) -> float:
        return self._rate * self._world.now - self._taken

    def _look(self) -> None:
        """A worker is free, or time has passed: take what is there, if the pace allows it."""
        while self._workers < self._settings.concurrency:
            waiting, world = self._waiting(), self._world
            enough = min(self._settings.max_batch_events, max(1.0, self._rate * self._settings.linger))
            if waiting < enough:
                self._sleep((enough - waiting) / self._rate)
                return
            leave = self.pace.admit(world.now)
            if not isinstance(leave, Pass):
                if leave < inf:
                    self._sleep(leave)
                return
            self._send(leave, min(waiting, self._settings.max_batch_events))

    def _sleep(self, seconds: float) -> None:
        """Look again after so long, unless that is to happen earlier anyway."""
        until = self._world.now + max(seconds, 1e-6)
        if until < self._alarm:
            self._alarm = until
            self._world.later(until - self._world.now, lambda: self._wake(until))

    def _wake(self, alarm: float) -> None:
        if alarm == self._alarm:  # else an earlier one took its place
            self._alarm = inf
            self._look()

    def _send(self, leave: Pass, events: float) -> None:
        world = self._world
        self._workers += 1
        self._taken += events
        second = int(world.now)
        world.requests[second] = world.requests.get(second, 0) + 1
        up = world.is_up()
        world.later(LATENCY if up else 0.001, lambda: self._hear(leave, events, up=up))

    def _hear(self, leave: Pass, events: float, *, up: bool) -> None:
        world = self._world
        wait = self.pace.record(leave, Accepted() if up else AWAY, world.now, world.random.uniform)
        if up:
            self._workers -= 1
            if world.now > UP and not self._caught_up and self._waiting() < self._settings.max_batch_events:
                self._caught_up = True
                world.drained.append(world.now - UP)
        else:
            self._taken -= events
            world.later(wait, self._rest_over)
        self._look()

    def _rest_over(self) -> None:
        self._workers -= 1
        self._look()


class Found(NamedTuple):
    """What was seen."""

    agents: int
    steady: float  # requests a second before the outage
    first_minute: float  # the mean after it
    worst_second: float  # of that minute
    peak: float  # of all later seconds
    drained: int  # agents without a backlog at the end
    last_drained: float  # seconds after the return
    by_second: dict[int, int]


def simulate(agents: int, rate: float, seed: int = 1) -> Found:
    """Let a fleet live through the outage."""
    world = World(seed)
    settings = Delivery()
    fleet = [Agent(world, rate, settings) for _ in range(agents)]
    world.run(END)
    steady = sum(world.requests.get(second, 0) for second in range(20, int(DOWN))) / (DOWN - 20)
    back = int(UP)
    minute = [world.requests.get(second, 0) for second in range(back, back + FIRST_MINUTE)]
    later = [world.requests.get(second, 0) for second in range(back + FIRST_MINUTE, int(END))]
    return Found(
        len(fleet),
        steady,
        sum(minute) / len(minute),
        max(minute),
        max(later),
        len(world.drained),
        max(world.drained, default=inf),
        world.requests,
    )


def picture(found: Found) -> str:
    """Requests a second as SVG: the outage's last three minutes and the quarter of an hour after it."""
    width, height, left, bottom = 860, 300, 60, 40
    begin, end = int(UP) - 180, int(UP) + 900
    rates = [found.by_second.get(second, 0) for second in range(begin, end)]
    top = max(*rates, 2 * found.steady) * 1.1

    def x(second: float) -> float:
        return left + (second - begin) / (end - begin) * (width - left - 10)

    def y(rate: float) -> float:
        return height - bottom - rate / top * (height - bottom - 20)

    def text(at: float, up: float, words: str, colour: str = "#444", anchor: str = "end") -> str:
        return f'<text x="{at:.1f}" y="{up:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12"'
    shade = f'x="{x(begin):.1f}" y="20" width="{x(UP) - x(begin):.1f}" height="{height - bottom - 20}"'
    lines = [
        head + ' font-family="sans-serif" role="img">',
        f"<title>{found.agents} agents after an hour without PostHog: requests a second</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/><rect {shade} fill="#f3e3e3"/>',
        text(x(begin) + 8, 36, "PostHog is away", "#8a3030", "start"),
        text(left - 6, y(0) + 4, "0"),
    ]
    steps = (found.steady, "steady", "#2f7d4f"), (2 * found.steady, "twice the steady rate", "#b0771c")
    for rate, name, colour in steps:
        place = f'x1="{left}" x2="{width - 10}" y1="{y(rate):.1f}" y2="{y(rate):.1f}"'
        lines.append(f'<line {place} stroke="{colour}" stroke-dasharray="5 4"/>')
        lines.append(text(width - 12, y(rate) - 4, name, colour))
        lines.append(text(left - 6, y(rate) + 4, f"{rate:,.0f}"))
    points = " ".join(f"{x(begin + at):.1f},{y(rate):.1f}" for at, rate in enumerate(rates))
    lines.append(f'<polyline points="{points}" fill="none" stroke="#1d4f91" stroke-width="1.5"/>')
    lines += [
        text(x(UP + 60 * minutes), height - bottom + 18, f"{minutes} min", anchor="middle")
        for minutes in range(0, 15, 3)
    ]
    words = f"requests a second of {found.agents:,} agents; minutes since PostHog is back"
    lines += [text((left + width) / 2, height - 6, words, anchor="middle"), "</svg>"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate, and tell; the exit code is 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0, help="events a second of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="write the rate over time there, as SVG")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = simulate(arguments.agents, arguments.rate, arguments.seed)
    if arguments.picture:
        arguments.picture.write_text(picture(found))
    if arguments.json:
        print(json.dumps({name: value for name, value in found._asdict().items() if name != "by_second"}))
    else:
        print(f"{found.agents:,} agents, {arguments.rate:g} events/s each, an hour without PostHog")
        for name, rate in (
            ("steady", found.steady),
            ("first minute, mean", found.first_minute),
            ("first minute, at most", found.worst_second),
            ("later, at most", found.peak),
        ):
            print(f"{name:<22} {rate:8,.0f} requests/s = {rate / found.steady:.2f} times steady")
        late = f"{found.last_drained:,.0f} s"
        print(f"drained {found.drained:,} of {found.agents:,}, the last {late} after the return")
    if found.worst_second >= 2 * found.steady or found.drained < found.agents:
        sys.exit(1)


if __name__ == "__main__":
    main()
