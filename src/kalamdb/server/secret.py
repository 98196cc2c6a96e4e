"""The secret that signs tokens: given by the settings, or made once and kept in the data directory."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Final

from kalamdb.clock import Clock
from kalamdb.errors import InvalidRequest, Unavailable

SECRET_LENGTH_MIN: Final = 32
SECRET_FILE: Final = "jwt_secret"
_PLACEHOLDERS: Final = ("change", "your-secret", "your_secret", "yoursecret", "kalamdb-dev-secret", "placeholder")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def signing_secret(configured: str, *, host: str, data_dir: Path, clock: Clock) -> str:
    """The secret of a server that listens on `host`. Blocks for the disk.

    On loopback an empty one is made and kept in `<data>/jwt_secret`, mode 600. Raises InvalidRequest when
    the server can be reached from elsewhere and none, a placeholder or one of fewer than 32 characters is configured.
    """
    if not is_loopback(host):
        if not configured:
            raise InvalidRequest(
                f"a server on '{host}' needs a secret for its tokens: set KALAMDB_JWT_SECRET (auth.jwt_secret) to "
                f"{SECRET_LENGTH_MIN} random characters or more, or listen on 127.0.0.1"
            )
        if len(configured) < SECRET_LENGTH_MIN:
            raise InvalidRequest(
                f"KALAMDB_JWT_SECRET (auth.jwt_secret) has {len(configured)} characters; a server on '{host}' needs "
                f"{SECRET_LENGTH_MIN} or more"
            )
        if len(set(configured)) < SECRET_LENGTH_MIN // 4 or any(word in configured.lower() for word in _PLACEHOLDERS):
            raise InvalidRequest(
                f"KALAMDB_JWT_SECRET (auth.jwt_secret) is a placeholder; a server on '{host}' needs random characters"
            )
    return configured or _kept_secret(data_dir / SECRET_FILE, clock)


def _kept_secret(path: Path, clock: Clock) -> str:
    """The secret in a file that only its owner can read, made when it is not there. The directory is held by
    this process, so nobody else makes one meanwhile."""
    try:
        if path.exists():
            secret = path.read_text(encoding="ascii").strip()
            if len(secret) >= SECRET_LENGTH_MIN:
                path.chmod(0o600)
                return secret
        secret = clock.random_bytes(32).hex()
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return secret
    except (OSError, UnicodeDecodeError) as exc:
        raise Unavailable(f"the secret of tokens cannot be kept in '{path}': {exc}") from exc
