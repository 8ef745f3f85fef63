"""`python -m agent`, the same as `capture-agent`."""

from agent.cli import main

main(prog_name="capture-agent")
