"""A Hugging Face Hub on the loopback interface, for testing with the real `huggingface_hub` client.

    with LoopbackHub(folder) as hub:
        subprocess.run([...], env=hub.environment(fresh_home))            # what a user runs
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo(...)    # or in this process, see `hub.adopt_client`

Blob ids are those that git and Git LFS would give: by them the client knows what need not be uploaded again. Large and
binary files go through LFS, and are served under another host name than the Hub, as there. Statuses and
`X-Error-Code` are those from which the client picks its exception classes. Anything else is a 404.
"""

import asyncio
import base64
import hashlib
import json
import math
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import huggingface_hub
import pytest
import uvicorn
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import fix_hf_endpoint_in_url
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

# A few of the Hub's.
LICENSES = ("apache-2.0", "cc-by-4.0", "cc-by-nc-sa-4.0", "mit", "other")
SPACE_SDKS = ("gradio", "docker", "static")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")


@dataclass(frozen=True)
class Token:
    """An access token: whose it is, whether it may write, and in which namespaces its user has rights."""

    user: str | None = None
    write: bool = False
    namespaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """A file of a commit: git blob id or, in LFS, SHA-256; size in bytes."""

    oid: str
    size: int

    @property
    def in_lfs(self) -> bool:
        return len(self.oid) == 64


@dataclass(frozen=True)
class Commit:
    """A commit: what every path holds, and where it came from."""

    oid: str
    parent: "Commit | None"
    files: dict[str, File]
    title: str
    date: datetime


