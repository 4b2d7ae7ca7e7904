"""A small Hugging Face hub for tests: folders of files over HTTP, in the parts of the hub's
interface that huggingface_hub, transformers and datasets ask for. As on the hub, a repository's
commit is a checksum of its files, large files are redirected to another address, what is gated
is refused without the token of somebody who was accepted, and a missing repository is not told
from a private one without a token.

    with Hub(folder, accepted={"hf_anna": {"toys/gated"}}, gated={"toys/gated"}) as hub:
        ... HF_ENDPOINT=hub.url ...
        hub.log                      # [(method, path, bytes of content sent)]
        with hub.closed(): ...       # out of reach
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
                 r"(/(?P<ask>revision|tree|paths-info|auth-check))?"
                 r"(/(?P<revision>[^/]+))?(/(?P<path>.+))?")
FILE = re.compile(r"/(?P<kind>datasets/|)(?P<name>[^/]+/[^/]+)/(?P<ask>resolve)"
                  r"/(?P<revision>[^/]+)/(?P<path>.+)")
LARGE = {".safetensors", ".parquet"}


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder, gated=(), accepted=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.gated = Path(folder), set(gated)
        self.accepted, self.log = accepted or {}, []
        self.history = {}  # (repository, commit) -> its files: old ones are still served
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def closed(self):
        """Nobody listens at its address, for a while."""
        self.__exit__()
        yield
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        self.__enter__()

    def files(self, repo):
        """{path: content} of a repository such as models/toys/words."""
        folder = self.folder / repo
        return {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }

    def commit(self, repo):
        files = self.files(repo)
        commit = hashlib.sha1(
            b"".join(path.encode() + content for path, content in files.items())).hexdigest()
        self.history[repo, commit] = files
        return commit

    def fetched(self):
        """{name of a file: bytes of its content that were sent}, since the log was last cleared."""
        sent = {}
        for method, path, n in self.log:
            if method == "GET" and not path.startswith("/api/") and n:
                sent[path.split("/")[-1]] = sent.get(path.split("/")[-1], 0) + n
        return sent


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/large/"):  # an address that was given to who may read it
            kind, org, name, commit, path = path.removeprefix("/large/").split("/", 4)
            data = self.server.history[f"{kind}/{org}/{name}", commit][path]
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self.content(data, {"X-Repo-Commit": commit, "ETag": tag})
        asked = API.fullmatch(path) or FILE.fullmatch(path)
        if not asked:
            return self.refuse(404, "", "Sorry, we can't find the page you are looking for.")
        ask, name = asked["ask"], asked["name"]
        revision, path = asked["revision"] or "main", asked["path"] or ""
        repo = f"{asked['kind'].strip('/') or 'models'}/{name}"
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.accepted:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if not (self.server.folder / repo).is_dir():
            return self.refuse(404 if token else 401, "RepoNotFound",
                               "Repository not found" if token else "Invalid username or password.")
        closed = name in self.server.gated and name not in self.server.accepted.get(token, ())
        if closed and ask in ("resolve", "auth-check"):
            said = f"Access to {name} is restricted and you are not in the authorized list."
            return self.refuse(403 if token else 401, "GatedRepo", said)
        latest = self.server.commit(repo)
        commit = latest if revision == "main" else revision
        if (repo, commit) not in self.server.history:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.server.history[repo, commit]
        if ask == "resolve":
            self.resolve(repo, path, files, commit)
        elif ask == "auth-check":
            self.json({})
        elif ask == "tree":
            under = [p for p in files if p.startswith(f"{path}/" if path else "")]
            if path and not under:
                return self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            parents = {str(parent) for p in under for parent in Path(p).parents} - {".", path}
            deep = "recursive=true" in urlsplit(self.path).query.lower()
            depth = path.count("/") + 1 if path else 0
            shown = [p for p in [*under, *parents] if deep or p.count("/") == depth]
            self.json([self.entry(p, files, commit) for p in shown])
        elif ask == "paths-info":
            wanted = parse_qs(body).get("paths") or json.loads(body or "{}").get("paths", [])
            there = [p for p in wanted if any(f == p or f.startswith(f"{p}/") for f in files)]
            self.json([self.entry(p, files, commit) for p in there])
        else:
            self.json({"_id": commit[:24], "id": name, "modelId": name, "sha": commit,
                       "private": False, "tags": [], "downloads": 0, "likes": 0,
                       "gated": "manual" if name in self.server.gated else False,
                       "siblings": [{"rfilename": p} for p in files]})

    do_HEAD = do_POST = do_GET

    def entry(self, path, files, commit):
        if path not in files:
            return {"type": "directory", "path": path, "oid": commit, "size": 0}
        return {"type": "file", "path": path, "size": len(files[path]),
                "oid": hashlib.sha1(files[path]).hexdigest()}

    def resolve(self, repo, path, files, commit):
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", headers)
        headers["ETag"] = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        if Path(path).suffix in LARGE:
            headers |= {"X-Linked-Size": str(len(files[path])),
                        "X-Linked-ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}
            headers["Location"] = f"{self.server.url}/large/{repo}/{commit}/{path}"
            return self.send(302, b"", headers)
        self.content(files[path], headers)

    def content(self, data, headers=None):
        """The whole of it, or the part that a Range asks for."""
        headers = {**(headers or {}), "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return self.send(200, data, headers)
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        self.send(206, data[first:last + 1],
                  {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code, message, headers=None):
        headers = {**(headers or {}), "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(self, status, data, headers):
        fetched = len(data) if self.command == "GET" and status < 300 else 0
        self.server.log.append((self.command, unquote(urlsplit(self.path).path), fetched))
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", **headers,
                           "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass
