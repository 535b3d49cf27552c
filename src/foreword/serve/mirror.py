"""A folder that follows prefixes elsewhere: an object store, or whatever else fsspec reads.

Servers read plain folders. This keeps one on a machine's own disk as it is in ``s3://bucket/prefixes``: what is new or
has changed is fetched under a hidden name, read and checked as a prefix, and then put into place by renaming; a server
sees the old prefix or the new one. What is half uploaded, damaged or no prefix stays outside and is tried again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foreword._locked import locked
from foreword._prefix_file import CARD, DESCRIPTION, WEIGHTS, move, read
from foreword.errors import ConfigError, ForewordError, MissingPartError, PrefixFileError, StoreError
from foreword.serve.shelf import check_name

_STATE, _LOCK, _STAGING = ".mirror.json", ".mirror.lock", ".mirror-"
_Version = list[str]  # a word for each of a prefix's two files, which changes with its content


@dataclass(frozen=True, slots=True)
class Change:
    """What was done about a prefix.

    Attributes:
        what: ``refused``: it stays as it was here; ``message`` says why.
    """

    name: str
    what: Literal["new", "replaced", "removed", "refused"]
    message: str = ""


class Mirror:
    """A folder that follows a source.

    Args:
        source: an address of fsspec's, whose folders are prefixes: ``s3://bucket/prefixes``, ``gs://…``, a path.
        folder: made if need be. Prefixes in it that don't come from the source are left alone.
        remove: remove what the mirror has brought and the source has no more. (Not if the source has no prefix at
            all: that is an accident more often than a wish.)
        most_bytes: of a prefix's file.
        options: of fsspec's file system; credentials are better left in its own environment variables.

    Raises:
        ConfigError: the address is of no kind that fsspec knows, or the folder follows another source.
        MissingPartError: the package for such addresses is not installed.
    """

    def __init__(
        self,
        source: str,
        folder: str | Path,
        *,
        remove: bool = True,
        most_bytes: int = 1 << 30,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.folder = source, Path(folder)
        self._remove, self._most_bytes = remove, most_bytes
        self._files, self._root = _file_system(source, options or {})
        self._bad: dict[str, tuple[_Version, str]] = {}  # what needs not be fetched again to be refused
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{folder} is a file; expected a folder to keep prefixes in")
        self._known()

    def once(self) -> list[Change]:
        """Look at the source, and do what has to be done.

        Raises:
            StoreError: the source can't be read; nothing was changed.
            ConfigError: another process is at work on the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / _LOCK, f"another mirror is at work on {self.folder}; expected one a folder"):
            for left in self.folder.glob(f"{_STAGING}*-"):  # of a mirror that was killed
                shutil.rmtree(left, ignore_errors=True)
            known, there = self._known(), self._listed()
            changes = []
            for name, version in sorted(there.items()):
                if known.get(name) != version or not (self.folder / name).is_dir():
                    changes.append(self._fetched(name, version, known))
            gone = sorted(known.keys() - there.keys()) if there and self._remove else []
            return changes + [self._removed(name, known) for name in gone]

    # ---------------------------------------------------------------- the source

    def _listed(self) -> dict[str, _Version]:
        """The prefixes there; folders without both files are none (yet)."""
        try:
            self._files.invalidate_cache()
            entries = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            raise StoreError(f"{self.source} is not there; expected a folder of folders of saved prefixes") from None
        except Exception as exc:
            raise StoreError(f"{self.source} can't be listed ({type(exc).__name__}: {exc})") from exc
        found = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
            if entry["type"] == "directory" and (version := self._version(name)) is not None:
                found[name] = version
        return found

    def _version(self, name: str) -> _Version | None:
        """None: no prefix, or none yet."""
        try:
            return [str(self._files.ukey(f"{self._root}/{name}/{part}")) for part in (DESCRIPTION, WEIGHTS)]
        except FileNotFoundError:
            return None
        except Exception as exc:
            raise StoreError(f"{self.source}/{name} can't be looked at ({type(exc).__name__}: {exc})") from exc

    # ---------------------------------------------------------------- the folder

    def _fetched(self, name: str, version: _Version, known: dict[str, _Version]) -> Change:
        here = self.folder
        if name in self._bad and self._bad[name][0] == version:
            return Change(name, "refused", self._bad[name][1])
        try:
            place = here / check_name(name)
            if place.exists() and name not in known:
                raise ConfigError("something of this name is in the folder already, and the mirror didn't bring it")
        except ForewordError as exc:
            return Change(name, "refused", str(exc))
        staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{name}-", suffix="-", dir=here))
        try:
            self._download(name, staging)
            self._check(name, version, staging)
            self._files.invalidate_cache()
            if self._version(name) != version:
                return Change(name, "refused", "it changed while it was fetched; the next look takes it")
            replaced = place.exists()
            known[name] = []  # ours, of no version: whatever happens now, the next look fetches it again
            self._keep(known)
            move(staging, place)
            known[name] = version
            self._keep(known)
            return Change(name, "replaced" if replaced else "new")
        except ForewordError as exc:
            return Change(name, "refused", str(exc))
        except OSError as exc:
            return Change(name, "refused", f"it can't be kept in {here}: {exc}")
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _check(self, name: str, version: _Version, staging: Path) -> None:
        try:
            read(staging)
        except Exception as exc:  # of whatever kind: nobody will read this as a prefix
            said = str(exc) if isinstance(exc, ForewordError) else f"it can't be read ({type(exc).__name__})"
            self._bad[name] = version, said.replace(str(staging), name)
            raise PrefixFileError(self._bad[name][1]) from exc

    def _download(self, name: str, staging: Path) -> None:
        for part in (DESCRIPTION, WEIGHTS, CARD):
            remote = f"{self._root}/{name}/{part}"
            try:
                if part == CARD and not self._files.exists(remote):
                    continue
                if (size := self._files.size(remote) or 0) > self._most_bytes:
                    raise StoreError(f"{part} has {size:,} bytes; at most {self._most_bytes:,} are fetched")
                self._files.get_file(remote, str(staging / part))
            except ForewordError:
                raise
            except Exception as exc:
                raise StoreError(f"{part} can't be fetched ({type(exc).__name__}: {exc})") from exc

    def _removed(self, name: str, known: dict[str, _Version]) -> Change:
        """Out of sight by a rename, then deleted."""
        try:
            if (self.folder / name).exists():
                hidden = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{name}-", suffix="-", dir=self.folder))
                (self.folder / name).rename(hidden / name)
                shutil.rmtree(hidden, ignore_errors=True)
            known.pop(name)
            self._keep(known)
        except OSError as exc:
            return Change(name, "refused", f"it can't be removed: {exc}")
        return Change(name, "removed")

    def _known(self) -> dict[str, _Version]:
        """What the mirror has brought, and which version of it."""
        path = self.folder / _STATE
        if not path.exists():
            return {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            source, known = state["source"], {str(n): [str(w) for w in v] for n, v in state["prefixes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as exc:
            raise ConfigError(
                f"{path} can't be read ({exc}); remove it and the prefixes that a mirror brought, and begin anew"
            ) from exc
        if source != self.source:
            raise ConfigError(f"{self.folder} follows {source}, not {self.source}; expected another folder")
        return known

    def _keep(self, known: Mapping[str, _Version]) -> None:
        text = json.dumps({"source": self.source, "prefixes": dict(known)}, indent=1) + "\n"
        staged = self.folder / f"{_STATE}.new"
        staged.write_text(text, encoding="utf-8")
        staged.replace(self.folder / _STATE)


def _file_system(source: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """fsspec's file system, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as exc:
        raise MissingPartError("a mirror reads through fsspec: pip install fsspec") from exc
    try:
        files, root = url_to_fs(source, **options)
    except ImportError as exc:  # fsspec says which package
        raise MissingPartError(f"{source}: {exc}") from exc
    except (ValueError, TypeError) as exc:
        raise ConfigError(f"{source!r} is no address that fsspec reads ({exc})") from exc
    return files, str(root).rstrip("/")
