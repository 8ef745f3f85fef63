"""`capture-agent run`: the agent, in the foreground."""

import click

from agent.cli.options import config_option


@click.command()
@config_option
def command(config_file: str | None) -> None:
    """Run the agent in the foreground; logs go to stderr.

    Without --config: /etc/capture-agent/config.toml if it exists, else built-in defaults with
    CAPTURE_AGENT_API_KEY and CAPTURE_AGENT_HOST from the environment. SIGHUP has it read its configuration
    anew, without losing an event or a connection.
    """
    from agent.signals import ending_at_once, hold_signals

    hold_signals()

    import os
    from contextlib import nullcontext
    from functools import partial

    import structlog
    import trio

    from agent import crash, logs, notify, systemd
    from agent.app import Agent, run_until_signalled
    from agent.cli.options import plainly, read_text, understood
    from agent.cli.places import make_folders
    from agent.handover import found
    from agent.reload import Anew, check_command, replace_process
    from agent.trust import exposed

    with plainly():
        crash.arm(os.environ)
    handed = found(os.environ)
    # What another agent has left must go on; before, a file may be one that never ends (a FIFO, a lost disk).
    with plainly(), ending_at_once() if handed is None else nullcontext():
        text = (handed and handed.config) or read_text(config_file)
        config = understood(text)
    withheld = logs.set_up(config.log.level, config.log.format, os.environ)
    with plainly():
        passed = systemd.passed(os.environ)
        if handed is not None:
            passed = systemd.Passed(handed.passed, systemd.NOT_PASSED, handed.own)
        make_folders(config)
        for place, what, hint in exposed(config, text, os.geteuid()):
            structlog.get_logger("agent").warning(what, place=place, hint=hint)
        agent = Agent(
            config,
            passed,
            notify.notices(os.environ),
            handed=handed,
            anew=Anew(partial(read_text, config_file), understood, check_command(config_file)),
        )
        try:
            trio.run(partial(run_until_signalled, agent, hangs_up=os.isatty(0) or os.isatty(2)))
        finally:
            withheld.close()
        if agent.handover is not None:
            replace_process(agent.handover)
