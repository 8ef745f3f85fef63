"""capture-agent: takes events from local processes and loses none on the way to PostHog."""

__version__ = "0.1.0"


class AgentError(Exception):
    """Something a person must act on: what is wrong, and in `hint` what to do next.

    Ends in `cli/` as two lines on stderr and `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
