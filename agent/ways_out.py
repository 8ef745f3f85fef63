"""Tries, before anything is opened, the ways by which deliveries are to leave the host."""

from importlib import import_module

from agent.config import Config


def try_ways_out(config: Config) -> None:
    """Certificates and proxies that cannot be used are told now, not once events have been taken.

    The HTTP client takes long to load, so it is only where there is something to try. Raises `AgentError`.
    """
    for project in config.projects:
        settings = project.delivery
        if settings.ca_file or settings.client_cert or settings.proxy:
            import_module("agent.deliver.client").Client(settings)
