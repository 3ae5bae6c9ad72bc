"""API keys."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from shadowllm.errors import UserError


class ApiKeys:
    """Keys that clients may use. Only their hashes are kept.

    Args:
        keys: None accepts every client.
    """

    def __init__(self, keys: list[str] | None) -> None:
        self._hashes = None if keys is None else [_hash(key) for key in keys]

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """Read a file with one key per line. Empty lines, and lines that begin with #, are left out.

        Raises:
            UserError: it cannot be read, has no key, or has one that a header cannot hold.
        """
        if path is None:
            return cls(None)
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the API keys of {path}", "give a text file with one key per line") from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UserError(f"{path} has no API key", "write one key per line")
        if not all(map(str.isascii, keys)):
            raise UserError(f"an API key in {path} has letters beyond ASCII", "write keys that a header can hold")
        return cls(keys)

    def accept(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header has one of the keys.

        The time does not tell which key it is, or how much of it is right: the hashes of all keys are compared.
        """
        if self._hashes is None:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip())
        found = [hmac.compare_digest(given, known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(found)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
