"""`capture-agent dead-letter`: what PostHog refused and why; sent again, exported or forgotten."""

import sys
from collections.abc import Awaitable, Callable, Sequence

import click
import msgspec

from agent.cli.asking import asked, progress
from agent.cli.letters import Burial, Done, Letter, Shelf
from agent.cli.options import config_option, plain
from agent.cli.output import legible

# Characters of a line of the list: PostHog's words can be long, `show` has them all.
WIDTH = 200
# Of a name or an id, which may take up to 200 characters, so that the reason has room.
NAME_WIDTH = 40
# Ids that one line of a terminal has room for.
MOST_NAMED = 10

DAMAGED = "damaged: not what was written"


def _each_once(_ctx: click.Context, _parameter: click.Parameter, ids: Sequence[int]) -> Sequence[int]:
    """What is asked for twice is done once, and is no letter that is missing."""
    return tuple(dict.fromkeys(ids))


ids_argument = click.argument(
    "ids", metavar="[ID]...", nargs=-1, type=click.IntRange(min=1), callback=_each_once
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(name="dead-letter")
@config_option
@click.pass_context
def command(ctx: click.Context, config_file: str | None) -> None:
    """Look at the events that PostHog refused; send them again, export or forget them.

    Through the running agent or, where none runs, on its buffer's file.
    """
    ctx.find_root().obj = config_file


@command.command("list")
@config_option
@json_option
def list_letters(config_file: str | None, as_json: bool) -> None:
    """List the dead letters, the oldest first."""

    async def work(letters: Shelf) -> None:
        number = 0
        async for letter in letters.all(full=False):
            if as_json:
                click.echo(("," if number else "[") + "\n" + _dumped(letter), nl=False)
            else:
                click.echo(_line(letter))
            number += 1
        if as_json:
            click.echo("\n]" if number else "[]")
        elif not number:
            click.echo("there are no dead letters", err=True)

    _with_shelf(config_file, work)


@command.command()
@click.argument("ident", metavar="ID", type=click.IntRange(min=1))
@config_option
@json_option
def show(config_file: str | None, ident: int, as_json: bool) -> None:
    """Show one dead letter: PostHog's words, its past, and the event as it was sent."""

    async def work(letters: Shelf) -> None:
        letter = await letters.one(ident)
        if letter is None:
            raise _unknown([ident])
        if as_json:
            click.echo(_dumped(letter))
            return
        for name in ("id", "project", "uuid", "event", "distinct_id", "received_at"):
            value = _owner(letter) if name == "project" else str(getattr(letter, name))
            click.echo(f"{name:<12} {plain(value)}")
        for burial in letter.earlier:
            click.echo(f"{'earlier':<12} {_burial(burial)}")
        click.echo(f"{'refused':<12} {_burial(letter)}")
        if letter.damaged:
            forget = f"`capture-agent dead-letter purge {letter.id}` forgets it"
            click.echo(f"{'damaged':<12} not what was written, so it is never sent; {forget}")
        click.echo(legible(msgspec.json.format(bytes(letter.body), indent=2)))

    _with_shelf(config_file, work)


@command.command()
@ids_argument
@config_option
@json_option
def replay(config_file: str | None, ids: Sequence[int], as_json: bool) -> None:
    """Send dead letters again, as they were (same uuid, same time): these, or without an ID all.

    What is refused again becomes a dead letter again, with its past. One that the disk has damaged is not
    sent, and stays until it is purged. Exits 75 where the buffer is full.
    """

    async def work(letters: Shelf) -> None:
        done, total = await _each(letters, ids, letters.replay)
        _tell(done.done, total, "replayed", as_json=as_json)
        if done.damaged:
            _tell_damaged(done.damaged, "not sent")
        if done.full:
            click.echo("capture-agent: the buffer has no room for the others, which stay", err=True)
            click.echo("  try: again when it has drained", err=True)
            raise SystemExit(75)
        if ids and done.done + len(done.damaged) < total:
            raise _unknown(ids)
        if ids and done.damaged:
            raise SystemExit(1)

    _with_shelf(config_file, work)


@command.command()
@ids_argument
@click.option("--all", "everything", is_flag=True, help="All of them, without asking.")
@config_option
@json_option
def purge(config_file: str | None, ids: Sequence[int], everything: bool, as_json: bool) -> None:
    """Forget dead letters for good: these, or without an ID all, which is asked before."""
    if ids and everything:
        raise click.UsageError("give IDs or --all, not both")

    async def work(letters: Shelf) -> None:
        count = (await letters.kept()).kept
        if not ids and not everything and count:
            if not sys.stdin.isatty():
                raise click.UsageError("give the IDs to forget, or --all: there is nobody to ask")
            click.confirm(f"Forget all {count:,} dead letters for good?", abort=True, err=True)
        if ids:
            done, total = await _each(letters, ids, letters.purge)
            found = done.done
        else:
            found, total = await _purge_all(letters)
        _tell(found, total, "purged", as_json=as_json)
        if ids and found < total:
            raise _unknown(ids)

    _with_shelf(config_file, work)


@command.command()
@ids_argument
@config_option
def export(config_file: str | None, ids: Sequence[int]) -> None:
    """Print dead letters as NDJSON: these, or without an ID all.

    Each line is the event, and in `dead_letter` why it was refused. The agent ignores that field, so what was
    mended can be sent with `capture-agent send --stdin`.

    Not so where `dead_letter` has `"other_key": true`: such an event came with a project key of its own,
    which is printed nowhere, and `send` would give it to the source's project instead. `replay` sends it with
    its own key, as it was; what has to be mended is for its sender to send again.

    Letters that the disk has damaged are left out; `show` prints what can be read of one.
    """

    async def work(letters: Shelf) -> None:
        missing, damaged = [], []
        for ident in ids:
            letter = await letters.one(ident)
            if letter is None:
                missing.append(ident)
            elif letter.damaged:
                damaged.append(ident)
            else:
                click.echo(_exported(letter))
        if not ids:
            async for letter in letters.all(full=True):
                if letter.damaged:
                    damaged.append(letter.id)
                else:
                    click.echo(_exported(letter))
        if damaged:
            _tell_damaged(damaged, "left out")
        if missing:
            raise _unknown(missing)
        if ids and damaged:
            raise SystemExit(1)

    _with_shelf(config_file, work)


def _with_shelf(config_file: str | None, work: Callable[[Shelf], Awaitable[None]]) -> None:
    """Do something with the dead letters, wherever they are; tell what goes wrong plainly."""
    asked(config_file, lambda client: work(Shelf(client)))


async def _each(
    letters: Shelf, ids: Sequence[int], do: Callable[[Sequence[int]], Awaitable[Done]]
) -> tuple[Done, int]:
    """Do it to these letters or to all there are: what was done, and how many they were."""
    from agent.buffer import LETTERS_AT_ONCE

    done = Done(0)
    kept = await letters.kept()
    total = len(ids) if ids else kept.kept
    with progress(total, shown=total > LETTERS_AT_ONCE) as advance:
        async for some in letters.pages(ids, kept.newest):
            more = await do(some)
            done = Done(done.done + more.done, more.full, done.damaged + more.damaged)
            advance(len(some))
            if more.full:
                break
    return done, total


async def _purge_all(letters: Shelf) -> tuple[int, int]:
    """Forget all that there are now: how many, and of how many."""
    from agent.buffer import PURGED_AT_ONCE

    found, kept = 0, await letters.kept()
    with progress(kept.kept, shown=kept.kept > PURGED_AT_ONCE) as advance:
        async for done in letters.purge_upto(kept.newest):
            found += done
            advance(done)
    return found, kept.kept


def _tell(found: int, total: int, done: str, *, as_json: bool) -> None:
    if as_json:
        click.echo(f'{{"{done}":{found}}}')
    else:
        click.echo(f"{done} {found:,} of {total:,}")


def _tell_damaged(ids: Sequence[int], what: str) -> None:
    """Which stay where they are, and how to be rid of them."""
    few = len(ids) <= MOST_NAMED
    named = " ".join(map(str, ids[:MOST_NAMED]))
    many = f"{len(ids):,} letters are" if len(ids) > 1 else "1 letter is"
    which = named if few else f"{named} ..."
    click.echo(f"capture-agent: {many} damaged (not what was written), {what}, and kept: {which}", err=True)
    click.echo(f"  try: capture-agent dead-letter purge {named if few else 'ID...'}", err=True)


def _unknown(ids: Sequence[int]) -> SystemExit:
    named = ", ".join(map(str, ids))
    click.echo(f"capture-agent: not every one of these is a dead letter: {named}", err=True)
    click.echo("  try: capture-agent dead-letter list", err=True)
    return SystemExit(1)


def _line(letter: Letter) -> str:
    why = DAMAGED if letter.damaged else f"{letter.reason}: {letter.detail}"
    readable = letter.event or letter.distinct_id
    what = f"{_short(letter.event)} of {_short(letter.distinct_id)}: {why}" if readable else why
    line = plain(f"{letter.id:>7}  {letter.at}  {_owner(letter)}  {what}")
    return _short(line, WIDTH)


def _short(text: str, most: int = NAME_WIDTH) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _owner(letter: Letter) -> str:
    """Whose it is: a key that a client sent has no name."""
    return letter.project + (" (with another key than its own)" if letter.other_key else "")


def _burial(burial: Burial) -> str:
    tries = f"{burial.attempts} request" + ("s" if burial.attempts != 1 else "")
    return plain(f"{burial.at} as {burial.reason} after {tries}: {burial.detail}")


def _dumped(letter: Letter) -> str:
    return legible(msgspec.json.encode(letter))


def _exported(letter: Letter) -> str:
    """The event byte for byte, and one field more."""
    names = ("id", "project", "other_key", "reason", "detail", "at", "attempts")
    why = msgspec.json.encode({name: getattr(letter, name) for name in names})
    return legible(bytes(letter.body)[:-1] + b',"dead_letter":' + why + b"}")
