"""A secret that a configuration does not hold itself but refers to: in a file, a variable, a credential."""

import re
from collections.abc import Callable, Mapping

# How environment variables are called; a secret is hardly ever in capitals.
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")

FORMS = 'a text, { file = "..." }, { env = "NAME" } or { credential = "NAME" }'

NO_CREDENTIALS = "systemd passes credentials to the agent's unit only"


def look_up(given: object, env: Mapping[str, str], read_text: Callable[[str], str]) -> str:
    """The secret, without white space around it. ValueError says why there is none; it holds no secret.

    A secret may itself stand where a name belongs: what could be one is not told.

    `read_text` raises OSError where it cannot.
    """
    match given:
        case str():
            return given.strip()
        case {"file": str(path), **rest} if not rest:
            return _read(path, path if "/" in path else "the file that it names", read_text)
        case {"credential": str(name), **rest} if not rest:
            if (folder := env.get("CREDENTIALS_DIRECTORY")) is not None:
                return _read(f"{folder}/{name}", f"the credential that it names, in {folder}", read_text)
            instead = 'start it by that, or use { file = "..." } or { env = "NAME" }'
            raise ValueError(f"{NO_CREDENTIALS} (LoadCredential=NAME:... in it): {instead}")
        case {"env": str(name), **rest} if not rest:
            if text := env.get(name):
                return text.strip()
            shown = name if _VARIABLE.fullmatch(name) else "that it names"
            raise ValueError(f"the environment variable {shown} is not set")
    raise ValueError(f"must be {FORMS}")


def _read(path: str, shown: str, read_text: Callable[[str], str]) -> str:
    try:
        return read_text(path).strip()
    except OSError as error:
        raise ValueError(f"{shown}: {error.strerror or 'cannot be read'}") from error
    except ValueError as error:  # also a NUL in the path
        raise ValueError(f"{shown}: not a text") from error
