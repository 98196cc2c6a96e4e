"""Bearer tokens of other issuers, against an issuer that runs on this machine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import kalamdb
from kalamdb.clock import SystemClock
from kalamdb.config import Settings
from kalamdb.database import Database
from kalamdb.errors import InvalidRequest, Unauthenticated
from kalamdb.server.identity import Authenticator, Deferred
from kalamdb.server.oidc import Issuer, OidcTokens, listed_issuers
from kalamdb.server.tokens import Tokens
from kalamdb.types import Role
from tests.server.conftest import JWT_SECRET, Serve

RSA_KEY = rsa.generate_private_key(65537, 2048)
WEAK_KEY = rsa.generate_private_key(65537, 1024)
OTHER_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


class SteppedClock(SystemClock):
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_ms(self) -> int:
        return super().now_ms() + int(self.ahead_s * 1000)

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


class LocalIssuer:
    """An issuer on 127.0.0.1; counts what it is asked, and can be told to lie or to fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.keys: dict[str, Any] = {"r": RSA_KEY, "e": EC_KEY, "weak": WEAK_KEY}
        self.fails = False
        self.lies: dict[str, Any] = {}
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                about = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys", **issuer.lies}
                body = json.dumps(about if "openid" in self.path else {"keys": issuer.jwks()}).encode()
                self.send_response(500 if issuer.fails else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def jwks(self) -> list[dict[str, Any]]:
        """The public keys, and a symmetric one that nobody may use."""
        found: list[dict[str, Any]] = [{"kty": "oct", "kid": "o", "k": "c2VjcmV0"}]
        for key_id, key in self.keys.items():
            algorithm = jwt.algorithms.ECAlgorithm if key is EC_KEY else jwt.algorithms.RSAAlgorithm
            found.append({**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": key_id, "use": "sig"})
        return found

    def token(self, key: Any = RSA_KEY, key_id: str | None = "r", algorithm: str = "RS256", **claims: Any) -> str:
        """A token of subject s-1; None leaves a claim out."""
        now_s = int(time.time())
        stated = {"iss": self.url, "sub": "s-1", "aud": "kalamdb", "iat": now_s, "exp": now_s + 600, **claims}
        given = {name: value for name, value in stated.items() if value is not None}
        return jwt.encode(given, key, algorithm, headers={} if key_id is None else {"kid": key_id})

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def weak_token(issuer: LocalIssuer) -> str:
    """A token signed by a key that is too short, which the library warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jwt.warnings.InsecureKeyLengthWarning)
        return issuer.token(WEAK_KEY, "weak")


@pytest.fixture
def issuer() -> Iterator[LocalIssuer]:
    made = LocalIssuer()
    yield made
    made.close()


@pytest.fixture
def db(issuer: LocalIssuer) -> Iterator[Database]:
    """A database whose user anna is the issuer's subject s-1."""
    with kalamdb.connect(":memory:", **{"auth.bcrypt_cost": 4}) as database:
        subject = json.dumps({"provider": issuer.url, "subject": "s-1"})
        database.execute(f"CREATE USER anna WITH OAUTH '{subject}' ROLE service")
        yield database


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


Make = Callable[..., Authenticator]


@pytest.fixture
def make(db: Database, issuer: LocalIssuer, clock: SteppedClock) -> Iterator[Make]:
    """Makes authenticators that list the issuer."""
    made: list[Authenticator] = []

    def make_(*, auto_provision: bool = False, audience: str = "kalamdb", provider: str = "") -> Authenticator:
        users = db.context.users
        listed = [Issuer(provider or issuer.url, issuer.url, audience)]
        foreign = OidcTokens(users, clock, listed, auto_provision=auto_provision, default_role=Role.USER)
        made.append(Authenticator(users, Tokens(JWT_SECRET, clock, access_s=60), clock, foreign))
        return made[-1]

    yield make_
    for one in made:
        one.close()


def authenticate(authenticator: Authenticator, token: str) -> tuple[str, Role]:
    """User and role of a token; what is refused raises."""
    identity = asyncio.run(authenticator.authenticate(f"Bearer {token}"))
    return identity.user, identity.role


def code(authenticator: Authenticator, token: str) -> str:
    """The code of the refusal of a token."""
    with pytest.raises(Unauthenticated) as caught:
        authenticate(authenticator, token)
    return caught.value.code


def test_tokens_of_both_kinds_of_keys_name_their_user(make: Make, issuer: LocalIssuer) -> None:
    authenticator = make()
    assert authenticate(authenticator, issuer.token()) == ("anna", Role.SERVICE)
    assert authenticate(authenticator, issuer.token(EC_KEY, "e", "ES256")) == ("anna", Role.SERVICE)
    assert authenticate(authenticator, issuer.token(aud=["x", "kalamdb"])) == ("anna", Role.SERVICE)
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]


def test_the_first_verification_is_deferred_and_never_blocks(make: Make, issuer: LocalIssuer) -> None:
    authenticator = make()
    with pytest.raises(Deferred):
        authenticator.verify(issuer.token())
    assert issuer.asked == []


@pytest.mark.parametrize(
    "forge, expected",
    [
        (lambda i: i.token(OTHER_KEY), "INVALID_CREDENTIALS"),
        (lambda i: weak_token(i), "INVALID_CREDENTIALS"),
        (lambda i: i.token(EC_KEY, "r", "ES256"), "INVALID_CREDENTIALS"),
        (lambda i: i.token(aud="another"), "INVALID_CREDENTIALS"),
        (lambda i: i.token(aud=None), "INVALID_CREDENTIALS"),
        (lambda i: i.token(sub=None), "INVALID_CREDENTIALS"),
        (lambda i: i.token(sub="s-2"), "INVALID_CREDENTIALS"),
        (lambda i: i.token(sub="anna"), "INVALID_CREDENTIALS"),
        (lambda i: i.token(exp=None), "INVALID_CREDENTIALS"),
        (lambda i: i.token(nbf=int(time.time()) + 600), "INVALID_CREDENTIALS"),
        (lambda i: i.token(key_id=None), "INVALID_CREDENTIALS"),
        (lambda i: i.token(exp=int(time.time()) - 90), "TOKEN_EXPIRED"),
        (lambda i: i.token("", "r", "none"), "INVALID_CREDENTIALS"),
        (lambda i: i.token(JWT_SECRET, "r", "HS256"), "INVALID_CREDENTIALS"),
        (lambda i: i.token(JWT_SECRET, "o", "HS256", iss="kalamdb", role="service"), "INVALID_CREDENTIALS"),
    ],
)
def test_a_token_that_the_issuer_did_not_sign_for_us_is_refused(
    make: Make, issuer: LocalIssuer, forge: Callable[[LocalIssuer], str], expected: str
) -> None:
    authenticator = make()
    assert authenticate(authenticator, issuer.token())[0] == "anna"
    assert code(authenticator, forge(issuer)) == expected


def test_an_issuer_that_is_not_listed_is_never_asked(make: Make, issuer: LocalIssuer) -> None:
    other = LocalIssuer()
    try:
        assert code(make(), other.token()) == "INVALID_CREDENTIALS"
        assert (other.asked, issuer.asked) == ([], [])
    finally:
        other.close()


def test_unknown_keys_ask_again_but_not_often(make: Make, issuer: LocalIssuer, clock: SteppedClock) -> None:
    authenticator = make()
    assert authenticate(authenticator, issuer.token())[0] == "anna"
    issuer.keys = {"new": OTHER_KEY}
    for _ in range(5):
        assert code(authenticator, issuer.token(OTHER_KEY, "new")) == "INVALID_CREDENTIALS"
    assert len(issuer.asked) == 2
    clock.ahead_s = 31
    assert authenticate(authenticator, issuer.token(OTHER_KEY, "new"))[0] == "anna"
    assert len(issuer.asked) == 4
    assert code(authenticator, issuer.token(EC_KEY, "e", "ES256")) == "INVALID_CREDENTIALS"


def test_an_issuer_that_fails_or_lies_has_no_keys(make: Make, issuer: LocalIssuer, clock: SteppedClock) -> None:
    authenticator = make()
    issuer.fails = True
    assert code(authenticator, issuer.token()) == "INVALID_CREDENTIALS"
    assert code(authenticator, issuer.token()) == "INVALID_CREDENTIALS"
    assert len(issuer.asked) == 1
    issuer.fails = False
    for number, lie in enumerate(
        [{"issuer": "https://x"}, {"jwks_uri": "http://192.0.2.1/keys"}, {"jwks_uri": None}], 1
    ):
        issuer.lies = lie
        clock.ahead_s = 31 * number
        assert code(authenticator, issuer.token()) == "INVALID_CREDENTIALS", lie
    issuer.lies = {}
    clock.ahead_s = 200
    assert authenticate(authenticator, issuer.token(exp=int(time.time()) + 900))[0] == "anna"
    issuer.fails, clock.ahead_s = True, 5000
    late = issuer.token(exp=int(time.time()) + 9000)
    assert authenticate(authenticator, late)[0] == "anna", "the last keys are believed for a day"


def test_a_change_of_the_user_ends_its_tokens(make: Make, issuer: LocalIssuer, db: Database) -> None:
    authenticator, token = make(), issuer.token()
    assert authenticate(authenticator, token) == ("anna", Role.SERVICE)
    db.execute("ALTER USER anna SET ROLE user")
    assert authenticate(authenticator, token) == ("anna", Role.USER)
    db.execute("DROP USER anna")
    assert code(authenticator, token) == "INVALID_CREDENTIALS"
    db.execute("RESTORE USER anna")
    assert authenticate(authenticator, token)[0] == "anna"
    db.execute("ALTER USER anna SET PASSWORD 'Secret-of-1'")
    assert code(authenticator, token) == "INVALID_CREDENTIALS"


def test_users_are_made_when_the_settings_say_so(make: Make, issuer: LocalIssuer, db: Database) -> None:
    authenticator = make(auto_provision=True, provider="google")
    token = issuer.token(sub="s-9", email="nine@example.org")
    assert authenticate(authenticator, token) == ("google:s-9", Role.USER)
    row = "SELECT auth_type, email, role FROM system.users WHERE user_id = 'google:s-9'"
    assert db.execute(row).rows == [("oauth", "nine@example.org", "user")]
    db.execute("DROP USER 'google:s-9'")
    assert code(authenticator, token) == "INVALID_CREDENTIALS"
    assert code(authenticator, issuer.token(sub="s" * 200)) == "INVALID_CREDENTIALS"


def test_one_subject_is_one_user(db: Database, issuer: LocalIssuer) -> None:
    subject = json.dumps({"provider": issuer.url, "subject": "s-1"})
    with pytest.raises(kalamdb.Conflict, match="user 'anna' logs in as this subject"):
        db.execute(f"CREATE USER bert WITH OAUTH '{subject}'")


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"auth.jwt_trusted_issuers": "http://issuer.example"}, "must be an https address"),
        ({"oauth.enabled": True, "oauth.providers.google.enabled": True}, "has no client_id"),
        (
            {
                "oauth.enabled": True, "oauth.providers.github.enabled": True,
                "oauth.providers.github.client_id": "c",
            },
            "has no issuer",
        ),
    ],
)  # fmt: skip
def test_an_issuer_that_cannot_be_trusted_stops_the_start(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        listed_issuers(Settings.load(settings, environment={}))


def test_a_server_takes_tokens_of_listed_issuers(serve: Serve, issuer: LocalIssuer) -> None:
    settings = (
        f'[auth]\njwt_trusted_issuers = ["{issuer.url}"]\n[oauth]\nenabled = true\n[oauth.providers.google]\n'
        f'enabled = true\nissuer = "{issuer.url}/g"\njwks_uri = "{issuer.url}/keys"\nclient_id = "my-app"\n'
    )
    served = serve(settings=settings)
    for user, provider in (("anna", issuer.url), ("gina", "google")):
        subject = json.dumps({"provider": provider, "subject": "s-1"})
        assert served.sql(f"CREATE USER {user} WITH OAUTH '{subject}'").status_code == 200
    served.tokens["anna"] = issuer.token()
    served.tokens["gina"] = issuer.token(iss=f"{issuer.url}/g", aud="my-app")
    for user in ("anna", "gina"):
        assert served.rows("SELECT CURRENT_USER()", user=user) == [[user]]
        me = served.client.get("/v1/api/auth/me", headers={"Authorization": f"Bearer {served.tokens[user]}"})
        assert me.json()["user"]["id"] == user
    served.tokens["anna"] = issuer.token(aud="my-app")
    assert served.sql("SELECT 1", user="anna").json()["error"]["code"] == "INVALID_CREDENTIALS"