@dataclass
class Repo:
    """A model, dataset or Space repository; `kind` is plural, as in the Hub's paths."""

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    readers: set[str] = field(default_factory=set)  # users let through the gate
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)  # by "refs/pr/N"
    commits: dict[str, Commit] = field(default_factory=dict)
    variables: dict[str, dict] = field(default_factory=dict)  # of a Space, by name

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or full commit id stands for."""
        for names in (self.branches, self.tags, self.pulls, self.commits):
            if revision in names:
                return names[revision]
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Logged:
    """A request; `status` is None if the connection was cut before an answer."""

    method: str
    path: str
    range: str | None
    status: int | None = None


@dataclass
class Fault:
    """See `Faults.add`."""

    pattern: str
    cut_after: int | None
    status: int | None
    times: int
    delay: float


class Faults(list):
    """Faults on demand, for the next matching requests."""

    def add(
        self,
        pattern: str,
        *,
        cut_after: int | None = None,
        status: int | None = None,
        times: int = 1,
        delay: float = 0.0,
    ) -> None:
        """Disturb the next requests whose `"METHOD /path"`, unquoted and without query, contains a match.

        Args:
            pattern: A regular expression, such as `"^GET /lfs/"` (a download of a large file) or `"^PUT /upload/"`.
            cut_after: Drop the connection after this many bytes of the answer's body. 0 drops it before the
                headers: carried out, but the answer is lost.
            status: Answer with this status, without carrying the request out.
            times: How many requests to disturb.
            delay: Seconds to wait first.
        """
        self.append(Fault(pattern, cut_after, status, times, delay))

    def take(self, method_and_path: str) -> Fault | None:
        """The fault for this request, if any, counted as used."""
        for fault in self:
            if fault.times > 0 and re.search(fault.pattern, method_and_path):
                fault.times -= 1
                return fault
        return None


class ConnectionCut(BaseException):
    """Leaves a handler whose connection was dropped on purpose. No `Exception`: Starlette answers those with a 500."""


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> HTTPException:
    """An answer that the client turns into an exception; `code` is what it picks the class by."""
    # HTTP headers are Latin-1, messages quote user input.
    headers["X-Error-Message"] = message.encode("latin-1", "replace").decode("latin-1")
    return HTTPException(status, message, headers | ({"X-Error-Code": code} if code else {}))


async def error_response(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def metadata_of(card: str) -> dict:
    """The YAML block at the top of a README.md, as JSON; raises `yaml.YAMLError` where it is broken."""
    block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|$)", card, re.DOTALL)
    metadata = (yaml.safe_load(block[1]) if block else None) or {}
    if not isinstance(metadata, dict):
        raise yaml.YAMLError("metadata must be a mapping")
    return json.loads(json.dumps(metadata, default=str))


def card_errors(card: str, repo_type: str) -> Iterator[str]:
    """What the Hub would refuse in a card's metadata (the rules that concern models like ours, and Spaces)."""
    try:
        metadata = metadata_of(card)
    except yaml.YAMLError as error:
        yield f"YAML Metadata Error: {error}"
        return
    choices = {"license": LICENSES}
    if repo_type == "space":
        choices |= {"sdk": SPACE_SDKS, "colorFrom": SPACE_COLORS, "colorTo": SPACE_COLORS}
    for key, allowed in choices.items():
        if metadata.get(key, allowed[0]) not in allowed:
            yield f'"{key}" must be one of [{", ".join(allowed)}]'
    if not all(isinstance(tag, str) for tag in metadata.get("tags") or []):
        yield '"tags" must be an array of strings'
    if len(metadata.get("short_description", "")) > 60:
        yield '"short_description" length must be less than or equal to 60 characters long'
    for model in metadata.get("model-index") or []:
        for result in model["results"]:
            if not all((result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name"))):
                yield '"model-index": a result needs task.type, dataset.type and dataset.name'
            if not all(math.isfinite(metric["value"]) for metric in result["metrics"]):
                yield '"model-index": a metric needs a value'


def timestamp(date: datetime) -> str:
    """A date in the form that the Hub's JSON uses."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"


class LoopbackHub:
    """The server; see the module's docstring.

    Args:
        root: An empty or missing folder for the content of files.

    Attributes:
        endpoint: URL of the Hub.
        token, read_token, stranger_token: A token of alice, who has rights in `org`; one that may not write; and one
            of a stranger, who has no rights there.
        requests: Every request so far, as `Logged`.
        faults: See `Faults.add`.
        page_size: Entries in one page of a listing.
        repos: By kind and id.
        collections: By slug.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.token, self.read_token, self.stranger_token = (f"hf_{secrets.token_hex(17)}" for _ in range(3))
        self.tokens = {
            self.token: Token("alice", True, ("alice", "org")),
            self.read_token: Token("alice", False, ("alice", "org")),
            self.stranger_token: Token("stranger", True, ("stranger",)),
        }
        self.requests: list[Logged] = []
        self.faults = Faults()
        self.page_size = 1000
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self._last_date = datetime.now(timezone.utc)
        self._crashes: list[BaseException] = []
        self._app = Starlette(routes=self._routes(), exception_handlers={HTTPException: error_response})

    # Running

    def __enter__(self) -> "LoopbackHub":
        # Bound here, so that the port is known, and connections queue, before the thread serves.
        listening = self._listening = socket.create_server(("127.0.0.1", 0))
        # Otherwise every answer, sent as headers and body, waits 40 ms for an acknowledgement.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = listening.getsockname()[1]
        # Two names: by the host, clients tell whether their token may go along.
        self.endpoint, self._storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        config = uvicorn.Config(
            self._serve,
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            log_config=None,
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()  # which it does not if it ended while it started
        if self._crashes:
            raise RuntimeError("the loopback Hub could not answer a request") from self._crashes[0]

    def environment(self, home: str | os.PathLike, token: str | bool | None = True) -> dict[str, str]:
        """Environment variables for a subprocess whose Hub is this one and whose caches lie in `home`.

        `token` is as in `huggingface_hub`: True for the user's own (`hub.token`), a string for that one, None or False
        to be anonymous.
        """
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        switches = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_UPDATE_CHECK", "DISABLE_PROGRESS_BARS")
        environment = {**kept, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)}
        environment |= {f"HF_HUB_{name}": "1" for name in switches}
        return environment | ({"HF_TOKEN": self.token if token is True else token} if token else {})

    def adopt_client(
        self, monkeypatch: pytest.MonkeyPatch, home: str | os.PathLike, token: str | bool | None = True
    ) -> None:
        """Point the already imported `huggingface_hub` of this process at this server; arguments as in `environment`.

        Serves libraries that leave endpoint and cache to the client, as diffusers does, but for code that it downloads
        (`trust_remote_code`): where that is cached was settled when diffusers was imported.
        """
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", self.token if token is True else token)
        home = Path(home)
        for name, value in {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.endpoint)
        if int(huggingface_hub.__version__.partition(".")[0]) < 2:
            # It has huggingface.co written out where it checks a card.
            def post(url: str, **kwargs: Any) -> Any:
                return huggingface_hub.get_session().post(fix_hf_endpoint_in_url(url, self.endpoint), **kwargs)

            monkeypatch.setattr(huggingface_hub.repocard, "get_session", lambda: SimpleNamespace(post=post))

    # What tests put in and look at, without HTTP

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: str | bool = False,
        space_sdk: str | None = None,
    ) -> Repo:
        """Create a repository, and commit `files` to it if given."""
        repo = self.repos[f"{repo_type}s", repo_id] = Repo(f"{repo_type}s", repo_id, private, gated, space_sdk)
        first = {".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        if space_sdk:
            first["README.md"] = f"---\ntitle: Theirs\nsdk: {space_sdk}\n---\n"
        repo.branches["main"] = self._commit(repo, None, self._stored(first), "initial commit")
        if files:
            self.add_files(repo_id, files, repo_type=repo_type)
        return repo

    def add_files(self, repo_id: str, files: Mapping[str, bytes | str], *, repo_type: str = "model") -> None:
        """Commit files behind the client's back, in LFS where an upload would be."""
        repo = self.repo(repo_id, repo_type)
        head = repo.branches["main"]
        repo.branches["main"] = self._commit(repo, head, head.files | self._stored(files), "Upload files")

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """The repository of that name; KeyError if there is none."""
        return self.repos[f"{repo_type}s", repo_id]

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The content of every file of a revision."""
        files = self.repo(repo_id, repo_type).at(revision).files
        return {path: (self.root / file.oid).read_bytes() for path, file in files.items()}

    # Storage

    @staticmethod
    def _belongs_in_lfs(path: str, sample: bytes) -> bool:
        return bool(sample) and (path.endswith((".safetensors", ".parquet", ".bin")) or b"\0" in sample)

    def _stored(self, files: Mapping[str, bytes | str]) -> dict[str, File]:
        stored = {}
        for path, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            if self._belongs_in_lfs(path, data[:512]):
                oid = hashlib.sha256(data).hexdigest()
            else:
                oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            (self.root / oid).write_bytes(data)
            stored[path] = File(oid, len(data))
        return stored

    def _commit(self, repo: Repo, parent: Commit | None, files: dict[str, File], title: str) -> Commit:
        # Never the same date twice, so that sorting by date is the order of events.
        date = self._last_date = max(datetime.now(timezone.utc), self._last_date + timedelta(milliseconds=1))
        commit = Commit(secrets.token_hex(20), parent, dict(sorted(files.items())), title, date)
        repo.commits[commit.oid] = commit
        return commit

    # Requests: faults, log, authentication

    async def _serve(self, scope: dict, receive, send) -> None:
        path = unquote(scope["raw_path"].decode())
        sent_range = dict(scope["headers"]).get(b"range")
        log = Logged(scope["method"], path, sent_range and sent_range.decode())
        self.requests.append(log)
        fault = self.faults.take(f"{log.method} {path}") or Fault("", None, None, 0, 0)
        seen = 0

        def drop() -> None:
            for connection in list(self._server.server_state.connections):
                if connection.client == scope["client"]:
                    connection.transport.close()
            raise ConnectionCut

        async def watched_send(message: dict) -> None:
            nonlocal seen
            if fault.cut_after == 0:
                drop()
            body = message.get("body", b"")
            if fault.cut_after is not None and seen + len(body) > fault.cut_after:
                await send({**message, "body": body[: fault.cut_after - seen], "more_body": True})
                drop()
            seen += len(body)
            log.status = message.get("status", log.status)
            await send(message)

        # Routed while still quoted: a revision such as refs%2Fpr%2F1 is one segment of the path.
        answer, scope = self._app, {**scope, "path": scope["raw_path"].decode()}
        if fault.status is not None:
            answer = JSONResponse({"error": "a fault on demand"}, fault.status)
        try:
            await asyncio.sleep(fault.delay)
            await answer(scope, receive, watched_send)
        except Exception as error:
            self._crashes.append(error)
            raise

    def _caller(self, request: Request) -> Token:
        if "authorization" not in request.headers:
            return Token()
        token = self.tokens.get(request.headers["authorization"].removeprefix("Bearer "))
        if token is None:
            raise refusal(401, "Invalid credentials in Authorization header")
        return token

    def _check_writer(self, request: Request, namespace: str | None) -> None:
        """The caller must have a token that may write, and rights in `namespace` if given."""
        caller = self._caller(request)
        if caller.user is None:
            raise refusal(401, "Invalid username or password.")
        if not caller.write:
            raise refusal(403, "Forbidden: this token does not have the write role")
        if namespace is not None and namespace not in caller.namespaces:
            raise refusal(403, f'Forbidden: you do not have the rights to write under the namespace "{namespace}"')

    def _visible(self, kind: str, repo_id: str, caller: Token) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and repo.namespace not in caller.namespaces):
            # Whether a private repository exists is private too. The 401 needs its code: over plain http the client
            # does not take a bare one for "no such repository", as it does over https.
            raise refusal(404 if caller.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _repo(self, request: Request) -> Repo:
        """The repository that a path names, which the caller must be allowed to see."""
        parts = request.path_params
        repo_id = unquote(f"{parts['namespace']}/{parts['name']}")
        return self._visible(parts.get("kind", "models"), repo_id, self._caller(request))

    def _at(self, request: Request) -> tuple[Repo, Commit]:
        repo = self._repo(request)
        return repo, repo.at(unquote(request.path_params.get("revision", "main")))

    # Routes

    def _routes(self) -> list[Route]:
        repo = "/api/{kind}/{namespace}/{name}"
        routes = [
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", "/api/repos/create", self._create_repo),
            ("POST", "/api/collections", self._create_collection),
            ("GET", "/api/collections/{namespace}/{slug}", self._get_collection),
            ("POST", "/api/collections/{namespace}/{slug}/items", self._add_collection_item),
            ("GET", "/api/{kind}", self._list_repos),
            ("GET", repo, self._repo_info),
            ("GET", repo + "/revision/{revision}", self._repo_info),
            *((method, repo + "/variables", self._space_variables) for method in ("GET", "POST", "DELETE")),
            ("POST", repo + "/branch/{branch}", self._create_ref),
            ("POST", repo + "/tag/{revision}", self._create_ref),
            ("GET", repo + "/commits/{revision}", self._commits),
            ("GET", repo + "/tree/{revision}", self._tree),
            ("GET", repo + "/tree/{revision}/{path}", self._tree),
            ("POST", repo + "/paths-info/{revision}", self._paths_info),
            ("POST", repo + "/preupload/{revision}", self._preupload),
            ("POST", repo + "/commit/{revision}", self._post_commit),
            ("GET", "/lfs/{oid}/{name}", self._download),
            ("PUT", "/upload/{oid}", self._upload),
        ]
        for prefix in ("", "/{kind}"):
            path = prefix + "/{namespace}/{name}"
            routes.append(("POST", path + ".git/info/lfs/objects/batch", self._lfs_batch))
            routes.append(("GET", path + "/resolve/{revision}/{path:path}", self._resolve))
        return [Route(path, endpoint, methods=[method]) for method, path, endpoint in routes]

    def _page(self, request: Request, items: list[dict]) -> Response:
        """One page of a listing, with a `Link` header to the next."""
        start = int(request.query_params.get("cursor", 0))
        end, headers = start + self.page_size, {}
        if end < len(items):
            query = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
            url = f"{self.endpoint}{request.scope['path']}?{urlencode([*query, ('cursor', end)])}"
            headers["Link"] = f'<{url}>; rel="next"'
        return JSONResponse(items[start:end], headers=headers)

    # Repositories

    async def _validate_yaml(self, request: Request) -> Response:
        body = await request.json()
        errors = [{"message": message} for message in card_errors(body["content"], body["repoType"])]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def _create_repo(self, request: Request) -> Response:
        body = await request.json()
        self._check_writer(request, body["organization"])
        repo_type, repo_id = body.get("type") or "model", f"{body['organization']}/{body['name']}"
        known = (f"{repo_type}s", repo_id) in self.repos
        if not known:
            private = body.get("visibility") == "private"
            self.add_repo(repo_id, repo_type=repo_type, private=private, space_sdk=body.get("sdk"))
        path = repo_id if repo_type == "model" else f"{repo_type}s/{repo_id}"
        # With the url also where it exists, for the client's `exist_ok`.
        answer = {"url": f"{self.endpoint}/{path}", "name": repo_id}
        return JSONResponse(
            {"error": "You already created this repo", **answer} if known else answer, 409 * known or 200
        )

    async def _space_variables(self, request: Request) -> Response:
        repo = self._repo(request)
        self._check_writer(request, repo.namespace)
        if request.method == "POST":
            body = await request.json()
            repo.variables[body["key"]] = {"value": body["value"], "updatedAt": timestamp(self._last_date)}
        elif request.method == "DELETE":
            repo.variables.pop((await request.json())["key"])
        return JSONResponse(repo.variables)

    def _describe(self, repo: Repo, commit: Commit, expand: list[str]) -> dict:
        """All that the Hub tells about a revision of a repository, or what is asked for of it."""
        card = commit.files.get("README.md")
        metadata = metadata_of((self.root / card.oid).read_text()) if card else {}
        files = {file.oid: file.size for known in repo.commits.values() for file in known.files.values()}
        info = {
            "id": repo.id,
            "sha": commit.oid,
            "lastModified": timestamp(commit.date),
            "private": repo.private,
            "gated": repo.gated,
            "tags": [*metadata.get("tags", []), metadata.get("library_name")],
            "cardData": metadata,
            "siblings": [{"rfilename": path, "size": file.size} for path, file in commit.files.items()],
            "usedStorage": sum(files.values()),
            **{key: metadata[key] for key in ("pipeline_tag", "model-index") if key in metadata},
        }
        return {key: value for key, value in info.items() if key in ("id", *expand)} if expand else info

    async def _repo_info(self, request: Request) -> Response:
        return JSONResponse(self._describe(*self._at(request), request.query_params.getlist("expand")))

    async def _list_repos(self, request: Request) -> Response:
        query, namespaces = request.query_params, self._caller(request).namespaces
        found = []
        for (kind, _), repo in self.repos.items():
            if kind != request.path_params["kind"] or (repo.private and repo.namespace not in namespaces):
                continue
            wanted = set(query.getlist("filter")) <= set(self._describe(repo, repo.branches["main"], [])["tags"])
            if wanted and query.get("author", repo.namespace) == repo.namespace:
                found.append(self._describe(repo, repo.branches["main"], query.getlist("expand")))
        return self._page(request, found)

    # Revisions

    async def _create_ref(self, request: Request) -> Response:
        """A branch, or a tag of the revision in the path."""
        repo, commit = self._at(request)
        self._check_writer(request, repo.namespace)
        branch = request.path_params.get("branch")
        names, name = (repo.branches, unquote(branch)) if branch else (repo.tags, (await request.json())["tag"])
        if name in names:
            raise refusal(409, f"Reference already exists: {name}")
        names[name] = commit
        return Response(status_code=201)

    async def _commits(self, request: Request) -> Response:
        _, commit = self._at(request)
        history = []
        while commit is not None:
            shown = {"id": commit.oid, "title": commit.title, "message": ""}
            history.append({**shown, "authors": [], "date": timestamp(commit.date)})
            commit = commit.parent
        return self._page(request, history)

    # Files

    @staticmethod
    def _entries(commit: Commit) -> dict[str, dict]:
        """Every file and folder of a commit, as the tree and the paths-info endpoints show them."""
        entries = {}
        for path, file in commit.files.items():
            for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
                entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            entries[path] = {"type": "file", "oid": file.oid[:40], "size": file.size, "path": path}
            if file.in_lfs:
                entries[path]["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
        return entries

    async def _tree(self, request: Request) -> Response:
        _, commit = self._at(request)
        entries, folder = self._entries(commit), unquote(request.path_params.get("path", ""))
        if folder and folder not in entries:
            raise refusal(404, f"{folder} does not exist", "EntryNotFound")
        inside = {path: entry for path, entry in entries.items() if path.startswith(f"{folder}/" if folder else "")}
        if request.query_params.get("recursive", "").lower() != "true":
            inside = {path: e for path, e in inside.items() if "/" not in path[len(folder) :].lstrip("/")}
        return self._page(request, list(inside.values()))

    async def _paths_info(self, request: Request) -> Response:
        _, commit = self._at(request)
        asked, entries = parse_qs((await request.body()).decode()), self._entries(commit)
        return JSONResponse([entries[path] for path in asked.get("paths", []) if path in entries])

    async def _resolve(self, request: Request) -> Response:
        repo, commit = self._at(request)
        caller = self._caller(request)
        if repo.gated and repo.namespace not in caller.namespaces and caller.user not in repo.readers:
            raise refusal(403 if caller.user else 401, f"Access to model {repo.id} is restricted", "GatedRepo")
        path, headers = unquote(request.path_params["path"]), {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            # The client remembers that a commit has no such file.
            raise refusal(404, "Entry not found", "EntryNotFound", **headers)
        if not file.in_lfs:
            return FileResponse(self.root / file.oid, headers={**headers, "ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        headers["Location"] = f"{self._storage}/lfs/{file.oid}/{quote(PurePosixPath(path).name)}"
        return Response(status_code=302, headers=headers)

    @staticmethod
    def _check_storage_request(request: Request) -> None:
        # Object storage refuses a second credential beside a link of its own; and a Hub token must not leave the Hub.
        if "authorization" in request.headers:
            raise refusal(400, "Only one auth mechanism allowed")

    async def _download(self, request: Request) -> Response:
        self._check_storage_request(request)
        oid = request.path_params["oid"]
        return FileResponse(self.root / oid, headers={"ETag": f'"{oid}"'})

    # Uploads

    def _check_can_commit(self, repo: Repo, request: Request) -> None:
        # Anyone who sees a repository may open a pull request.
        self._check_writer(request, None if "create_pr" in request.query_params else repo.namespace)

    async def _preupload(self, request: Request) -> Response:
        repo, commit = self._at(request)
        self._check_can_commit(repo, request)
        answer = []
        for asked in (await request.json())["files"]:
            in_lfs = self._belongs_in_lfs(asked["path"], base64.b64decode(asked["sample"]))
            # By this id, git's or LFS's, the client knows what has not changed and need not be committed.
            known = commit.files.get(asked["path"])
            mode = {"uploadMode": "lfs" if in_lfs else "regular", "oid": known and known.oid}
            answer.append({"path": asked["path"], "shouldIgnore": False, **mode})
        return JSONResponse({"files": answer, "commitOid": commit.oid})

    async def _lfs_batch(self, request: Request) -> Response:
        self._check_writer(request, None)
        objects = []
        for wanted in (await request.json())["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if not (self.root / wanted["oid"]).exists():
                objects[-1]["actions"] = {"upload": {"href": f"{self._storage}/upload/{wanted['oid']}"}}
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def _upload(self, request: Request) -> Response:
        self._check_storage_request(request)
        oid, data = request.path_params["oid"], await request.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise refusal(400, "The content does not have the announced SHA-256")
        (self.root / oid).write_bytes(data)
        return Response()

    async def _post_commit(self, request: Request) -> Response:
        repo, head = self._at(request)
        self._check_can_commit(repo, request)
        header, *operations = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files |= self._stored({value["path"]: base64.b64decode(value["content"], validate=True)})
            elif key == "lfsFile":
                files[value["path"]] = File(value["oid"], (self.root / value["oid"]).stat().st_size)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise refusal(400, f"Unknown operation: {key}")
        commit = self._commit(repo, head, files, header["value"]["summary"])
        url = f"{self.endpoint}/{repo.id}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        if "create_pr" in request.query_params:
            number = len(repo.pulls) + 1
            repo.pulls[f"refs/pr/{number}"] = commit
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        else:
            repo.branches[unquote(request.path_params["revision"])] = commit
        return JSONResponse(answer)

    # Collections

    async def _create_collection(self, request: Request) -> Response:
        body = await request.json()
        self._check_writer(request, body["namespace"])
        slug = f"{body['namespace']}/{body['title'].lower().replace(' ', '-')}-{'0' * 24}"
        if slug in self.collections:
            return JSONResponse({"error": "Collection already exists", "slug": slug}, 409)
        known = {"slug": slug, "title": body["title"], "private": body["private"], "items": [], "position": 0}
        known |= {"theme": "orange", "upvotes": 0, "lastUpdated": timestamp(self._last_date)}
        self.collections[slug] = {**known, "owner": {"name": body["namespace"], "type": "org"}}
        return JSONResponse(self.collections[slug])

    async def _get_collection(self, request: Request) -> Response:
        return JSONResponse(self.collections["{namespace}/{slug}".format(**request.path_params)])

    async def _add_collection_item(self, request: Request) -> Response:
        namespace, slug = request.path_params["namespace"], request.path_params["slug"]
        self._check_writer(request, namespace)
        collection, item = self.collections[f"{namespace}/{slug}"], (await request.json())["item"]
        self._visible(f"{item['type']}s", item["id"], self._caller(request))
        if any(known["id"] == item["id"] for known in collection["items"]):
            raise refusal(409, "This item is already in the collection")
        collection["items"].append({**item, "_id": secrets.token_hex(12), "position": len(collection["items"])})
        return JSONResponse(collection)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty loopback Hub."""
    with LoopbackHub(tmp_path / "loopback-hub") as running:
        yield running
