"""A small model hub on this machine, which speaks what huggingface_hub's own client speaks: repositories with commits,
branches, private ones and a token. Files travel in the commit itself, as small ones do on the real hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_somebody"


class Hub:
    """Repositories: ``commits[name][commit]`` is a dict of files, ``branches[name][branch]`` a commit."""

    def __init__(self):
        self.commits, self.branches, self.private = {}, {}, set()
        self.asked = []  # of each request its method and path

    def create(self, name, private=False):
        self.commits[name], self.branches[name] = {}, {}
        self.commit(name, "main", {".gitattributes": b""})
        if private:
            self.private.add(name)

    def commit(self, name, branch, files):
        before = self.commits[name].get(self.branches[name].get(branch), {})
        after = {**before, **files}
        oid = hashlib.sha1(repr((len(self.commits[name]), sorted(after.items()))).encode()).hexdigest()
        self.commits[name][oid], self.branches[name][branch] = after, oid
        return oid

    def find(self, name, revision):
        """The commit of a revision, or None."""
        oid = self.branches[name].get(revision, revision)
        return oid if oid in self.commits[name] else None


class Refused(Exception):
    def __init__(self, status, code="", message="", **more):
        self.status, self.code, self.message, self.more = status, code, message, more


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        try:
            for method, pattern, do in ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, path)):
                    return do(self, body, **found.groupdict())
            raise Refused(404, "EntryNotFound", "no such page")
        except Refused as exc:
            self._answer(
                {"error": exc.message, **exc.more}, exc.status, X_Error_Code=exc.code, X_Error_Message=exc.message
            )

    do_GET = do_POST = do_HEAD = _serve

    # ---------------------------------------------------------------- what is asked

    @property
    def _here(self):
        return f"http://{self.headers['Host']}"

    @property
    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _must_be_known(self):
        if not self._known:
            raise Refused(401, "", "Invalid username or password.")

    def _files(self, name, revision):
        if name not in self.hub.commits or (name in self.hub.private and not self._known):
            raise Refused(404, "RepoNotFound", "Repository not found")
        oid = self.hub.find(name, revision)
        if oid is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, self.hub.commits[name][oid]

    def _create(self, body):
        self._must_be_known()
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if name.startswith("others/"):
            raise Refused(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.hub.commits:
            raise Refused(409, "", "You already created this model repo", url=f"{self._here}/{name}")
        self.hub.create(name, asked.get("private") or asked.get("visibility") == "private")
        self._answer({"url": f"{self._here}/{name}", "name": name, "id": "0"})

    def _info(self, body, name, revision="main"):
        oid, files = self._files(name, revision)
        self._answer({"id": name, "modelId": name, "sha": oid, "private": name in self.hub.private,
                      "siblings": [{"rfilename": f} for f in files]})  # fmt: skip

    def _tree(self, body, name, revision):
        self._answer([
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self._files(name, revision)[1].items()
        ])  # fmt: skip

    def _modes(self, body, name, revision):
        self._must_be_known()
        self._files(name, revision)
        asked = json.loads(body)["files"]
        self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})

    def _yaml(self, body):
        self._answer({"errors": [], "warnings": []})

    def _commit(self, body, name, revision):
        self._must_be_known()
        self._files(name, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        oid = self.hub.commit(name, revision, files)
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self._here}/{name}/commit/{oid}"})

    def _file(self, body, name, revision, path):
        oid, files = self._files(name, revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        self._answer(files[path], ETag=etag, X_Repo_Commit=oid)


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler._create),
    (("POST",), r"/api/validate-yaml", Handler._yaml),
    (("POST",), rf"/api/models/{_NAME}/preupload/{_REVISION}", Handler._modes),
    (("POST",), rf"/api/models/{_NAME}/commit/{_REVISION}", Handler._commit),
    (("GET",), rf"/api/models/{_NAME}", Handler._info),
    (("GET",), rf"/api/models/{_NAME}/revision/{_REVISION}", Handler._info),
    (("GET",), rf"/api/models/{_NAME}/tree/{_REVISION}", Handler._tree),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler._file),
]


@contextmanager
def running():
    """A hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
