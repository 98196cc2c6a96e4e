"""Bearer tokens of other issuers, by OpenID Connect: their keys are fetched from the issuer and kept.

Only listed issuers are ever asked. Verifying never blocks: a key that is not there yet is fetched by the work that
a `Deferred` carries, in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import jwt
import msgspec

from kalamdb.clock import Clock
from kalamdb.errors import Conflict, InvalidRequest
from kalamdb.server.identity import Deferred
from kalamdb.server.secret import is_loopback
from kalamdb.server.tokens import ISSUER, LEEWAY_S, expired_token, invalid_token
from kalamdb.types import Role
from kalamdb.users import USER_ID_LENGTH_MAX, Actor, AuthType, Credentials, OAuthSubject, UserRecord, Users

_ALGORITHMS: Final = ("RS256", "ES256")
_KEYS_KEPT_S: Final = 3600.0
_KEYS_LOST_S: Final = 86_400.0
"""How long the last keys are believed while the issuer does not answer."""
_REFETCH_PAUSE_S: Final = 30.0
"""An issuer is asked at most this often, whatever keys tokens name, and whether it answers or not."""
_TIMEOUT_S: Final = 5.0
_ANSWER_BYTES_MAX: Final = 1 << 20
_KEYS_MAX: Final = 64
_RSA_BITS_MIN: Final = 2048
_KNOWN_ISSUERS: Final = {"google": "https://accounts.google.com"}
_log = logging.getLogger("kalamdb.server.oidc")


@dataclass(frozen=True, slots=True)
class Issuer:
    """One that is listed in the settings."""

    provider: str
    """How users name it in WITH OAUTH; the URL for one of auth.jwt_trusted_issuers."""
    url: str
    audience: str
    jwks_uri: str = ""
    """Empty: told by the issuer."""


def listed_issuers(settings: Mapping[str, Any]) -> list[Issuer]:
    """The issuers of the settings. Raises InvalidRequest for one whose keys could be forged on the way, or whose
    tokens could be meant for another program."""
    found = []
    if settings["oauth.enabled"]:
        for provider in ("google", "github", "azure", "firebase"):
            key = f"oauth.providers.{provider}"
            if settings[f"{key}.enabled"]:
                found.append(_provider(provider, key, settings))
    known = {issuer.url for issuer in found}
    found += [Issuer(url, url, ISSUER) for url in settings["auth.jwt_trusted_issuers"] if url not in known]
    for issuer in found:
        for url in (issuer.url, issuer.jwks_uri or issuer.url):
            if not _is_safe(url):
                raise InvalidRequest(f"the issuer '{url}' must be an https address (http only on this machine)")
    return found


def _provider(provider: str, key: str, settings: Mapping[str, Any]) -> Issuer:
    tenant, client_id = settings[f"{key}.tenant"], settings[f"{key}.client_id"]
    url = settings[f"{key}.issuer"] or _KNOWN_ISSUERS.get(provider, "")
    if not url and provider == "azure" and tenant:
        url = f"https://login.microsoftonline.com/{tenant}/v2.0"
    if not url and provider == "firebase" and client_id:
        url = f"https://securetoken.google.com/{client_id}"
    for name, value in (("issuer", url), ("client_id", client_id)):
        if not value:
            raise InvalidRequest(f"{key} is enabled and has no {name}: set {key}.{name}")
    return Issuer(provider, url, client_id, settings[f"{key}.jwks_uri"])


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))


class IssuerKeys:
    """The public keys of one issuer. Thread-safe."""

    def __init__(self, issuer: Issuer, clock: Clock) -> None:
        self._issuer = issuer
        self._clock = clock
        self._lock = Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_s = self._asked_s = float("-inf")

    def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """The key of an id; without an id the only one there is."""
        keys = self._keys
        if key_id is None:
            return next(iter(keys.values())) if len(keys) == 1 else None
        return keys.get(key_id)

    @property
    def is_stale(self) -> bool:
        """Whether the keys are old enough to be asked for again: one may have been withdrawn."""
        return self._clock.monotonic_s() - self._fetched_s > _KEYS_KEPT_S

    @property
    def may_ask(self) -> bool:
        """Whether the pause since the last question is over."""
        return self._clock.monotonic_s() - self._asked_s >= _REFETCH_PAUSE_S

    def fetch(self) -> None:
        """Ask the issuer, unless somebody just has. Blocks for the network, with a time-out; a failure is logged."""
        with self._lock:
            if not self.may_ask:
                return
            try:
                self._keys = self._read_keys()
                self._fetched_s = self._clock.monotonic_s()
            except (httpx.HTTPError, ValueError, TypeError, KeyError) as exc:
                _log.warning("the keys of issuer '%s' cannot be read: %s", self._issuer.url, exc)
                if self._clock.monotonic_s() - self._fetched_s > _KEYS_LOST_S:
                    self._keys = {}
            finally:
                self._asked_s = self._clock.monotonic_s()

    def _read_keys(self) -> dict[str, jwt.PyJWK]:
        uri = self._issuer.jwks_uri
        with httpx.Client(timeout=_TIMEOUT_S, follow_redirects=False) as client:
            if not uri:
                about = _get(client, self._issuer.url.rstrip("/") + "/.well-known/openid-configuration")
                uri = str(about["jwks_uri"])
                if about.get("issuer") != self._issuer.url or not _is_safe(uri):
                    raise ValueError(f"it names issuer '{about.get('issuer')}' and keys at '{uri}'")
            stated = _get(client, uri)["keys"]
        keys = {}
        for number, key in enumerate(stated[:_KEYS_MAX]):
            if isinstance(key, dict) and key.get("use", "sig") == "sig" and key.get("kty") in ("RSA", "EC"):
                made = _key_of(key)
                if made is not None:
                    keys[str(key.get("kid", number))] = made
        return keys


def _get(client: httpx.Client, url: str) -> dict[str, Any]:
    body = bytearray()
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            body += chunk
            if len(body) > _ANSWER_BYTES_MAX:
                raise ValueError(f"'{url}' answers with more than {_ANSWER_BYTES_MAX} bytes")
    return msgspec.json.decode(body, type=dict[str, Any])


def _key_of(stated: dict[str, Any]) -> jwt.PyJWK | None:
    try:
        key = jwt.PyJWK(stated)
    except jwt.PyJWTError:
        return None
    weak = key.algorithm_name == "RS256" and key.key.key_size < _RSA_BITS_MIN
    return None if weak or key.algorithm_name not in _ALGORITHMS else key


class OidcTokens:
    """Verifies tokens of listed issuers and finds their users. Thread-safe."""

    def __init__(
        self, users: Users, clock: Clock, issuers: Sequence[Issuer], *, auto_provision: bool, default_role: Role
    ) -> None:
        self._users = users
        self._clock = clock
        self._issuers = {issuer.url: (issuer, IssuerKeys(issuer, clock)) for issuer in issuers}
        self._auto_provision = auto_provision
        self._default_role = default_role

    def knows(self, token: str) -> bool:
        """See ForeignTokens."""
        try:
            return jwt.get_unverified_header(token).get("alg") in _ALGORITHMS
        except (jwt.InvalidTokenError, RecursionError):
            return False

    def verify(self, token: str) -> tuple[UserRecord, float]:
        """See ForeignTokens."""
        try:
            claims = jwt.decode(token, options={"verify_signature": False})
            header = jwt.get_unverified_header(token)
        except (jwt.InvalidTokenError, RecursionError, ValueError):
            raise invalid_token() from None
        url = claims.get("iss")
        issuer, keys = self._issuers.get(url, (None, None)) if isinstance(url, str) else (None, None)
        if issuer is None or keys is None:
            raise invalid_token()
        key = keys.find(header.get("kid"))
        if (key is None or keys.is_stale) and keys.may_ask:
            raise Deferred(keys.fetch)
        if key is None or key.algorithm_name != header.get("alg"):
            raise invalid_token()
        claims = self._checked(token, key, issuer)
        return self._user_of(issuer, claims), float(claims["exp"])

    def _checked(self, token: str, key: jwt.PyJWK, issuer: Issuer) -> dict[str, Any]:
        """The claims of a token that its issuer signed for us, and that holds now."""
        try:
            claims = jwt.decode(
                token, key.key, algorithms=[key.algorithm_name], issuer=issuer.url, audience=issuer.audience,
                options={"require": ["exp", "iat", "sub", "iss", "aud"], "verify_exp": False, "verify_iat": False,
                         "verify_nbf": False},
            )  # fmt: skip
            issued_s, expires_s, begins_s = (float(claims.get(name, 0)) for name in ("iat", "exp", "nbf"))
        except (jwt.PyJWTError, TypeError, ValueError, OverflowError, RecursionError):
            raise invalid_token() from None
        now_s = self._clock.now_ms() / 1000
        if not max(issued_s, begins_s) <= now_s + LEEWAY_S:
            raise invalid_token()
        if not now_s < expires_s + LEEWAY_S:
            raise expired_token()
        return claims

    def _user_of(self, issuer: Issuer, claims: dict[str, Any]) -> UserRecord:
        subjects = [OAuthSubject(name, str(claims["sub"])) for name in dict.fromkeys((issuer.provider, issuer.url))]
        for subject in subjects:
            user = self._users.of_subject(subject)
            if user is not None:
                return user
        if self._auto_provision and not self._is_taken(subjects[0]):
            raise Deferred(self._provision(subjects[0], claims))
        raise invalid_token()

    def _is_taken(self, subject: OAuthSubject) -> bool:
        return len(_name_of(subject)) > USER_ID_LENGTH_MAX or self._users.find(_name_of(subject)) is not None

    def _provision(self, subject: OAuthSubject, claims: dict[str, Any]) -> Callable[[], None]:
        def work() -> None:
            credentials = Credentials(auth_type=AuthType.OAUTH, auth_data=subject._asdict())
            email = claims.get("email") if isinstance(claims.get("email"), str) else None
            actor = Actor(_name_of(subject), Role.SYSTEM)
            try:
                self._users.create(_name_of(subject), credentials, self._default_role, email, actor=actor)
            except (Conflict, InvalidRequest) as exc:
                _log.warning("no user was made for subject '%s' of '%s': %s", subject.subject, subject.provider, exc)

        return work


def _name_of(subject: OAuthSubject) -> str:
    """The user that is made for a subject at its first log-in."""
    return f"{subject.provider}:{subject.subject}"
