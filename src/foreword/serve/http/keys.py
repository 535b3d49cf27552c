"""API keys: who may ask, and who may change what is served."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable
from pathlib import Path

from foreword.errors import ConfigError
from foreword.serve.http.errors import ApiError

_COMMENT = re.compile(r"(^|\s)#.*")  # a key may have "#" in it


class Keys:
    """A set of keys. Comparing takes the same time whatever is given and whichever key it is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(k.encode()).digest() for k in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def has(self, given: str) -> bool:
        digest, found = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def read_keys(file: Path | None, variable: str) -> Keys:
    """The keys of a file (one a line, ``#`` begins a comment) and of an environment variable (with commas).

    Raises:
        ConfigError: the file can't be read or has no key, the variable is set and has none, or a key is short enough to
            be guessed.
    """
    found = [k.strip() for k in os.environ.get(variable, "").split(",")]
    if variable in os.environ and not any(found):  # a secret that got lost must not open the door
        raise ConfigError(f"{variable} is set and has no key; unset it, or give keys with commas between them")
    if file is not None:
        try:
            lines = [_COMMENT.sub("", line).strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"the keys in {file} can't be read: {exc}") from exc
        if not any(lines):
            raise ConfigError(f"{file} has no key; expected one a line")
        found += lines
    keys = [k for k in dict.fromkeys(found) if k]
    if any(len(k) < 16 for k in keys):
        raise ConfigError(
            f"a key of {file or variable} has fewer than 16 characters and can be guessed; make one with "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return Keys(keys)


def check(authorization: str, keys: Keys, *, admin: bool = False) -> None:
    """Let a request through whose header ``Authorization`` is ``Bearer KEY``; without keys, any but an admin's.

    Raises:
        ApiError: 401, or 403 where nothing can be changed at all.
    """
    if not len(keys):
        if admin:
            message = "no admin key is set, so nothing can be changed; start the server with --admin-keys"
            raise ApiError(403, message, kind="permission_error", code="no_admin_key")
        return
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not keys.has(given.strip()):
        what = "the admin key" if admin else "the API key"
        raise ApiError(
            401, f"{what} is missing or wrong; send it as 'Authorization: Bearer KEY'", kind="authentication_error",
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
