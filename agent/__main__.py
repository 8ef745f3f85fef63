"""Where `capture-agent` begins, and `python -m agent`: Ctrl-C ends it without a word while it loads, too."""

# What a shell says of a command that Ctrl-C has ended, as in `cli/output.py`, which is not loaded yet.
INTERRUPTED = 130


def main() -> None:
    """Load the commands and run the one that is asked for."""
    try:
        from agent.cli import main as command

        command(prog_name="capture-agent")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
