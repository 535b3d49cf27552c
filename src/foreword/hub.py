"""Prefixes on a model hub: ``hf://OWNER/NAME[@REVISION][/FOLDER]`` wherever the folder of a saved prefix is named.

A repository holds one prefix, or a folder for each of many. huggingface_hub does the talking, with its cache and its
``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``. Of a repository only a prefix's own three files are fetched, and
reading them runs no code.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from foreword._prefix_file import CARD, DESCRIPTION, WEIGHTS, model_card
from foreword.errors import ConfigError, ForewordError, PrefixFileError, StoreError

if TYPE_CHECKING:
    from foreword.prefix import Prefix

_SCHEME = re.compile(r"hf:/{1,2}(?:models/)?")  # one slash is what is left of two in a pathlib.Path
_PLACE = re.compile(
    r"(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>refs/[^/]+/[^/]+|[^/@]+))?(?:/(?P<folder>[^@]+?))?/?"
)
_OTHERS = ("datasets", "spaces", "buckets", "kernels")  # what else stands on the hub, and begins its addresses
_FORM = "hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FOLDER"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a prefix is on a hub.

    Attributes:
        revision: a branch, a tag or a commit; None: the main branch.
        folder: inside the repository; empty: its top.
    """

    repository: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def of(cls, text: str | Path) -> Address:
        """Read ``OWNER/NAME…``, with ``hf://`` before it or without.

        Raises:
            ConfigError: it is of another form.
        """
        place = _SCHEME.sub("", str(text), count=1)
        found = _PLACE.fullmatch(place)
        if found is None or ".." in place.split("/"):
            raise ConfigError(f"{text!s} is no address of a prefix on a hub; expected {_FORM}")
        if (kind := place.split("/")[0]) in _OTHERS:
            raise ConfigError(
                f"{text!s} is among the hub's {kind}; prefixes are kept in repositories of models: {_FORM}"
            )
        return cls(found["repository"], found["revision"], found["folder"] or "")

    def file(self, name: str) -> str:
        """A file's path in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    @property
    def title(self) -> str:
        """What to call it."""
        return (self.folder or self.repository).rsplit("/", 1)[-1]

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repository}{revision}{'/' if self.folder else ''}{self.folder}"


def located(folder: str | Path, files: Sequence[str] = (WEIGHTS, DESCRIPTION, CARD)) -> Path:
    """A folder on this machine: the one named, or the hub's copy of what an address names, fetched if need be.

    Args:
        files: what to fetch; the first has to be there.

    Raises:
        ConfigError: it begins with ``hf://`` and is no address.
        StoreError: the hub can't be read, or has no such repository.
        PrefixFileError: the repository holds no such file.
    """
    if not _SCHEME.match(str(folder)):
        return Path(folder)
    from huggingface_hub import snapshot_download

    address = Address.of(folder)
    with _told(address, "fetched"):
        top = snapshot_download(
            address.repository, revision=address.revision, library_name="foreword",
            allow_patterns=[escape(address.file(name)) for name in files],
        )  # fmt: skip
    if not (Path(top) / address.file(files[0])).is_file():
        raise PrefixFileError(f"{address} holds no {files[0]}; check the address, of the form {_FORM}")
    return Path(top) / address.folder


def shown(folder: str | Path) -> str:
    """A folder or an address as people write it; a pathlib.Path has lost a slash of the latter."""
    return str(Address.of(folder)) if _SCHEME.match(str(folder)) else str(folder)


def push(prefix: Prefix, to: str | Path, *, private: bool | None = None, message: str | None = None) -> str:
    """Put a prefix on a hub, as one commit; the repository is made if need be.

    Args:
        to: ``OWNER/NAME``, ``OWNER/NAME@BRANCH`` or ``OWNER/NAME/FOLDER``, with ``hf://`` before it or without.
        private: of a new repository; None: as the owner's settings have it.

    Returns:
        The address of just this version, by its commit.

    Raises:
        ConfigError: no such form of address, or there is something else at the place.
        StoreError: the hub can't be reached, or doesn't allow it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    address, api = Address.of(to), HfApi(library_name="foreword")
    with tempfile.TemporaryDirectory() as made, _told(address, "pushed"):
        folder = prefix.save(Path(made) / "prefix")
        (folder / CARD).write_text(model_card(prefix, address.title, str(address)), encoding="utf-8")
        api.create_repo(address.repository, private=private, exist_ok=True)
        there = set(api.list_repo_files(address.repository, revision=address.revision))
        if address.file(CARD) in there and address.file(DESCRIPTION) not in there:
            raise ConfigError(
                f"{address} holds a {CARD} but no prefix, so it is something else; push to another repository, or to a "
                f"folder of this one: hf://{address.repository}/FOLDER"
            )
        done = api.create_commit(
            address.repository,
            [CommitOperationAdd(address.file(name), folder / name) for name in (WEIGHTS, DESCRIPTION, CARD)],
            commit_message=message or f"{prefix.longest} virtual tokens",
            revision=address.revision,
        )
    return str(Address(address.repository, done.oid, address.folder))


@contextmanager
def _told(address: Address, done: str) -> Iterator[None]:
    """huggingface_hub's errors in our words."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except ForewordError:
        raise
    except errors.HFValidationError as exc:
        raise ConfigError(f"{address} is no address on a hub: {exc}") from exc
    except errors.GatedRepoError as exc:
        raise StoreError(f"{address} is shown to those only who asked for it: ask on its page, and {login}") from exc
    except errors.RepositoryNotFoundError as exc:
        raise StoreError(
            f"the hub has no {address.repository} that this token may see; check its name, or {login}"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise StoreError(
            f"{address.repository} has no revision {address.revision!r}; expected a branch, a tag or a commit"
        ) from exc
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as exc:
        raise StoreError(
            f"{address} can't be {done}: the hub can't be reached (or HF_HUB_OFFLINE is set), and the cache has no copy"
        ) from exc
    except errors.HfHubHTTPError as exc:
        status = exc.response.status_code
        todo = f"; {login}, with a token that may write there" if status in (401, 403) else ""
        raise StoreError(
            f"{address} can't be {done}: the hub says {status} ({exc.server_message or exc}){todo}"
        ) from exc
    except Exception as exc:  # the errors of a connection are those of whatever HTTP library huggingface_hub uses
        raise StoreError(f"{address} can't be {done} ({type(exc).__name__}: {exc})") from exc
