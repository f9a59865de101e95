"""A Hugging Face Hub on the loopback interface, for testing with the real `huggingface_hub` client.

    with LoopbackHub(folder) as hub:
        subprocess.run([...], env=hub.environment(fresh_home))            # what a user runs
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo(...)    # or in this process, see `hub.adopt_client`

Repositories are git-like: files are content-addressed, and blob, tree and commit ids are those that git would give.
Large or binary files go through Git LFS (or Xet, where the client has it switched on) and are served, like on the Hub,
by a second server, `hub.cdn_endpoint`, that accepts signed links and no Hub token. Statuses and `X-Error-Code` headers
are those from which the client picks its exception classes; a request to anything that is not here answers 404.

Differences from the Hub that a test could notice: no discussions beside the pull requests that commits open, a search
that looks for a substring of the id, no regard for `.gitignore`, and listings that are up to date at once.
"""

import asyncio
import base64
import binascii
import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import pytest
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

REGULAR_FILE_LIMIT = 10_000_000
GIT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        "*.7z *.arrow *.bin *.bz2 *.ckpt *.gz *.h5 *.joblib *.npy *.npz *.onnx *.parquet *.pb *.pickle *.pkl *.pt "
        "*.pth *.safetensors *.tar *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
    ).split()
)
SPACE_SDKS = ("gradio", "streamlit", "docker", "static")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
LICENSES = (
    "apache-2.0 mit openrail openrail++ creativeml-openrail-m bigscience-openrail-m bsl-1.0 bsd bsd-2-clause "
    "bsd-3-clause cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "afl-3.0 artistic-2.0 ecl-2.0 epl-2.0 gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 isc ms-pl mpl-2.0 odbl "
    "pddl unlicense wtfpl zlib other unknown"
).split()


class HubError(Exception):
    """An answer that the client turns into an exception; `code` is what it picks the class by, where there is one."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        # HTTP headers are Latin-1, messages quote user input.
        self.headers = {"X-Error-Message": message.encode("latin-1", "replace").decode("latin-1"), **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.status, self.message = status, message


@dataclass(frozen=True)
class Token:
    """An access token: whose it is, whether it may write, and in which namespaces its user has rights."""

    user: str | None
    write: bool
    namespaces: tuple[str, ...]

    def sees(self, repo: "Repo") -> bool:
        return not repo.private or repo.namespace in self.namespaces


ANONYMOUS = Token(None, False, ())


@dataclass(frozen=True)
class File:
    """A file of a commit: git blob id (of the pointer, for LFS), size of the content in bytes, SHA-256 if in LFS."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        """The text that git stores in place of an LFS file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """A commit: what every path holds, and where it came from."""

    oid: str
    parent: "Commit | None"
    files: dict[str, File]
    author: str
    date: datetime
    title: str
    description: str = ""


@dataclass
class Repo:
    """A model, dataset or Space repository."""

    kind: str  # "models", "datasets" or "spaces", as in the Hub's paths
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    readers: set[str] = field(default_factory=set)  # users let through the gate
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)  # SHA-256 of what was uploaded
    variables: dict[str, dict] = field(default_factory=dict)  # of a Space, by name

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        """The repository's path in a browser: models have no prefix."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request (`refs/pr/N`) or full commit id stands for."""
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        if revision.startswith("refs/pr/") and revision[8:] in self.pulls:
            return self.pulls[revision[8:]]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Upload:
    """An LFS object on its way in: of its parts (one, number 0, where it is not split) the ETag and where they lie."""

    repo: Repo
    oid: str
    parts: dict[int, tuple[str, Path]] = field(default_factory=dict)


@dataclass
class Logged:
    """A request as the server ("hub" or "cdn") saw it; `status` is None where the connection was cut before it."""

    server: str
    method: str
    path: str
    query: str
    authenticated: bool
    range: str | None
    status: int | None = None


@dataclass
class Fault:
    """See `Faults.add`."""

    pattern: re.Pattern
    cut_after: int | None
    status: int | None
    times: int
    delay: float
    retry_after: int | None


class Faults:
    """Faults on demand, for the next matching requests of either server."""

    def __init__(self):
        self._faults: list[Fault] = []

    def add(
        self,
        path_regex: str,
        *,
        cut_after: int | None = None,
        status: int | None = None,
        times: int = 1,
        delay: float = 0.0,
        retry_after: int | None = None,
    ) -> None:
        """Disturb the next `times` requests whose `"METHOD /path"` contains a match of `path_regex`.

        Args:
            path_regex: for unquoted paths without query, such as `"resolve/main/model_index.json"`, `"^GET /lfs/"` (a
                download from the CDN) or `"^PUT /upload/"`.
            cut_after: drop the connection after this many bytes of body: of the request's for PUT, of the response's
                for all other methods. 0 drops it before the response's headers: carried out, but the answer is lost.
            status: answer with this status, without carrying the request out.
            times: how many requests to disturb.
            delay: seconds to wait first.
            retry_after: seconds to ask for in a `Retry-After` header; the client waits one more.
        """
        self._faults.append(Fault(re.compile(path_regex), cut_after, status, times, delay, retry_after))

    def clear(self) -> None:
        """Forget the faults that have not happened yet."""
        self._faults.clear()

    def take(self, method_and_path: str) -> Fault | None:
        """The fault for this request, if any, counted as used."""
        for fault in self._faults:
            if fault.times > 0 and fault.pattern.search(method_and_path):
                fault.times -= 1
                return fault
        return None


class ConnectionCut(BaseException):
    """Leaves a handler whose connection was dropped on purpose. No `Exception`: Starlette answers those with a 500."""


