"""Where the agent's sockets and files are on this host when nothing says otherwise."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent.config import Config, Paths


def folders() -> "Paths":
    """Where sockets and buffer are on this host when nothing says otherwise."""
    from agent.config import default_paths

    return default_paths(
        os.environ,
        runtime_writable=_may_make("/run/capture-agent"),
        state_writable=_may_make("/var/lib/capture-agent"),
        uid=os.getuid(),
        tmp=_temporary(),
    )


def _may_make(folder: str) -> bool:
    place = folder if os.path.isdir(folder) else os.path.dirname(folder)
    return os.access(place, os.W_OK)


def _temporary() -> str:
    """The folder for temporary files; only its usual name where nothing can be written."""
    import tempfile

    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return "/tmp"  # noqa: S108  in a read-only container; who makes a folder in it is told why it fails


def make_folders(config: "Config") -> None:
    """Make the default folders where the configuration uses them; any other is its owner's business."""
    from agent import AgentError

    own = folders()
    used = [os.path.dirname(source.path) for source in config.sources if hasattr(source, "path")]
    used += [os.path.dirname(config.admin.socket), os.path.dirname(config.buffer.path)]
    for folder in {own.runtime, own.state} & set(used):
        # Only what is the system's may be entered by others; sockets have modes of their own.
        mode = 0o755 if folder.startswith(("/run/", "/var/")) else 0o700
        # The folders above it are made as the umask says, which may be to let everybody write.
        umask = os.umask(0o077)
        os.umask(umask | 0o022)
        try:
            os.makedirs(folder, mode, exist_ok=True)
            found = os.lstat(folder)
        except OSError as error:
            raise AgentError(
                f"{folder}: cannot make this folder: {error.strerror}",
                "set other paths in the configuration, or run as a user that may",
            ) from error
        finally:
            os.umask(umask)
        # In a shared temporary folder somebody else could have made it first, to read what we write.
        if mode == 0o700 and (found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000):
            raise AgentError(
                f"{folder}: belongs to somebody else or is open to others",
                f"remove it, or close it: chmod 700 {folder}",
            )


def runtime_folders() -> list[str]:
    """Where a running agent's sockets may be, the likeliest first."""
    from agent.config import default_paths

    here = folders().runtime
    others = [
        default_paths(
            os.environ,
            runtime_writable=system,
            state_writable=system,
            uid=os.getuid(),
            tmp=_temporary(),
        ).runtime
        for system in (True, False)
    ]
    return list(dict.fromkeys([here, *others]))
