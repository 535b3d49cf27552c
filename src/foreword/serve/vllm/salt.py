"""The cache salt of a request: which prefix stands before it, by name and content.

vLLM puts the salt into the hash of a request's first block, and each block's hash goes into the next one's. So the
salt both tells the connector what to load and keeps the tasks' cached blocks apart; a prefix that is replaced has
another digest and so finds none of the old one's blocks.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from foreword.errors import ConfigError

MARK = "foreword:"  # no salt of a client may begin with it
MOST_NAME = 60  # vLLM takes salts of 128 characters, without @ / \ and NUL
_FORM = re.compile(r"foreword:([0-9a-f]{32}):([1-9][0-9]{0,5}):([0-9a-f]{16})?:([A-Za-z0-9][A-Za-z0-9._-]{0,59})")


@dataclass(frozen=True, slots=True)
class Salt:
    """What a salt says.

    Attributes:
        name: of the prefix, in the folder of prefixes.
        digest: of its content, 32 hexadecimal digits.
        length: its virtual tokens, and so the number of placeholders.
        client: of the client's own salt, 16 hexadecimal digits; empty if there was none.
    """

    name: str
    digest: str
    length: int
    client: str = ""

    def __post_init__(self) -> None:
        if not _FORM.fullmatch(str(self)):
            raise ConfigError(
                f"the task {self.name[:80]!r} with {self.length} tokens can't be named to vLLM; expected a name of "
                f"at most {MOST_NAME} letters, digits, '.', '_' or '-', and 1 to 999,999 tokens"
            )

    def __str__(self) -> str:
        return f"{MARK}{self.digest}:{self.length}:{self.client}:{self.name}"

    def of_client(self, own: str | None) -> Salt:
        """The same with a client's own salt, which parts its cached blocks from those of others."""
        client = hashlib.sha256(own.encode("utf-8", "surrogateescape")).hexdigest()[:16] if own else ""
        return Salt(self.name, self.digest, self.length, client)

    @classmethod
    def parse(cls, text: str) -> Salt:
        """What ``str`` made of one.

        Raises:
            ConfigError: it is none.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{text[:130]!r} is not a salt that foreword made; ask for a task by its name, as the model"
            )
        return cls(found[4], found[1], int(found[2]), found[3] or "")