def git_id(kind: str, data: bytes) -> str:
    """The id git gives to an object of this kind ("blob", "tree" or "commit")."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def tree_ids(files: Mapping[str, File]) -> dict[str, str]:
    """Git's tree id of every folder of a commit, the root being `""`."""
    folders: dict[str, dict[str, str]] = {"": {}}
    for path, file in files.items():
        parents = [str(parent) for parent in PurePosixPath(path).parents][:-1]
        for folder in parents:
            folders.setdefault(folder, {})
        folders[parents[0] if parents else ""][PurePosixPath(path).name] = file.oid
    ids: dict[str, str] = {}
    for folder in sorted(folders, key=lambda name: (name != "", name.count("/")), reverse=True):
        subfolders = {sub for sub in folders if sub and str(PurePosixPath(sub).parent) == (folder or ".")}
        entries = [(name, b"100644", oid) for name, oid in folders[folder].items()]
        entries += [(PurePosixPath(sub).name, b"40000", ids[sub]) for sub in subfolders]
        # Git sorts a folder as if its name ended with a slash.
        entries.sort(key=lambda entry: entry[0] + ("/" if entry[1] == b"40000" else ""))
        ids[folder] = git_id("tree", b"".join(b"%b %b\0" % (m, n.encode()) + bytes.fromhex(o) for n, m, o in entries))
    return ids


def metadata_of(card: str) -> dict:
    """The YAML block at the top of a README.md, as JSON; raises `yaml.YAMLError` where it is broken."""
    block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|$)", card, re.DOTALL)
    metadata = (yaml.safe_load(block[1]) if block else None) or {}
    if not isinstance(metadata, dict):
        raise yaml.YAMLError("metadata must be a mapping")
    return json.loads(json.dumps(metadata, default=str))


def card_errors(card: str, kind: str) -> list[str]:
    """What the Hub would refuse in a card's metadata (the rules that concern models like ours, and Spaces)."""
    try:
        metadata = metadata_of(card)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    errors = []
    licenses = metadata.get("license", [])
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    for key in ("pipeline_tag", "library_name"):
        if not isinstance(metadata.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if not all(isinstance(tag, str) for tag in metadata.get("tags") or []):
        errors.append('"tags" must be an array of strings')
    if kind == "spaces":
        if metadata.get("sdk") not in SPACE_SDKS:
            errors.append(f'"sdk" must be one of [{", ".join(SPACE_SDKS)}]')
        for key in ("colorFrom", "colorTo"):
            if metadata.get(key, "red") not in SPACE_COLORS:
                errors.append(f'"{key}" must be one of [{", ".join(SPACE_COLORS)}]')
        if len(metadata.get("short_description", "")) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    for i, model in enumerate(metadata.get("model-index") or []):
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{i}].name" is required')
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            for group, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance((result.get(group) or {}).get(key), str):
                    errors.append(f'"{where}.{group}.{key}" is required')
            if not result.get("metrics"):
                errors.append(f'"{where}.metrics" is required')
            for k, metric in enumerate(result.get("metrics") or []):
                value = metric.get("value")
                if "type" not in metric or value is None or value != value:
                    errors.append(f'"{where}.metrics[{k}]" needs a type and a value')
    return errors


def xet_files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """SHA-256, Xet hash and size in bytes of every file that a metadata shard of Xet describes (format version 2)."""

    def digest(at: int) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, at))

    record = 48  # bytes; the header is as long
    at = record
    while shard[at : at + 32] != b"\xff" * 32:
        xet_hash, (flags, parts) = digest(at), struct.unpack_from("<2I", shard, at + 32)
        size = sum(struct.unpack_from("<I", shard, at + record * part + 36)[0] for part in range(1, parts + 1))
        # After the parts, by flags: as many checksums of theirs, and a record with the SHA-256 of the whole.
        at += record * (1 + parts * (1 + (flags >> 31)))
        if flags >> 30 & 1:
            yield digest(at), xet_hash, size
            at += record


