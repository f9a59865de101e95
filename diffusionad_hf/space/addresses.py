"""Fetches the images that callers name by an address, from the public internet and nowhere else."""

import asyncio
import ipaddress
import re
import secrets
import socket
from pathlib import Path
from urllib.parse import unquote, urljoin

import httpx

from .intake import LIMITS, MB, Refusal, shown_name

# Not for the public, though `is_global` of some Python versions says so.
_NETS = "100.64.0.0/10 192.88.99.0/24 ::/96 ::ffff:0:0:0/96 2002::/16 fec0::/10 64:ff9b::/96 64:ff9b:1::/48 3fff::/20"
_CLOSED = [ipaddress.ip_network(net) for net in (*_NETS.split(), "5f00::/16")]


def is_address(value: object) -> bool:
    return isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))


async def fetch(url: str, uploads: Path) -> tuple[Path, str]:
    """
    Downloads an image into a folder of its own in `uploads`, within the limits on time, size and redirects.

    Returns:
        Its path and a name to show.

    Raises:
        Refusal: If the address is not public, or does not answer with a file in time.
    """
    name = shown_name(unquote(re.split(r"[?#]", url[8:2000])[0]))
    target = uploads / secrets.token_hex(32) / "image"
    try:
        await asyncio.wait_for(_fetch(url, target), LIMITS.fetch_seconds)
    except (asyncio.TimeoutError, TimeoutError, httpx.TimeoutException) as error:
        reason = f"this address takes longer than {LIMITS.fetch_seconds} s. Upload the image instead."
        raise Refusal(f"{name}: {reason}") from error
    except Refusal:
        raise
    except Exception as error:  # resolvers, sockets, TLS and HTTP each raise their own, in groups as well
        raise Refusal(f"{name}: this address does not give a file. Upload the image instead.") from error
    finally:
        if target.parent.exists() and not target.exists():
            target.parent.rmdir()
    return target, name


async def _fetch(url: str, target: Path) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=LIMITS.fetch_seconds) as client:
        for _ in range(LIMITS.redirects + 1):
            parts = httpx.URL(url)
            if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo:
                raise ValueError("not a web address")
            # The name is resolved once, and that answer is connected to: asked again, it could be another one.
            pinned = parts.copy_with(host=await _resolve(parts.host, parts.port))
            headers = {"Host": parts.netloc.decode(), "Accept-Encoding": "identity"}
            request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": parts.host})
            answer = await client.send(request, stream=True)
            try:
                if answer.has_redirect_location:
                    url = urljoin(url, answer.headers["Location"])
                    continue
                if answer.status_code != 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
                    raise ValueError("no plain file")
                await _save(answer, target)
                return
            finally:
                await answer.aclose()
    raise ValueError("too many redirects")


async def _save(answer: httpx.Response, target: Path) -> None:
    target.parent.mkdir(mode=0o700)
    content = bytearray()
    async for piece in answer.aiter_raw():
        content += piece
        if len(content) > LIMITS.image_bytes:
            raise Refusal(f"The image at this address is larger than {LIMITS.image_bytes // MB} MB. Shrink it first.")
    target.write_bytes(content)


async def _resolve(host: str, port: int | None) -> str:
    """The address to connect to; refused unless all addresses of the host are public."""
    answers = await asyncio.get_running_loop().getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
    found = [str(answer[4][0]).partition("%")[0] for answer in answers]
    if not found or not all(map(is_public, found)):
        raise ValueError("not a public address")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an IP address can be reached by everyone, and so by a visitor without this server's help."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _CLOSED if net.version == ip.version)
