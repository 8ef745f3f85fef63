"""`capture-agent completion`: prints what makes a shell complete this command."""

import click

from agent.cli.options import unused_config_option

PROGRAM = "capture-agent"
VARIABLE = "_CAPTURE_AGENT_COMPLETE"


@click.command()
@unused_config_option
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def command(shell: str) -> None:
    """Print what makes a shell complete this command.

    \b
    bash:  capture-agent completion bash > /etc/bash_completion.d/capture-agent
    zsh:   capture-agent completion zsh > "${fpath[1]}/_capture-agent"
    fish:  capture-agent completion fish > ~/.config/fish/completions/capture-agent.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from agent.cli import main

    made = get_completion_class(shell)
    if made is None:
        raise AssertionError("click knows all of these shells")
    # The template itself: bash's own `source` would start bash, to ask how old it is.
    click.echo(ShellComplete.source(made(main, {}, PROGRAM, VARIABLE)))
