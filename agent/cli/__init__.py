"""The command `capture-agent`: one module a verb, each loaded only when it is asked for."""

import os
import resource
from importlib import import_module
from typing import Any

import click

from agent import __version__
from agent.cli.output import interruptible, open_streams

# The verbs in the order in which a person meets them, and the line that `--help` shows for each.
VERBS = {
    "demo": "See the whole way of an event, with no configuration.",
    "run": "Run the agent in the foreground.",
    "check": "Validate a configuration and print it resolved.",
    "send": "Send events through a running agent.",
    "status": "Show what a running agent does.",
    "top": "The same, live, with rates and pictures.",
    "tail": "Show events as they pass.",
    "doctor": "Find what is wrong, and say what to do.",
    "dead-letter": "List, show, replay, purge or export what PostHog refused.",
    "export": "Print the events in the buffer.",
    "backup": "Copy the buffer's database to a file.",
    "sink": "Stand in for PostHog on this host.",
    "completion": "Print what makes a shell complete this command.",
    "man": "Print the manual page.",
}


class _Verbs(click.Group):
    """Knows its verbs without loading them: `--help` must not wait for an HTTP server to load."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command, with streams that it can rely on."""
        from agent.cli.options import plainly

        open_streams()
        with plainly():
            return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; Ctrl-C is told from a question that was denied, which click calls the same."""
        with interruptible():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"agent.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            from difflib import get_close_matches

            close = get_close_matches(args[0], VERBS, 1)
            meant = f" Did you mean {close[0]}?" if close else f" There are: {', '.join(VERBS)}."
            raise click.UsageError(f"There is no command {args[0]!r}.{meant}", ctx) from None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="capture-agent")
@click.option(
    "--config", "config_file", metavar="FILE", type=click.Path(dir_okay=False), help="The configuration."
)
@click.pass_context
def main(ctx: click.Context, config_file: str | None) -> None:
    """Take events from local processes and lose none on the way to PostHog.

    Begin with `capture-agent demo`.
    """
    _leave_no_core()
    ctx.obj = config_file
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":  # as rich does it (no-color.org)
        ctx.color = False


def _leave_no_core() -> None:
    """Whatever crashes leaves no copy of its memory, which holds keys and events.

    A limit of 0 holds for files only: a program that core_pattern names gets it all the same. At 1 byte Linux
    makes neither (fs/coredump.c). Who needs one asks for it: prlimit --core=unlimited --pid PID.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    least = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (least, hard))
