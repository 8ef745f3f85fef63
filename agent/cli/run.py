"""`capture-agent run`: the agent, in the foreground."""

import click

from agent.cli.options import config_option


@click.command()
@config_option
def command(config_file: str | None) -> None:
    """Run the agent in the foreground; logs go to stderr.

    Without --config: /etc/capture-agent/config.toml if it exists, else built-in defaults with
    CAPTURE_AGENT_API_KEY and CAPTURE_AGENT_HOST from the environment.
    """
    import os

    import trio

    from agent import logs, notify, systemd
    from agent.app import Agent, run_until_signalled
    from agent.cli.options import load_config, plainly
    from agent.cli.places import make_folders

    config = load_config(config_file)
    withheld = logs.set_up(config.log.level, config.log.format, os.environ)
    with plainly():
        passed = systemd.passed(os.environ)
        make_folders(config)
        try:
            trio.run(run_until_signalled, Agent(config, passed, notify.notices(os.environ)))
        finally:
            withheld.close()
