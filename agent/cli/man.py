"""`capture-agent man`: prints the manual page, made of the same texts as `--help`."""

import click

from agent.cli.options import unused_config_option


@click.command()
@unused_config_option
def command() -> None:
    """Print the manual page, in roff.

    \b
    capture-agent man | man -l -
    capture-agent man > /usr/local/share/man/man1/capture-agent.1
    """
    import os
    from datetime import UTC, datetime

    from agent import __version__
    from agent.cli import main
    from agent.cli.roff import page

    # What packages are built with, so that they come out the same (reproducible-builds.org).
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    day = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    click.echo(page(main, version=__version__, day=f"{day:%Y-%m-%d}"), nl=False)