def timestamp(date: datetime) -> str:
    """A date in the form that the Hub's JSON uses."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03d}Z"


class LoopbackHub:
    """The server; see the module's docstring.

    Args:
        root: an empty or missing folder for the content of files.
        user: the name of the user whose tokens `token` (may write) and `read_token` (may not) are.
        organizations: namespaces beside their own in which that user has rights.

    Attributes:
        endpoint: URL of the Hub. `cdn_endpoint`: URL of the server that large files come from and go to.
        token, read_token: see `user`. `stranger_token` may write, but not in the namespaces of that user.
        requests: every request so far, as `Logged`.
        faults: see `Faults.add`.
        page_size: entries in one page of a listing.
        multipart_above, part_size: bytes above which an LFS upload is split, and the size of the parts.
    """

    def __init__(self, root: str | os.PathLike, *, user: str = "alice", organizations: tuple[str, ...] = ("org",)):
        self.root = Path(root)
        self.user, self.organizations = user, organizations
        self.token, self.read_token, self.stranger_token = (f"hf_{secrets.token_hex(17)}" for _ in range(3))
        namespaces = (user, *organizations)
        self.tokens = {
            self.token: Token(user, True, namespaces),
            self.read_token: Token(user, False, namespaces),
            self.stranger_token: Token("stranger", True, ("stranger",)),
        }
        self.requests: list[Logged] = []
        self.faults = Faults()
        self.page_size = 1000
        self.multipart_above, self.part_size = 50_000_000, 16 * 2**20
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict] = {}
        self._uploads: dict[str, Upload] = {}
        self._xet_hashes: dict[str, str] = {}  # by SHA-256
        self._secret = secrets.token_bytes(16)
        self._last_date = datetime.now(timezone.utc)
        self._crashes: list[BaseException] = []
        for folder in ("blobs", "lfs", "uploads"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        errors = {HubError: self._error_response}
        self._apps = {
            "hub": Starlette(routes=self._hub_routes(), exception_handlers=errors),
            "cdn": Starlette(routes=self._cdn_routes(), exception_handlers=errors),
        }

    # Running

    def __enter__(self) -> "LoopbackHub":
        # Bound here, so that the ports are known, and connections queue, before the thread serves.
        sockets = {name: socket.create_server(("127.0.0.1", 0)) for name in self._apps}
        for listening in sockets.values():
            # Otherwise every answer, sent as headers and body, waits 40 ms for an acknowledgement.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Under names of their own: by the host, clients tell whether their token may go along.
        hosts = {"hub": "127.0.0.1", "cdn": "localhost"}
        self.endpoint, self.cdn_endpoint = (
            f"http://{hosts[name]}:{listening.getsockname()[1]}" for name, listening in sockets.items()
        )
        self._servers = {
            name: uvicorn.Server(
                uvicorn.Config(
                    lambda scope, receive, send, name=name: self._serve(name, scope, receive, send),
                    http="h11",
                    ws="none",
                    lifespan="off",
                    interface="asgi3",
                    proxy_headers=False,
                    log_config=None,
                    log_level="critical",
                    timeout_graceful_shutdown=1,
                )
            )
            for name in self._apps
        }

        async def serve() -> None:
            await asyncio.gather(*(server.serve([sockets[name]]) for name, server in self._servers.items()))

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="loopback-hub", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.should_exit = True
        self._thread.join()
        if self._crashes:
            raise RuntimeError("the loopback Hub could not answer a request") from self._crashes[0]

    def environment(self, home: str | os.PathLike, token: str | bool | None = True) -> dict[str, str]:
        """Environment variables for a subprocess whose Hub is this one and whose caches lie in `home`.

        `token` is as in `huggingface_hub`: True for the user's own (`hub.token`), a string for that one, None or False
        to be anonymous.
        """
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
        }
        environment = {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if token:
            environment["HF_TOKEN"] = self.token if token is True else token
        return environment

    def adopt_client(
        self, monkeypatch: pytest.MonkeyPatch, home: str | os.PathLike, token: str | bool | None = True
    ) -> None:
        """Point the already imported `huggingface_hub` of this process at this server; arguments as in `environment`.

        Serves libraries that leave endpoint and cache to the client, as diffusers does, but for code that it downloads
        (`trust_remote_code`): where that is cached was settled when diffusers was imported.
        """
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.utils import fix_hf_endpoint_in_url

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
        repo = Repo(f"{repo_type}s", repo_id, private, gated, space_sdk)
        self.repos[repo.kind, repo_id] = repo
        contents = {".gitattributes": GIT_ATTRIBUTES}
        if repo.kind == "spaces":
            contents["README.md"] = f"---\ntitle: {repo_id.split('/')[1]}\nsdk: {space_sdk}\npinned: false\n---\n"
        stored = {path: self._store(repo, path, text.encode(), []) for path, text in contents.items()}
        repo.branches["main"] = self._commit(repo, None, stored, repo.namespace, "initial commit")
        if files:
            self.add_files(repo_id, files, repo_type=repo_type)
        return repo

    def add_files(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str],
        *,
        repo_type: str = "model",
        branch: str = "main",
        message: str = "Upload files",
    ) -> Commit:
        """Commit files behind the client's back, in LFS where an upload would be."""
        repo = self.repo(repo_id, repo_type)
        head = repo.branches[branch]
        stored = {
            path: self._store(repo, path, data.encode() if isinstance(data, str) else data, self._lfs_patterns(head))
            for path, data in files.items()
        }
        repo.branches[branch] = self._commit(repo, head, {**head.files, **stored}, repo.namespace, message)
        return repo.branches[branch]

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        """The repository of that name; KeyError if there is none."""
        return self.repos[f"{repo_type}s", repo_id]

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The content of every file of a revision."""
        return {path: self._read(f) for path, f in self.repo(repo_id, repo_type).at(revision).files.items()}

    # Storage

    def _path(self, file: File) -> Path:
        return self.root / "lfs" / file.sha256 if file.sha256 else self.root / "blobs" / file.oid

    def _read(self, file: File) -> bytes:
        return self._path(file).read_bytes()

    def _lfs_file(self, sha256: str) -> File:
        size = (self.root / "lfs" / sha256).stat().st_size
        return File(git_id("blob", File("", size, sha256).pointer), size, sha256)

    def _store(self, repo: Repo, path: str, data: bytes, lfs_patterns: list[str]) -> File:
        if not self._belongs_in_lfs(path, len(data), data[:512], lfs_patterns):
            file = File(git_id("blob", data), len(data))
            self._path(file).write_bytes(data)
            return file
        sha256 = hashlib.sha256(data).hexdigest()
        (self.root / "lfs" / sha256).write_bytes(data)
        repo.lfs.add(sha256)
        return self._lfs_file(sha256)

    def _lfs_patterns(self, commit: Commit) -> list[str]:
        attributes = commit.files.get(".gitattributes")
        lines = self._read(attributes).decode().splitlines() if attributes else []
        return [line.split()[0] for line in lines if "filter=lfs" in line]

    @staticmethod
    def _belongs_in_lfs(path: str, size: int, sample: bytes, lfs_patterns: list[str]) -> bool:
        tracked = any(
            fnmatch.fnmatchcase(path if "/" in p else PurePosixPath(path).name, p.lstrip("/")) for p in lfs_patterns
        )
        return size > 0 and (tracked or size > REGULAR_FILE_LIMIT or b"\0" in sample)

    def _commit(
        self, repo: Repo, parent: Commit | None, files: dict[str, File], author: str, title: str, description: str = ""
    ) -> Commit:
        # Never the same date twice, so that sorting by date is the order of events.
        date = self._last_date = max(datetime.now(timezone.utc), self._last_date + timedelta(milliseconds=1))
        files = dict(sorted(files.items()))
        who = f"{author} <{author}@users.noreply.localhost> {date.timestamp():.0f} +0000"
        lines = [f"tree {tree_ids(files)['']}", *([f"parent {parent.oid}"] if parent else [])]
        lines += [f"author {who}", f"committer {who}", "", title, *(["", description] if description else []), ""]
        oid = git_id("commit", "\n".join(lines).encode())
        repo.commits[oid] = Commit(oid, parent, files, author, date, title, description)
        return repo.commits[oid]

    def _used_storage(self, repo: Repo) -> int:
        files = (file for commit in repo.commits.values() for file in commit.files.values())
        return sum({file.oid: file.size for file in files}.values())

    # Requests: faults, log, authentication

    async def _serve(self, server: str, scope: dict, receive, send) -> None:
        path = unquote(scope["raw_path"].decode())
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query, authenticated = scope["query_string"].decode(), "authorization" in headers
        log = Logged(server, scope["method"], path, query, authenticated, headers.get("range"))
        self.requests.append(log)
        fault = self.faults.take(f"{log.method} {path}")
        try:
            if fault is not None:
                await asyncio.sleep(fault.delay)
                if fault.cut_after is not None:
                    receive, send = self._cutting(fault.cut_after, server, scope, receive, send)

            async def logging_send(message: dict) -> None:
                await send(message)
                log.status = message.get("status", log.status)

            if fault is not None and fault.status is not None:
                retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                answer = JSONResponse({"error": "a fault on demand"}, fault.status, headers=retry)
                await answer(scope, receive, logging_send)
            else:
                # Routed while still quoted: a revision such as refs%2Fpr%2F1 is one segment of the path.
                scope = {**scope, "path": scope["raw_path"].decode()}
                await self._apps[server](scope, receive, logging_send)
        except ConnectionCut:
            raise
        except Exception as error:
            self._crashes.append(error)
            raise

    def _cutting(self, limit: int, server: str, scope: dict, receive, send):
        """Wrap an ASGI pair so that the connection drops after `limit` bytes of body; see `Faults.add`."""
        seen = 0

        def drop() -> None:
            for connection in list(self._servers[server].server_state.connections):
                if connection.client == scope["client"]:
                    connection.transport.close()
            raise ConnectionCut

        async def cutting_receive() -> dict:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                drop()
            return message

        async def cutting_send(message: dict) -> None:
            nonlocal seen
            if limit == 0:
                drop()
            body = message.get("body", b"")
            if seen + len(body) > limit:
                await send({**message, "body": body[: limit - seen], "more_body": True})
                drop()
            seen += len(body)
            await send(message)

        return (cutting_receive, send) if scope["method"] == "PUT" else (receive, cutting_send)

    @staticmethod
    async def _error_response(request: Request, error: HubError) -> Response:
        return JSONResponse({"error": error.message}, error.status, headers=error.headers)

    def _caller(self, request: Request) -> Token:
        if "authorization" not in request.headers:
            return ANONYMOUS
        token = self.tokens.get(request.headers["authorization"].removeprefix("Bearer "))
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return token

    def _writer(self, request: Request, namespace: str | None = None) -> Token:
        """The caller, who must have a token that may write, and rights in `namespace` if given."""
        caller = self._caller(request)
        if caller is ANONYMOUS:
            raise HubError(401, "Invalid username or password.")
        if not caller.write:
            raise HubError(403, "Forbidden: this token does not have the write role")
        if namespace is not None and namespace not in caller.namespaces:
            raise HubError(403, f'Forbidden: you do not have the rights to write under the namespace "{namespace}"')
        return caller

    def _visible(self, kind: str, repo_id: str, caller: Token) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or not caller.sees(repo):
            # Whether a private repository exists is private too. The 401 needs its code: over plain http the client
            # does not take a bare one for "no such repository", as it does over https.
            raise HubError(401 if caller is ANONYMOUS else 404, "Repository not found", "RepoNotFound")
        return repo

    def _repo(self, request: Request) -> Repo:
        """The repository that a path names, which the caller must be allowed to see."""
        parameters = request.path_params
        kind = parameters.get("kind", "models")
        if kind not in ("models", "datasets", "spaces"):
            raise HubError(404, "Not found")
        # A name without a namespace is valid, but no repository here has one.
        repo_id = "/".join(unquote(parameters[part]) for part in ("namespace", "name") if part in parameters)
        return self._visible(kind, repo_id, self._caller(request))

    def _at(self, request: Request) -> tuple[Repo, Commit]:
        repo = self._repo(request)
        return repo, repo.at(unquote(request.path_params.get("revision", "main")))

    def _check_gate(self, repo: Repo, request: Request) -> None:
        caller = self._caller(request)
        if not repo.gated or repo.namespace in caller.namespaces or caller.user in repo.readers:
            return
        message = f"Access to {repo.kind[:-1]} {repo.id} is restricted"
        if caller is ANONYMOUS:
            raise HubError(401, f"{message}. You must have access to it and be authenticated.", "GatedRepo")
        raise HubError(403, f"{message} and you are not in the authorized list. Ask for access.", "GatedRepo")

    def _check_can_commit(self, repo: Repo, request: Request) -> Token:
        # Anyone who sees a repository may open a pull request.
        revision = unquote(request.path_params.get("revision", "main"))
        pull = "create_pr" in request.query_params or revision.startswith("refs/pr/")
        return self._writer(request, None if pull else repo.namespace)

    # Routes

    def _hub_routes(self) -> list[Route]:
        repo = "/api/{kind}/{namespace}/{name}"
        routes = [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", "/api/repos/create", self._create_repo),
            ("POST", "/api/complete_multipart", self._complete_multipart),
            ("GET", "/api/collections", self._list_collections),
            ("POST", "/api/collections", self._create_collection),
            ("GET", "/api/collections/{namespace}/{slug}", self._get_collection),
            ("POST", "/api/collections/{namespace}/{slug}/items", self._add_collection_item),
            ("GET", "/api/{kind}", self._list_repos),
            ("GET", "/api/{kind}/{name}", self._repo_info),
            ("GET", "/api/{kind}/{name}/revision/{revision}", self._repo_info),
            ("GET", "/{name}/resolve/{revision}/{path:path}", self._resolve),
            ("GET", repo, self._repo_info),
            ("GET", repo + "/revision/{revision}", self._repo_info),
            ("GET", repo + "/runtime", self._space_runtime),
            *((method, repo + "/variables", self._space_variables) for method in ("GET", "POST", "DELETE")),
            ("GET", repo + "/refs", self._refs),
            ("POST", repo + "/branch/{branch}", self._create_branch),
            ("DELETE", repo + "/branch/{branch}", self._delete_branch),
            ("POST", repo + "/tag/{revision}", self._create_tag),
            ("DELETE", repo + "/tag/{tag}", self._delete_tag),
            ("GET", repo + "/commits/{revision}", self._commits),
            ("GET", repo + "/tree/{revision}", self._tree),
            ("GET", repo + "/tree/{revision}/{path}", self._tree),
            ("POST", repo + "/paths-info/{revision}", self._paths_info),
            ("POST", repo + "/preupload/{revision}", self._preupload),
            ("POST", repo + "/commit/{revision}", self._post_commit),
            ("GET", repo + "/xet-read-token/{revision}", self._xet_token),
            ("GET", repo + "/xet-write-token/{revision}", self._xet_token),
        ]
        for prefix in ("", "/{kind}"):
            lfs = prefix + "/{namespace}/{name}.git/info/lfs/objects/"
            routes += [
                ("POST", lfs + "batch", self._lfs_batch),
                ("POST", lfs + "verify", self._lfs_verify),
                ("GET", prefix + "/{namespace}/{name}/resolve/{revision}/{path:path}", self._resolve),
            ]
        return [Route(path, endpoint, methods=[method]) for method, path, endpoint in routes]

    def _cdn_routes(self) -> list[Route]:
        return [
            Route("/lfs/{sha256}/{name}", self._download, methods=["GET"]),
            Route("/upload/{upload}/{name}", self._upload, methods=["PUT"]),
            Route("/upload/{upload}/{name}/{part:int}", self._upload, methods=["PUT"]),
        ]

    def _page(self, request: Request, items: list[dict]) -> Response:
        """One page of a listing, with a `Link` header to the next."""
        query = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
        start = int(request.query_params.get("cursor", 0))
        end = start + min(int(request.query_params.get("limit", self.page_size)), self.page_size)
        headers = {}
        if end < len(items):
            url = f"{self.endpoint}{request.scope['path']}?{urlencode([*query, ('cursor', end)])}"
            headers["Link"] = f'<{url}>; rel="next"'
        return JSONResponse(items[start:end], headers=headers)

    # Accounts and repositories

    async def _whoami(self, request: Request) -> Response:
        caller = self._caller(request)
        if caller is ANONYMOUS:
            raise HubError(401, "Invalid username or password.")
        role = "write" if caller.write else "read"
        return JSONResponse(
            {
                "type": "user",
                "name": caller.user,
                "fullname": caller.user.title(),
                "email": f"{caller.user}@localhost",
                "orgs": [{"type": "org", "name": name} for name in caller.namespaces if name != caller.user],
                "auth": {"type": "access_token", "accessToken": {"displayName": role, "role": role}},
            }
        )

    async def _validate_yaml(self, request: Request) -> Response:
        body = await request.json()
        errors = card_errors(body["content"], f"{body['repoType']}s")
        warnings = [] if errors or metadata_of(body["content"]) else ["empty or missing yaml metadata in repo card"]
        answer = {key: [{"message": m} for m in found] for key, found in (("errors", errors), ("warnings", warnings))}
        return JSONResponse(answer, 400 if errors else 200)

    async def _create_repo(self, request: Request) -> Response:
        body = await request.json()
        name, kind = body["name"], f"{body.get('type') or 'model'}s"
        namespace = body.get("organization") or self._writer(request).user
        self._writer(request, namespace)
        if not re.fullmatch(r"(?!.*(?:--|\.\.|[.-]$|\.git$))\w[\w.-]{0,95}", name, re.ASCII):
            raise HubError(400, f"Invalid repo name: {name}")
        if kind == "spaces" and body.get("sdk") not in SPACE_SDKS:
            raise HubError(400, f'"sdk" must be one of [{", ".join(SPACE_SDKS)}]')
        repo_id, private = f"{namespace}/{name}", body.get("visibility") == "private"
        known = self.repos.get((kind, repo_id))
        repo = known or self.add_repo(repo_id, repo_type=kind[:-1], private=private, space_sdk=body.get("sdk"))
        # With the url also where it exists, for the client's `exist_ok`.
        answer = {"url": f"{self.endpoint}/{repo.url_path}", "name": repo_id}
        if known:
            return JSONResponse({"error": f"You already created this {kind[:-1]} repo", **answer}, 409)
        return JSONResponse(answer)

    def _card(self, commit: Commit) -> str:
        return self._read(commit.files["README.md"]).decode() if "README.md" in commit.files else ""

    def _runtime(self, repo: Repo, commit: Commit) -> dict:
        app_file = metadata_of(self._card(commit)).get("app_file", "app.py")
        hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
        return {"stage": "RUNNING" if app_file in commit.files else "NO_APP_FILE", "hardware": hardware}

    async def _space_runtime(self, request: Request) -> Response:
        return JSONResponse(self._runtime(*self._at(request)))

    async def _space_variables(self, request: Request) -> Response:
        repo = self._repo(request)
        if repo.kind != "spaces":
            raise HubError(404, "Not found")
        self._writer(request, repo.namespace)
        if request.method != "GET":
            body = await request.json()
            if request.method == "POST":
                known = {key: body[key] for key in ("value", "description") if key in body}
                repo.variables[body["key"]] = {**known, "updatedAt": timestamp(datetime.now(timezone.utc))}
            else:
                repo.variables.pop(body["key"], None)
        return JSONResponse(repo.variables)

    def _describe(self, repo: Repo, commit: Commit, blobs: bool = False) -> dict:
        """All that the Hub tells about a revision of a repository."""
        card = self._card(commit)
        metadata = metadata_of(card)
        siblings = []
        for path, file in commit.files.items():
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1].update(size=file.size, blobId=file.oid)
                if file.sha256:
                    siblings[-1]["lfs"] = {"size": file.size, "sha256": file.sha256, "pointerSize": len(file.pointer)}
        info = {
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.oid,
            "lastModified": timestamp(commit.date),
            "createdAt": timestamp(min(c.date for c in repo.commits.values())),
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": self._tags(metadata, card, commit),
            "cardData": metadata,
            "siblings": siblings,
            "usedStorage": self._used_storage(repo),
        }
        if repo.kind == "models":
            info.update(modelId=repo.id, spaces=[])
            info.update({k: metadata[k] for k in ("library_name", "pipeline_tag", "model-index") if k in metadata})
        elif repo.kind == "spaces":
            subdomain = re.sub(r"[^a-z0-9-]", "-", repo.id.lower())
            info.update(sdk=repo.sdk, subdomain=subdomain, host=f"https://{subdomain}.hf.space")
            info.update(runtime=self._runtime(repo, commit), models=metadata.get("models", []))
        return info

    @staticmethod
    def _tags(metadata: dict, card: str, commit: Commit) -> list[str]:
        """The tags of a repository: those of its card, and those that the Hub adds for it."""

        def listed(key: str) -> list:
            value = metadata.get(key) or []
            return value if isinstance(value, list) else [value]

        tags = [*listed("library_name"), *listed("tags"), *listed("language")]
        for key in ("license", "base_model", "datasets"):
            tags += [f"{key.removesuffix('s')}:{value}" for value in listed(key)]
        tags += [f"arxiv:{paper}" for paper in re.findall(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})", card)]
        tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []
        tags += ["model-index"] if "model-index" in metadata else []
        return list(dict.fromkeys([*tags, "region:us"]))

    async def _repo_info(self, request: Request) -> Response:
        repo, commit = self._at(request)
        info = self._describe(repo, commit, blobs="blobs" in request.query_params)
        return JSONResponse(self._expanded(info, request))

    @staticmethod
    def _expanded(info: dict, request: Request) -> dict:
        expand = request.query_params.getlist("expand")
        return {key: value for key, value in info.items() if key in ("id", *expand)} if expand else info

    async def _list_repos(self, request: Request) -> Response:
        kind, query, caller = request.path_params["kind"], request.query_params, self._caller(request)
        if kind not in ("models", "datasets", "spaces"):
            raise HubError(404, "Not found")
        # A listing tells less than a repository's own page, unless it is asked for more.
        shown = set("id modelId private likes downloads tags pipeline_tag library_name createdAt sdk".split())
        if "full" in query:
            shown |= {"author", "gated", "lastModified", "sha", "siblings"}
        if "cardData" in query or ("full" in query and kind != "models"):
            shown |= {"cardData"}
        found = []
        for repo in self.repos.values():
            if repo.kind != kind or not caller.sees(repo):
                continue
            info = self._describe(repo, repo.branches["main"])
            tags = {tag.lower() for tag in [*info["tags"], info.get("pipeline_tag", "")]}
            if (
                query.get("author", repo.namespace) == repo.namespace
                and query.get("search", "").lower() in repo.id.lower()
                and query.get("pipeline_tag") in (None, info.get("pipeline_tag"))
                and query.get("gated", str(bool(repo.gated))).lower() == str(bool(repo.gated)).lower()
                and all(tag.lower() in tags for tag in query.getlist("filter"))
            ):
                found.append(info)
        sort = query.get("sort", "lastModified")
        found.sort(key=lambda info: (info.get(sort, 0), info["lastModified"]), reverse=True)
        if "expand" in query:
            return self._page(request, [self._expanded(info, request) for info in found])
        return self._page(request, [{key: info[key] for key in info if key in shown} for info in found])

    # Revisions

    async def _refs(self, request: Request) -> Response:
        repo = self._repo(request)

        def listed(commits: dict[str, Commit], prefix: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": c.oid} for n, c in commits.items()]

        refs = {"branches": listed(repo.branches, "heads"), "converts": [], "tags": listed(repo.tags, "tags")}
        if "include_prs" in request.query_params:
            refs["pullRequests"] = listed(repo.pulls, "pr")
        return JSONResponse(refs)

    async def _create_branch(self, request: Request) -> Response:
        repo, branch = self._repo(request), unquote(request.path_params["branch"])
        self._writer(request, repo.namespace)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.at((await request.json()).get("startingPoint", "main"))
        return Response(status_code=201)

    async def _delete_branch(self, request: Request) -> Response:
        repo, branch = self._repo(request), unquote(request.path_params["branch"])
        self._writer(request, repo.namespace)
        if branch == "main":
            raise HubError(400, "Cannot delete the default branch")
        if repo.branches.pop(branch, None) is None:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return Response()

    async def _create_tag(self, request: Request) -> Response:
        repo, commit = self._at(request)
        self._writer(request, repo.namespace)
        tag = (await request.json())["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Reference already exists: refs/tags/{tag}")
        repo.tags[tag] = commit
        return Response(status_code=201)

    async def _delete_tag(self, request: Request) -> Response:
        repo, tag = self._repo(request), unquote(request.path_params["tag"])
        self._writer(request, repo.namespace)
        if repo.tags.pop(tag, None) is None:
            raise HubError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        return Response()

    async def _commits(self, request: Request) -> Response:
        _, commit = self._at(request)
        history = []
        while commit is not None:
            shown = {"id": commit.oid, "title": commit.title, "message": commit.description}
            history.append({**shown, "authors": [{"user": commit.author}], "date": timestamp(commit.date)})
            commit = commit.parent
        return self._page(request, history)

    # Files

    def _entries(self, commit: Commit, expand: bool) -> dict[str, dict]:
        """Every file and folder of a commit, as the tree and the paths-info endpoints show them."""
        folders = {path: oid for path, oid in tree_ids(commit.files).items() if path}
        entries = {path: {"type": "directory", "oid": oid, "size": 0, "path": path} for path, oid in folders.items()}
        for path, file in commit.files.items():
            entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
            if file.sha256:
                entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            if file.sha256 in self._xet_hashes:
                entries[path]["xetHash"] = self._xet_hashes[file.sha256]
        for path in entries if expand else ():
            last = commit
            while last.parent and self._content(last.parent, path) == self._content(last, path):
                last = last.parent
            entries[path]["lastCommit"] = {"id": last.oid, "title": last.title, "date": timestamp(last.date)}
        return dict(sorted(entries.items()))

    @staticmethod
    def _content(commit: Commit, path: str) -> dict[str, File]:
        return {p: file for p, file in commit.files.items() if p == path or p.startswith(f"{path}/")}

    async def _tree(self, request: Request) -> Response:
        _, commit = self._at(request)
        folder = unquote(request.path_params.get("path", "")).strip("/")
        entries = self._entries(commit, request.query_params.get("expand", "").lower() == "true")
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        inside = [entry for path, entry in entries.items() if path.startswith(f"{folder}/" if folder else "")]
        if request.query_params.get("recursive", "").lower() != "true":
            inside = [entry for entry in inside if "/" not in entry["path"][len(folder) :].lstrip("/")]
        return self._page(request, inside)

    async def _paths_info(self, request: Request) -> Response:
        _, commit = self._at(request)
        form = parse_qs((await request.body()).decode())
        entries = self._entries(commit, form.get("expand", [""])[0].lower() == "true")
        return JSONResponse([entries[path] for path in form.get("paths", []) if path in entries])

    async def _resolve(self, request: Request) -> Response:
        repo, commit = self._at(request)
        self._check_gate(repo, request)
        path = unquote(request.path_params["path"])
        file = commit.files.get(path)
        if file is None:
            # The client remembers that a commit has no such file.
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid}
        if file.sha256 is None:
            return FileResponse(self._path(file), headers={**headers, "ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"', "Accept-Ranges": "bytes"}
        link = f"{self.cdn_endpoint}/lfs/{file.sha256}/{quote(PurePosixPath(path).name)}"
        headers["Location"] = f"{link}?signature={self._signature(file.sha256)}"
        if file.sha256 in self._xet_hashes:
            headers["X-Xet-Hash"] = self._xet_hashes[file.sha256]
            route = f"/api/{repo.kind}/{repo.id}/xet-read-token/{commit.oid}"
            headers["X-Xet-Refresh-Route"] = self.endpoint + route
        return Response(status_code=302, headers=headers)

    def _signature(self, sha256: str) -> str:
        return hmac.new(self._secret, sha256.encode(), hashlib.sha256).hexdigest()

    async def _download(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        self._check_storage_request(request)
        if not hmac.compare_digest(request.query_params.get("signature", ""), self._signature(sha256)):
            raise HubError(403, "Access denied: missing or wrong signature")
        return FileResponse(
            self.root / "lfs" / sha256,
            headers={"ETag": f'"{sha256}"'},
            filename=unquote(request.path_params["name"]),
            content_disposition_type="inline",
        )

    @staticmethod
    def _check_storage_request(request: Request) -> None:
        # Object storage refuses a second credential beside the signed link; and a Hub token must not leave the Hub.
        if "authorization" in request.headers:
            raise HubError(400, "Only one auth mechanism allowed")

    # Uploads

    async def _preupload(self, request: Request) -> Response:
        repo, commit = self._at(request)
        self._check_can_commit(repo, request)
        patterns, answer = self._lfs_patterns(commit), []
        for asked in (await request.json())["files"]:
            in_lfs = self._belongs_in_lfs(asked["path"], asked["size"], base64.b64decode(asked["sample"]), patterns)
            known = commit.files.get(asked["path"])
            # By this id, git's or LFS's, the client knows what has not changed and need not be committed.
            oid = known and (known.sha256 or known.oid)
            mode = "lfs" if in_lfs else "regular"
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answer, "commitOid": commit.oid})

    async def _lfs_batch(self, request: Request) -> Response:
        repo = self._repo(request)
        self._writer(request)
        body, objects = await request.json(), []
        for wanted in body["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size})
            if oid in repo.lfs:
                continue
            upload = secrets.token_hex(8)
            self._uploads[upload] = Upload(repo, oid)
            url = f"{self.cdn_endpoint}/upload/{upload}/{oid}"
            action: dict = {"href": url}
            if size > self.multipart_above and "multipart" in body["transfers"]:
                parts = range(1, -(-size // self.part_size) + 1)
                action["href"] = f"{self.endpoint}/api/complete_multipart?uploadId={upload}"
                action["header"] = {"chunk_size": str(self.part_size), **{str(n): f"{url}/{n}" for n in parts}}
            verify = {"href": f"{self.endpoint}/{repo.url_path}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": action, "verify": verify}
        return JSONResponse({"transfer": "multipart", "objects": objects}, media_type="application/vnd.git-lfs+json")

    async def _upload(self, request: Request) -> Response:
        """Take a whole LFS object, or a part of one."""
        self._check_storage_request(request)
        name, part = request.path_params["upload"], request.path_params.get("part", 0)
        if name not in self._uploads:
            raise HubError(403, "Access denied: no such upload")
        target, digest = self.root / "uploads" / f"{name}-{part}", hashlib.md5(usedforsecurity=False)
        with target.open("wb") as file:
            async for chunk in request.stream():
                digest.update(chunk)
                file.write(chunk)
        etag = f'"{digest.hexdigest()}"'
        self._uploads[name].parts[part] = (etag, target)
        if not part:
            self._finish_upload(self._uploads[name])
        return Response(headers={"ETag": etag})

    async def _complete_multipart(self, request: Request) -> Response:
        body, upload = await request.json(), self._uploads[request.query_params["uploadId"]]
        if body["parts"] != [{"partNumber": n, "etag": etag} for n, (etag, _) in sorted(upload.parts.items())]:
            raise HubError(400, "One or more of the specified parts could not be found")
        self._finish_upload(upload)
        return JSONResponse({"success": True})

    def _finish_upload(self, upload: "Upload") -> None:
        whole, digest = self.root / "uploads" / upload.oid, hashlib.sha256()
        with whole.open("wb") as file:
            for _, (_, part) in sorted(upload.parts.items()):
                data = part.read_bytes()
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != upload.oid:
            raise HubError(400, "The content does not have the announced SHA-256")
        whole.replace(self.root / "lfs" / upload.oid)
        upload.repo.lfs.add(upload.oid)

    async def _xet_token(self, request: Request) -> Response:
        """Admit to Xet storage, which is a folder: hf_xet takes `local://` for the address of one."""
        repo = self._repo(request)
        if "/xet-write-token/" in request.scope["path"]:
            self._check_can_commit(repo, request)
        else:
            self._check_gate(repo, request)
        url, token, expires = f"local://{self.root.resolve() / 'xet'}", secrets.token_hex(8), int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)

    def _take_from_xet(self, repo: Repo, sha256: str) -> None:
        """Make a file that a client put into Xet storage an LFS object too, for clients without Xet."""
        import hf_xet

        target = (self.root / "lfs" / sha256).resolve()
        for shard in self.root.glob("xet/**/xorbs/shards/*.mdb"):
            for found, xet_hash, size in xet_files(shard.read_bytes()):
                if found == sha256:
                    # From a copy: the client keeps the store locked until it ends.
                    with tempfile.TemporaryDirectory() as copy:
                        shutil.copytree(self.root / "xet", copy, dirs_exist_ok=True)
                        session, expires = hf_xet.XetSession(), int(time.time()) + 3600
                        with session.new_file_download_group(
                            endpoint=f"local://{copy}", token="any", token_expiry_unix_secs=expires
                        ) as group:
                            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
                    self._xet_hashes[sha256] = xet_hash
                    repo.lfs.add(sha256)
                    return

    async def _lfs_verify(self, request: Request) -> Response:
        repo = self._repo(request)
        self._writer(request)
        body = await request.json()
        if body["oid"] not in repo.lfs or self._lfs_file(body["oid"]).size != body["size"]:
            raise HubError(404, "The object was not uploaded")
        return JSONResponse({"message": "OK"})

    async def _post_commit(self, request: Request) -> Response:
        repo, head = self._at(request)
        caller = self._check_can_commit(repo, request)
        header, *operations = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        if header["value"].get("parentCommit", head.oid) != head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(repo, files, operation["key"], operation["value"])
        if "README.md" in files and files["README.md"] != head.files.get("README.md"):
            if errors := card_errors(self._read(files["README.md"]).decode(), repo.kind):
                raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        self._track_new_lfs_files(repo, files)
        # A commit that changes nothing is a commit all the same: not sending one is the client's duty.
        summary, description = header["value"]["summary"], header["value"].get("description", "")
        revision, create_pr = unquote(request.path_params["revision"]), "create_pr" in request.query_params
        if not (create_pr or revision.startswith("refs/pr/") or revision in repo.branches):
            raise HubError(400, f"Cannot commit to {revision}, which is not a branch")
        commit = self._commit(repo, head, files, caller.user, summary, description)
        url = f"{self.endpoint}/{repo.url_path}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        if create_pr:
            number = str(len(repo.pulls) + 1)
            repo.pulls[number] = commit
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        elif revision.startswith("refs/pr/"):
            repo.pulls[revision.removeprefix("refs/pr/")] = commit
        else:
            repo.branches[revision] = commit
        return JSONResponse(answer)

    def _apply(self, repo: Repo, files: dict[str, File], key: str, value: dict) -> None:
        """Carry out one line of a commit on `files`."""
        path = value["path"].rstrip("/")
        if key == "file":
            try:
                data = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise HubError(400, f"{path} is not base64: {error}") from error
            files[path] = File(git_id("blob", data), len(data))
            self._path(files[path]).write_bytes(data)
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                self._take_from_xet(repo, value["oid"])
            if value["oid"] not in repo.lfs:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = self._lfs_file(value["oid"])
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(f"{path}/")]
            if not inside:
                raise HubError(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation: {key}")

    def _track_new_lfs_files(self, repo: Repo, files: dict[str, File]) -> None:
        """Name LFS files that no pattern covers in `.gitattributes`, as the Hub does."""
        commit = Commit("", None, files, "", self._last_date, "")
        patterns = self._lfs_patterns(commit)
        missing = [p for p, f in files.items() if f.sha256 and not self._belongs_in_lfs(p, 1, b"", patterns)]
        if missing:
            text = self._read(files[".gitattributes"]).decode() if ".gitattributes" in files else ""
            patterns = [path.replace(" ", "[[:space:]]") for path in missing]
            text += "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns)
            files[".gitattributes"] = self._store(repo, ".gitattributes", text.encode(), [])

    # Collections

    def _collection(self, request: Request) -> dict:
        collection = self.collections.get(f"{request.path_params['namespace']}/{request.path_params['slug']}")
        hidden = collection and collection["private"]
        if not collection or (hidden and request.path_params["namespace"] not in self._caller(request).namespaces):
            raise HubError(404, "Collection not found")
        return collection

    async def _get_collection(self, request: Request) -> Response:
        return JSONResponse(self._collection(request))

    async def _list_collections(self, request: Request) -> Response:
        query, caller = request.query_params, self._caller(request)
        found = []
        for collection in self.collections.values():
            owner = collection["owner"]["name"]
            items = {f"{item['type']}s/{item['id']}" for item in collection["items"]}
            if (
                (not collection["private"] or owner in caller.namespaces)
                and owner in (query.getlist("owner") or [owner])
                and set(query.getlist("item")) <= items
            ):
                # A listing shows the first four items; it has no position, which the client counts itself.
                shown = {key: value for key, value in collection.items() if key != "position"}
                found.append({**shown, "items": collection["items"][:4]})
        return self._page(request, found)

    async def _create_collection(self, request: Request) -> Response:
        body = await request.json()
        self._writer(request, body["namespace"])
        if len(body.get("description", "")) > 150:
            raise HubError(400, '"description" length must be less than or equal to 150 characters long')
        for slug, collection in self.collections.items():
            if collection["title"] == body["title"] and collection["owner"]["name"] == body["namespace"]:
                return JSONResponse({"error": "Collection already exists", "slug": slug}, 409)
        words = re.sub(r"[^a-z0-9]+", "-", body["title"].lower()).strip("-")
        slug = f"{body['namespace']}/{words}-{secrets.token_hex(12)}"
        self.collections[slug] = {
            "slug": slug,
            "title": body["title"],
            "description": body.get("description"),
            "owner": {"name": body["namespace"], "type": "user" if body["namespace"] == self.user else "org"},
            "private": body["private"],
            "position": len(self.collections),
            "theme": "orange",
            "upvotes": 0,
            "lastUpdated": timestamp(datetime.now(timezone.utc)),
            "items": [],
        }
        return JSONResponse(self.collections[slug])

    async def _add_collection_item(self, request: Request) -> Response:
        collection, body = self._collection(request), await request.json()
        caller = self._writer(request, request.path_params["namespace"])
        item, note = body["item"], body.get("note")
        self._visible(f"{item['type']}s", item["id"], caller)
        if note and len(note) > 500:
            raise HubError(400, '"note" length must be less than or equal to 500 characters long')
        if any((known["type"], known["id"]) == (item["type"], item["id"]) for known in collection["items"]):
            raise HubError(409, "This item is already in the collection")
        collection["items"].append(
            {
                "_id": secrets.token_hex(12),
                "id": item["id"],
                "type": item["type"],
                "position": len(collection["items"]),
                **({"note": {"text": note, "html": note}} if note else {}),
            }
        )
        return JSONResponse(collection)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty loopback Hub."""
    with LoopbackHub(tmp_path / "loopback-hub") as running:
        yield running
