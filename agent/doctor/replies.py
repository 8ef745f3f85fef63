"""What PostHog's answer to the doctor's question means, or that none came, in words for people."""

from collections.abc import Mapping

import msgspec

from agent.advice import HOLDS
from agent.deliver.verdict import Accepted, Refused, Rejected, Retry, Verdict
from agent.doctor.finding import Finding, error, ok, warning

# Events keep their instants whatever the clock does, but certificates and people go by it.
CLOCK_SECONDS = 60

# What OpenSSL says of a certificate (X509_verify_cert_error_string(3)), and what is to be done.
CERTIFICATES: Mapping[str, str] = {
    "expired": "see that this host's clock is right (date); else the server's certificate must be renewed",
    "not yet valid": "set this host's clock: the certificate is of a later day than it shows",
    "self-signed": "a proxy that opens TLS, or a server of your own: put its authority into delivery.ca_file",
    "self signed": "a proxy that opens TLS, or a server of your own: put its authority into delivery.ca_file",
    "unable to get": "install ca-certificates, or put the authority of the server or of a proxy that opens"
    " TLS into delivery.ca_file",
    "mismatch": "it is another name's certificate: mend project.host, or look for a proxy on the way",
}
OTHER_CERTIFICATE = "see who answers there: openssl s_client -connect HOST:443"


def failure(answer: Retry | Refused, where: str, asked: str) -> Finding:
    """Nothing came back that could be read."""
    if isinstance(answer, Refused):
        return error("host", where, f"{asked}: {answer.why}", HOLDS[answer.hold])
    reason = answer.reason
    if "certificate" in reason:
        hint = next((hint for words, hint in CERTIFICATES.items() if words in reason), OTHER_CERTIFICATE)
        return error("tls", where, f"{asked}: {reason}", hint)
    if "SSL" in reason or "TLS" in reason.upper() or "wrong version" in reason:
        hint = "see that the port speaks TLS and project.host says https:// or http:// as it is"
        return error("tls", where, f"{asked}: {reason}", hint)
    hint = "see that a firewall lets this host out (curl -v), or set delivery.proxy where only a proxy may"
    return error("network", where, f"{asked}: {reason}", hint)


def reading(verdict: Verdict, status: int, body: bytes, where: str, asked: str, *, delivers: bool) -> Finding:
    """What an answer means; `delivers` where events are known to be taken there."""
    match verdict:
        case Accepted():
            return _answer(body, where, asked)
        case Refused(hold="key", why=why):
            return error("key", where, f"{asked} does not know this key: {why}", HOLDS["key"])
        case Refused(hold="billing", why=why):
            return error("billing", where, f"{asked}: {why}", HOLDS["billing"])
        case Refused(why=why) if status == 404 and delivers:
            what = f"cannot be checked: {asked} takes events, but has no /flags ({why})"
            hint = (
                "look in PostHog whether events arrive: a key of no project is answered as if all were well"
            )
            return warning("key", where, what, hint)
        case Refused(why=why):
            return error("host", where, f"{asked} is not PostHog: {why}", HOLDS["host"])
        case Retry(reason=reason) if status == 429:
            return warning(
                "key", where, f"{asked} answers, but is asked too often: {reason}", "ask again later"
            )
        case Retry(reason=reason):
            hint = "wait: events do so too; https://status.posthog.com tells of PostHog's own outages"
            return error("host", where, f"{asked} does not work now: {reason}", hint)
        case Rejected(reason=reason):
            hint = "see that project.host is PostHog's address and no proxy changes what passes"
            return error("host", where, f"{asked} did not understand the question: {reason}", hint)
        case _:
            return error("host", where, f"{asked} is not PostHog: HTTP {status}", HOLDS["host"])


def _answer(body: bytes, where: str, asked: str) -> Finding:
    """PostHog's own answer has the flags, of which there may be none; others may say 200 to anything."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        said = None
    if not isinstance(said, dict) or not said.keys() & {"flags", "featureFlags"}:
        return error("host", where, f"{asked} answers, but not as PostHog does", HOLDS["host"])
    if said.get("quotaLimited"):
        what = f"{asked} knows the key, but the project is over a limit of its bill"
        return warning("billing", where, what, HOLDS["billing"])
    return ok("key", where, f"{asked} knows the key")


def clock(server: int | None, wall: int, where: str) -> list[Finding]:
    """How this host's clock stands to PostHog's (both µs); nothing where PostHog does not tell."""
    if server is None:
        return []
    ahead = (wall - server) / 1_000_000
    if abs(ahead) <= CLOCK_SECONDS:
        return [ok("clock", where, "this host's clock agrees with PostHog's")]
    what = f"this host's clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} PostHog's"
    hint = "set it, and let NTP keep it (timedatectl set-ntp true); events keep their instants meanwhile"
    return [warning("clock", where, what, hint)]
