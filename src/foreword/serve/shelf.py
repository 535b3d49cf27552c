"""A folder of prefixes that may be taken by name, and nothing outside it.

Names come from the network, so a name is one plain word, and what it leads to must lie in the folder: ``..``, absolute
paths and symbolic links to elsewhere are refused. What is in the files is checked on loading; reading it runs no code.
"""

from __future__ import annotations

import re
from pathlib import Path

from foreword._prefix_file import DESCRIPTION, WEIGHTS, read
from foreword.errors import ConfigError, ForewordError, PrefixFileError
from foreword.prefix import Prefix

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_DESCRIPTION = 16 << 20  # bytes


class NoPrefixError(PrefixFileError):
    """There is no prefix of this name in the folder."""


def check_name(name: str) -> str:
    """A task's name as it is.

    Raises:
        ConfigError: it has anything but letters, digits, ``.``, ``_`` and ``-``, or is too long.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name[:80]!r} can't be a task's; expected 1 to 128 letters, digits, '.', '_' or '-', beginning "
            "with a letter or digit"
        )
    return name


class Shelf:
    """Prefixes in the folders of a folder.

    Args:
        most_bytes: of a prefix's files.

    Raises:
        ConfigError: there is no such folder.
    """

    def __init__(self, folder: str | Path, *, most_bytes: int = 1 << 30) -> None:
        self.folder = Path(folder)
        self.most_bytes = most_bytes
        if not self.folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; expected one that holds folders of saved prefixes")

    def names(self) -> list[str]:
        """What can be asked for: folders in it that hold a prefix."""
        found = []
        for path in self.folder.iterdir():
            try:
                self.path(path.name)
            except ForewordError:
                continue
            found.append(path.name)
        return sorted(found)

    def path(self, name: str) -> Path:
        """The folder of a prefix.

        Raises:
            ConfigError: the name is malformed, or leads out of the folder.
            NoPrefixError: nothing is there.
            PrefixFileError: its files are larger than they may be.
        """
        root, path = self.folder.resolve(), self.folder / check_name(name)
        if path.resolve().parent != root:
            raise ConfigError(f"{name!r} leads out of the folder of prefixes; expected a folder that lies in it")
        for part in (DESCRIPTION, WEIGHTS):
            file = path / part
            if not file.is_file():  # a pipe or a device would be read for ever
                raise NoPrefixError(f"there is no prefix {name!r} in the folder of prefixes: no file {part}")
            if file.resolve().parent != path.resolve():
                raise ConfigError(f"{part} of {name!r} leads out of its folder; expected a plain file")
            most = min(self.most_bytes, _MOST_DESCRIPTION if part == DESCRIPTION else self.most_bytes)
            if (size := file.stat().st_size) > most:
                raise PrefixFileError(f"{part} of {name!r} has {size:,} bytes; at most {most:,} are read")
        return path

    def load(self, name: str) -> Prefix:
        """Read and check a prefix.

        Raises:
            ConfigError: as :meth:`path`.
            PrefixFileError: it is missing, too big, or damaged in whatever way.
        """
        return self.read(name)[0]

    def read(self, name: str) -> tuple[Prefix, str]:
        """As :meth:`load`, and a digest: two prefixes with one digest write the same."""
        path = self.path(name)
        try:
            return read(path)
        except ForewordError as exc:  # without the paths of this machine
            raise PrefixFileError(str(exc).replace(str(path), name)) from exc
        except Exception as exc:
            raise PrefixFileError(f"{name!r} can't be read as a prefix ({type(exc).__name__}); save it again") from exc
