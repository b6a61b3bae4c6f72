"""What a URL of the table means: whom to ask, over what, and for which path, as a browser would read it.

`requests` reads who is to be asked. The path is sent as it is written: `requests` would spell it otherwise (%7E as ~, %c3 as
%C3), for which a server that signs its URLs refuses them, and would take every %20 for text where a single % stands alone.
"""
import base64
import re
import urllib.parse
from typing import NamedTuple

import requests
import urllib3
from requests.utils import get_auth_from_url, get_environ_proxies, get_netrc_auth, select_proxy

from addons.images.http_client import Place
from addons.images.names import one_spelling
from image_text_sim_clip import Config, RowFailure

DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE_BYTES = bytes(range(128))


class Proxy(NamedTuple):
    """An HTTP proxy of the environment."""

    host: str
    port: int
    authorization: str  # the value of Proxy-Authorization; empty for none


class Target(NamedTuple):
    """One GET: `place` is whom to ask, `host_name` under which that host is paced, `request` is sent."""

    url: str
    place: Place
    host_name: str
    request: bytes
    proxy: Proxy | None


def can_be_split(url: str) -> bool:
    """Whether urllib can take the URL apart; it raises ValueError for "http://[bad/"."""
    try:
        urllib.parse.urlsplit(url)
        return True
    except ValueError:
        return False


def read_url(url: str, config: Config) -> Target:
    """Take a URL that a stranger wrote apart; raises RowFailure (missing, forbidden) for what cannot be asked for."""
    prepared = requests.PreparedRequest()
    written = _as_browsers_read(url)
    try:
        prepared.prepare_url(written, None)
        parts = urllib.parse.urlsplit(prepared.url or "")
        if parts.scheme not in DEFAULT_PORTS:
            raise RowFailure("forbidden", "only http and https")
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        host = parts.hostname or ""
        host.encode("ascii")
    except (requests.exceptions.RequestException, urllib3.exceptions.LocationValueError, ValueError):  # UnicodeError is one
        raise RowFailure("missing", "not a URL") from None
    path = _path_to_ask_for(written)
    clean = f"{parts.scheme}://{parts.netloc}{path}"
    if not host or re.search(r"[\x00-\x20\x7f]", host + path):
        raise RowFailure("missing", "not a URL")
    is_default = port == DEFAULT_PORTS[parts.scheme]
    name = one_spelling(host)
    proxy = find_proxy(clean) if config.use_environment_proxies else None
    over = f"{proxy.host}:{proxy.port}" if proxy else ""
    shown = f"[{host}]" if ":" in host else host
    headers = {"Host": shown if is_default else f"{shown}:{port}", "User-Agent": " ".join(config.user_agent.split()),
               "Accept": "image/*,*/*;q=0.1",
               "Accept-Encoding": "identity"}  # a compressed body could be a bomb, and images are compressed already
    secret = _find_password(clean, config)
    if secret:
        headers["Authorization"] = secret
    head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in headers.items()) + "\r\n"
    return Target(clean, Place(host.rstrip("."), port, parts.scheme == "https", over),
                  name if is_default else f"{name}:{port}", head.encode("utf-8"), proxy)


def _as_browsers_read(url: str) -> str:
    """The URL without tabs and line breaks, and with slashes for the backslashes before its query."""
    text = re.sub(r"[\t\r\n]", "", url)
    end = re.search(r"[?#]|$", text)
    assert end
    return text[:end.start()].replace("\\", "/") + text[end.start():]


def _path_to_ask_for(url: str) -> str:
    """Path and query of an http(s) URL, in ASCII: what is escaped stays as it is, what has to be is, `..` is a step up."""
    written = re.sub(r"^\s*[^:/?#]*://[^/?#]*", "", url).partition("#")[0]
    path, mark, query = written.partition("?")
    steps: list[str] = []
    for step in path.split("/")[1:]:
        plain = step.lower().replace("%2e", ".")
        if plain == "..":
            del steps[-1:]
        elif plain != ".":
            steps.append(step)
    if re.search(r"/(\.|%2e){1,2}$", path, re.I):
        steps.append("")
    text = "/" + "/".join(steps) + mark + query
    return urllib.parse.quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text), "%!$&'()*+,/:;=?@~", errors="surrogatepass")


def _find_password(url: str, config: Config) -> str:
    """The value of Authorization: from the URL itself, or from .netrc if the environment is to be used."""
    pair = get_auth_from_url(url)
    if not any(pair) and config.use_environment_proxies:
        pair = get_netrc_auth(url) or ("", "")
    return _basic(*pair) if any(pair) else ""


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def find_proxy(url: str) -> Proxy | None:
    """The proxy that the environment names for `url`, None for none; raises RowFailure for one of another kind than http."""
    named = select_proxy(url, get_environ_proxies(url))
    if not named:
        return None
    try:
        parts = urllib.parse.urlsplit(named if "://" in named else f"http://{named}")
        port = parts.port or 80
    except ValueError:
        raise RowFailure("connect", "the environment's proxy is not a URL") from None
    if parts.scheme != "http" or not parts.hostname:
        raise RowFailure("connect", "the environment's proxy is not an http:// one")
    user, password = get_auth_from_url(named)
    return Proxy(parts.hostname, port, _basic(user, password) if user else "")


def follow_redirect(url: str, location: str) -> str:
    """Where a redirect from `url` leads; `location` is the header as it was sent, read as latin-1."""
    sent = location.encode("latin-1")
    try:
        target = sent.decode("utf-8")
    except UnicodeDecodeError:  # bytes of another encoding, which the server knows
        target = urllib.parse.quote_from_bytes(sent, SAFE_BYTES)
    target = _as_browsers_read(target)
    return urllib.parse.urljoin(url, target) if can_be_split(target) else target
