"""A small stand-in for the Hugging Face Hub on loopback, serving folders of this machine as repositories.

    with HubStub(models={"google/flan-t5-small": folder}, datasets={"ucsbnlp/tweet_qa": {"main": folder}}) as hub:
        subprocess.run([...], env=hub.environ(fresh_folder))
    assert any("model.safetensors" in path for _, path, _ in hub.requests)

It answers what `huggingface_hub`, `transformers`, `datasets` and `sentence_transformers` ask in order to read a public
repository (its info, its file tree, some paths' details, its files by HEAD, GET and ranges), with the Hub's own headers
and error codes. Files come by plain HTTP: there is no Xet storage and no redirect.

It also takes uploads, from clients that know one of its `tokens` and set HF_HUB_DISABLE_XET: who am I, making a
repository, the check of a model card's header, small files in the commit itself and large ones through LFS.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

REVISION = r"(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+)"  # the Hub takes these refs quoted (one segment) or plain
RESOLVE = re.compile(rf"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/{REVISION}/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+?(?:/[^/]+?)??)"
    rf"(?:/(?P<call>revision|tree|paths-info)/{REVISION}(?:/(?P<path>.+))?)?"
)
WRITE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<call>preupload|commit)/main")
LFS_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LFS_SUFFIXES = {".safetensors", ".bin", ".parquet", ".arrow", ".model", ".h5", ".msgpack", ".onnx", ".zip"}
NO_REPO = (401, "RepoNotFound", "Invalid username or password.")  # what an anonymous caller gets; 404 with a token
NO_REVISION = (404, "RevisionNotFound", "Invalid rev id")
NO_ENTRY = (404, "EntryNotFound", "Entry not found")


class Revision:
    """One revision of a repository: the files of a folder as they were when the stub was made, and a commit hash."""

    def __init__(self, folder):
        root = Path(folder)
        if not root.is_dir():
            raise NotADirectoryError(f"{root} is not a folder")
        self.files, self.entries = {}, {}  # path -> the file on disk; path -> what the Hub says of a file or a folder
        for file in sorted(root.rglob("*")):
            path = file.relative_to(root).as_posix()
            if file.is_file() and "__pycache__" not in path:
                self.files[path] = file
                self.entries[path] = describe_file(file, path)
                for parent in [folder.as_posix() for folder in Path(path).parents[:-1]]:
                    oid = hashlib.sha1(parent.encode()).hexdigest()
                    self.entries[parent] = {"type": "directory", "oid": oid, "size": 0, "path": parent}
        self.commit = hashlib.sha1(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()

    def tree(self, folder, recursive):
        """The entries below `folder` ("" is the root), all of them or its direct children; None if it is no folder."""
        prefix = f"{folder}/" if folder else ""
        below = [entry for path, entry in sorted(self.entries.items()) if path.startswith(prefix)]
        if folder and not below:
            return None
        return [entry for entry in below if recursive or "/" not in entry["path"][len(prefix) :]]


def describe_file(file, path):
    """What the Hub says of a file: a git blob's SHA-1, and a SHA-256 too for those that it keeps in LFS."""
    data = file.read_bytes()
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    entry = {"type": "file", "oid": blob, "size": len(data), "path": path}
    if file.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class HubStub:
    """Serve `models` and `datasets` (repository id -> folder, or {revision: folder}) while the `with` block lasts.

    tokens: {token: (user, "write" or "read")}, for uploads. `url` is the value for HF_ENDPOINT. `requests` lists
    (method, path with its quotes undone, status), in order. `uploads` is {repository id: {path: bytes}}.
    dies_after: a path after whose first answer every connection is dropped.
    """

    def __init__(self, models=None, datasets=None, tokens=None, dies_after=None):
        self.requests, self.dies_after = [], dies_after
        self.tokens, self.uploads, self.objects = tokens or {}, {}, {}  # objects: what came through LFS, by SHA-256
        self.repos = {}  # (kind, repository id) -> {revision: its files}
        for kind, repos in (("models", models or {}), ("datasets", datasets or {})):
            for repo, given in repos.items():
                folders = given if isinstance(given, dict) else {"main": given}
                self.repos[kind, repo] = {name: Revision(folder) for name, folder in folders.items()}
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environ(self, home, **more):
        """The environment of a subprocess that sees this hub alone, with `home` as its HF_HOME."""
        own = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}  # no call to any other host
        return kept | hub | quiet | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | more

    def find(self, kind, repo, revision):
        """The revision (by name or commit hash) and None, or None and the error that the Hub answers."""
        revisions = self.repos.get((kind, repo))
        if revisions is None:
            return None, NO_REPO
        found = [files for name, files in revisions.items() if revision in (name, files.commit)]
        return (found[0], None) if found else (None, NO_REVISION)


