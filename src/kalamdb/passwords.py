"""Passwords: what a new one must be, its hash, and comparing so that the time tells nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import bcrypt

from kalamdb.errors import InvalidRequest

PASSWORD_BYTES_MAX: Final = 72
"""What bcrypt reads of a password; a longer one would be cut in silence."""
_KINDS: Final = (r"[a-z]", r"[A-Z]", r"[0-9]", r"[^A-Za-z0-9]")
_COMMON: Final = frozenset(
    """
    password password1 password12 password123 passw0rd p@ssword p@ssw0rd p@ssw0rd1 pa$$word passwort motdepasse
    12345678 123456789 1234567890 12345678910 123123123 11111111 00000000 88888888 87654321 987654321 9876543210
    1q2w3e4r 1q2w3e4r5t 1qaz2wsx qwertyui qwertyuiop qwerty12 qwerty123 qwerty1234 asdfghjk asdfghjkl zxcvbnm1
    abc12345 abcd1234 abcdefgh abcdefg1 a1b2c3d4 iloveyou iloveyou1 sunshine sunshine1 princess princess1 football
    football1 baseball baseball1 superman batman123 starwars pokemon1 welcome1 welcome12 welcome123 letmein1
    letmein123 trustno1 whatever dragon123 monkey123 master123 shadow123 michael1 jennifer computer internet
    administrator admin123 admin1234 adminadmin root1234 rootroot toor1234 changeme changeme1 changeme123 default1
    secret12 secret123 testtest test1234 testing1 testing123 guest123 guest1234 user1234 login123 access14
    kalamdb1 kalamdb123 database database1 postgres postgres1 mysql123 server123 temp1234 temppass
    """.split()
)
"""Those that guessers try first, in small letters; of 8 characters and more, as shorter ones are refused anyhow."""


@dataclass(frozen=True, slots=True)
class PasswordRules:
    """What a new password must be. Lengths in characters; 72 bytes of UTF-8 hold in any case."""

    bcrypt_cost: int = 12
    length_min: int = 8
    length_max: int = 1024
    complex: bool = False
    """Upper and lower case, a digit and a special character."""


class Passwords:
    """Checks, hashes and compares passwords. Thread-safe; a hash blocks for as long as its cost says."""

    def __init__(self, rules: PasswordRules) -> None:
        self._rules = rules

    def hashed(self, password: str, *, refuse_common: bool = False) -> str:
        """The hash of a new password. Raises InvalidRequest for one that breaks a rule."""
        self.check(password, refuse_common=refuse_common)
        return self.hash_of(password)

    def check(self, password: str, *, refuse_common: bool = False) -> None:
        """Raise InvalidRequest for a password that may not be set."""
        rules = self._rules
        _bytes_of(password)
        if not rules.length_min <= len(password) <= rules.length_max:
            raise InvalidRequest(
                f"a password has {rules.length_min} to {min(rules.length_max, PASSWORD_BYTES_MAX)} characters, "
                f"this one has {len(password)} (auth.min_password_length, auth.max_password_length)"
            )
        if rules.complex and not all(re.search(kind, password) for kind in _KINDS):
            raise InvalidRequest(
                "a password needs an upper-case and a lower-case letter, a digit and a special character"
            )
        if refuse_common and password.lower() in _COMMON:
            raise InvalidRequest("this password is one of those that are tried first; choose another")

    def hash_of(self, password: str) -> str:
        """The hash of a password that no rule but the 72 bytes is asked for. Raises InvalidRequest."""
        return bcrypt.hashpw(_bytes_of(password), bcrypt.gensalt(self._rules.bcrypt_cost)).decode()

    def matches(self, password: str, known: str | None) -> bool:
        """Whether a password has the hash `known`. Takes as long without a hash, and for a password that is
        too long to have one."""
        data = password.encode("utf-8", "surrogatepass")
        if known and 0 < len(data) <= PASSWORD_BYTES_MAX:
            return bcrypt.checkpw(data, known.encode())
        bcrypt.hashpw(data[:PASSWORD_BYTES_MAX], bcrypt.gensalt(self._rules.bcrypt_cost))
        return False


def _bytes_of(password: str) -> bytes:
    try:
        data = password.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the password holds half of a surrogate pair, which is not text") from None
    if not 0 < len(data) <= PASSWORD_BYTES_MAX:
        raise InvalidRequest(f"a password has 1 to {PASSWORD_BYTES_MAX} bytes of UTF-8, this one has {len(data)}")
    return data
