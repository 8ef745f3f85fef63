"""A secret that a configuration does not hold itself but refers to: in a file, a variable, a credential."""

from collections.abc import Callable, Mapping

FORMS = 'a text, { file = "..." }, { env = "NAME" } or { credential = "NAME" }'

NO_CREDENTIALS = "systemd passes credentials to the agent's unit only"


def look_up(given: object, env: Mapping[str, str], read_text: Callable[[str], str]) -> str:
    """The secret, without white space around it. ValueError says why there is none; it holds no secret.

    `read_text` raises OSError where it cannot.
    """
    match given:
        case str():
            return given.strip()
        case {"file": str(path), **rest} if not rest:
            return _read(path, read_text)
        case {"credential": str(name), **rest} if not rest:
            if (folder := env.get("CREDENTIALS_DIRECTORY")) is not None:
                return _read(f"{folder}/{name}", read_text)
            instead = 'start it by that, or use { file = "..." } or { env = "NAME" }'
            raise ValueError(f"{NO_CREDENTIALS} (LoadCredential={name}:...): {instead}")
        case {"env": str(name), **rest} if not rest:
            if text := env.get(name):
                return text.strip()
            raise ValueError(f"the environment variable {name} is not set")
    raise ValueError(f"must be {FORMS}")


def _read(path: str, read_text: Callable[[str], str]) -> str:
    try:
        return read_text(path).strip()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text") from error
