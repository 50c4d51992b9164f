"""A small Hugging Face hub in this process: one dataset, models, and the faults that a test asks for.

It answers what huggingface_hub asks of the real one: what a repository holds, a file's size and hash (HEAD), its
content (GET, by ranges too), and redirects of LFS files to another host name.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

LFS = (".parquet", ".safetensors")


@dataclass
class Hub:
    """A hub with one dataset at one commit, and models. The faults name files of the dataset."""

    repo: str
    sha: str
    files: dict  # name: content
    models: dict = field(default_factory=dict)  # (repository, commit): {name: content}
    datasets: dict = field(default_factory=dict)  # the same, of more data sets
    listed: dict = field(default_factory=dict)  # name: size that is said in place of the true one
    announced: dict = field(default_factory=dict)  # name: size that HEAD says in place of the true one
    answer: dict = field(default_factory=dict)  # path ending: (status, headers, body)
    status: dict = field(default_factory=dict)  # name: status of the answer when its content is asked for
    drop: dict = field(default_factory=dict)  # name: bytes after which the connection ends, once
    stall: dict = field(default_factory=dict)  # name: bytes after which nothing more comes
    ranges: bool = True
    requests: list = field(default_factory=list)  # (path, whether a token came with it)
    downloads: list = field(default_factory=list)  # (name, first byte) of each file of the dataset that was asked for
    released: threading.Event = field(default_factory=threading.Event)  # ends all stalls
    url: str = ""

    def repositories(self):
        """(path in the hub, commit, files) of all repositories."""
        yield f"datasets/{self.repo}", self.sha, self.files
        for kind, repositories in (("models", self.models), ("datasets", self.datasets)):
            for (repo, sha), files in repositories.items():
                yield f"{kind}/{repo}", sha, files

    def sizes(self, name, content):
        """(size, git blob id, SHA-256 if it is an LFS file) as the hub lists them."""
        return self.listed.get(name, len(content)), git_blob(content), sha256(content) if name.endswith(LFS) else None

    def info(self, repo, sha, files):
        """The body of /api/<kind>/<repo>/revision/<revision>."""
        siblings = []
        for name, content in files.items():
            size, blob, lfs = self.sizes(name, content)
            siblings.append({"rfilename": name, "size": size, "blobId": blob})
            if lfs:
                siblings[-1] |= {"blobId": "c" * 40, "lfs": {"size": size, "sha256": lfs, "pointerSize": 130}}
        name = repo.partition("/")[2]
        return json.dumps({"id": name, "sha": sha, "private": False, "siblings": siblings}).encode()

    def tree(self, files):
        """The body of /api/<kind>/<repo>/tree/<commit>."""
        entries = []
        for name, content in files.items():
            size, blob, lfs = self.sizes(name, content)
            entries.append({"type": "file", "path": name, "size": size, "oid": blob})
            if lfs:
                entries[-1] |= {"oid": "c" * 40, "lfs": {"size": size, "oid": lfs, "pointerSize": 130}}
        return json.dumps(entries).encode()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_blob(content):
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


@contextmanager
def serving(hub):
    """The hub answers at hub.url while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub, hub.url = hub, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """The hub's answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        first = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1]) if hub.ranges else 0
        hub.requests.append((path, "Authorization" in self.headers))
        for ending, answer in hub.answer.items():
            if path.endswith(ending):
                return self.send(*answer)
        return self.list(hub, path) if path.startswith("/api/") else self.send_file(hub, path, first)

    def list(self, hub, path):
        """What a repository holds, by revision (all in one answer) or by tree."""
        as_json = {"Content-Type": "application/json"}
        for repo, sha, files in hub.repositories():
            revisions = [f"/revision/{sha}", *(("", "/revision/main") if repo == f"datasets/{hub.repo}" else ())]
            if path in [f"/api/{repo}{revision}" for revision in revisions]:
                return self.send(200, as_json, hub.info(repo, sha, files))
            if path == f"/api/{repo}/tree/{sha}":
                return self.send(200, as_json, hub.tree(files))
        known = any(path.startswith(f"/api/{repo}/revision/") for repo, *_ in hub.repositories())
        return self.send(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    def send_file(self, hub, path, first):
        """A file of a repository, or the place that LFS files are redirected to."""
        for repo, sha, files in hub.repositories():
            prefix = f"/{repo.removeprefix('models/')}/resolve/{sha}/"
            cdn = f"/cdn/{repo}/{sha}/"
            at_cdn, name = path.startswith(cdn), path.removeprefix(prefix).removeprefix(cdn)
            if name == path or name not in files:
                continue
            content, size = files[name], hub.announced.get(name, len(files[name]))
            if name.endswith(LFS) and not at_cdn:
                headers = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": size, "X-Repo-Commit": sha}
                place = f"http://localhost:{self.server.server_port}{quote(cdn + name)}"
                return self.send(302, headers | {"Location": place})
            headers = {"ETag": f'"{git_blob(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
            if self.command == "HEAD":
                return self.send(200, headers | {"Content-Length": size})
            return self.send_content(hub, name, content, first, headers, counted=files is hub.files)
        return self.send(404, {"X-Error-Code": "EntryNotFound"})

    def send_content(self, hub, name, content, first, headers, counted):
        if counted:
            hub.downloads.append((name, first))
        if name in hub.status:
            return self.send(hub.status[name], {})
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = content[first:]
        self.send(206 if first else 200, headers | {"Content-Length": len(body)})
        cut = hub.drop.pop(name, None) or hub.stall.get(name)
        self.wfile.write(body[:cut])
        if name in hub.stall:
            hub.released.wait(60)
        self.close_connection = self.close_connection or cut is not None

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