class Server(ThreadingHTTPServer):
    """A server that says nothing of a client that left in the middle of an answer."""

    def handle_error(self, request, client_address):
        """Report any other error on stderr, as the base class does."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"  # connections are kept alive, as the client libraries expect
    disable_nagle_algorithm = True

    def answer_request(self):
        """Find what is asked for, answer, and log it."""
        body = self.read_body()
        if self.server.hub.dies_after in [path for _, path, _ in self.server.hub.requests]:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if self.answer_upload(path, body):
            return
        if match := RESOLVE.fullmatch(path):
            self.answer_file(match["kind"] or "models", match["repo"], match["revision"], match["path"])
        elif (match := API.fullmatch(path)) and (self.command == "POST") == (match["call"] == "paths-info"):
            found, error = self.server.hub.find(match["kind"], match["repo"], match["revision"] or "main")
            if error:
                self.answer_error(*error)
            elif match["call"] == "tree":
                tree = found.tree(match["path"] or "", query.get("recursive", [""])[0].lower() in ("true", "1"))
                self.answer_error(*NO_ENTRY) if tree is None else self.answer_json(tree)
            elif match["call"] == "paths-info":
                asked = parse_qs(body.decode()).get("paths", [])
                self.answer_json([found.entries[path] for path in asked if path in found.entries])
            else:
                self.answer_json(repo_info(match["repo"], found))
        else:
            self.answer_error(404, "", "Sorry, we can't find the page you are looking for.")

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def read_body(self):
        """The bytes that came with the request, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer_upload(self, path, body):
        """Answer what belongs to an upload, as far as the token allows it; returns whether the request did."""
        hub = self.server.hub
        user, role = hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "), (None, None))
        write, batch = WRITE.fullmatch(path), LFS_BATCH.fullmatch(path)
        if self.command == "PUT":  # its address is the permission, as with the Hub's storage
            hub.objects[hashlib.sha256(body).hexdigest()] = body
            self.answer(200, {})
        elif not (write or batch or path in ("/api/whoami-v2", "/api/repos/create", "/api/validate-yaml")):
            return False
        elif user is None:
            self.answer_error(401, "", "Invalid username or password.")
        elif path == "/api/whoami-v2":
            self.answer_json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or user}/{asked['name']}"
            if role != "write" or not repo.startswith(f"{user}/"):
                self.answer_error(403, "", "You don't have the rights to create a model under this namespace")
            elif repo in hub.uploads:
                self.answer_error(409, "", "You already created this model repo")
            else:
                hub.uploads[repo] = {}
                self.answer_json({"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            header = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            given = {name: header.get(name) or [] for name in ("base_model", "datasets")}
            ids = [(n, value) for n, values in given.items() for value in ([values] if type(values) is str else values)]
            errors = [
                f'"{name}" with value "{value}" is not valid' for name, value in ids if not HUB_ID.fullmatch(value)
            ]
            self.answer_json(
                {"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200
            )
        elif (write or batch)["repo"] not in hub.uploads:
            self.answer_error(*NO_REPO)
        elif batch:
            objects = [
                asked | {"actions": {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif write["call"] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "lfs" if Path(file["path"]).suffix in LFS_SUFFIXES else "regular"}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": [file | {"shouldIgnore": False} for file in files]})
        else:
            for line in body.splitlines():
                kind, value = json.loads(line)["key"], json.loads(line)["value"]
                if kind == "file":
                    hub.uploads[write["repo"]][value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    hub.uploads[write["repo"]][value["path"]] = hub.objects[value["oid"]]
            commit = hashlib.sha1(body).hexdigest()
            self.answer_json({"commitUrl": f"{hub.url}/{write['repo']}/commit/{commit}", "commitOid": commit})
        return True

    def answer_file(self, kind, repo, revision, path):
        """A file, or the range of it that is asked for."""
        found, error = self.server.hub.find(kind, repo, revision)
        if error or path not in found.files:
            return self.answer_error(*(error or NO_ENTRY), commit=found and found.commit)
        entry, size = found.entries[path], found.entries[path]["size"]
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            headers["X-Linked-Size"] = str(size)
        start, stop, status = 0, size, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop, status = int(asked[1]), min(int(asked[2] or size) + 1, size), 206
            if start >= stop:
                return self.answer(416, {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(stop - start)}
        if self.command == "HEAD":
            return self.answer(status, headers)
        with found.files[path].open("rb") as file:
            file.seek(start)
            return self.answer(status, headers, file.read(stop - start))

    def answer_json(self, value, status=200):
        """A value of the API."""
        self.answer(status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode())

    def answer_error(self, status, code, message, commit=None):
        """An error, with the headers from which the clients choose their exception."""
        headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": message}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self.answer(status, headers, json.dumps({"error": message}).encode())

    def answer(self, status, headers, body=b""):
        """Log the request, then send all of it; a HEAD gets the same headers and no body."""
        self.server.hub.requests.append((self.command, unquote(self.path), status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on the screen: `HubStub.requests` is the log."""


def repo_info(repo, revision):
    """What `api/models/{id}` and `api/datasets/{id}` say."""
    info = {"_id": revision.commit[:24], "id": repo, "author": repo.rpartition("/")[0], "sha": revision.commit}
    info |= {"private": False, "gated": False, "disabled": False, "tags": [], "lastModified": "2024-01-01T00:00:00Z"}
    return info | {"siblings": [{"rfilename": path} for path in revision.files]}
