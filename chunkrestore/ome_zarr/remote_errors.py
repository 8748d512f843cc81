"""What servers answer, as the errors that Python has for files: which can heal, and what to do about others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from urllib.parse import urlsplit

SIGNING = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables of the environment, each of which says where credentials are."""

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class MissingBucketError(FileNotFoundError):
    """A bucket does not exist: not the same as an object that was never written into one."""


class OutOfRangeError(ValueError):
    """An object ends before a part of it that its own index names: it is damaged."""


@contextmanager
def named(url: str) -> Iterator[ModuleType]:
    """Lend obstore, whose errors turn into those that Python has for files, with `url` in the message.

    Raises
    ------
    FileNotFoundError
        If there is no such object or (`MissingBucketError`) bucket.
    PermissionError
        If credentials are missing, wrong, expired or not sufficient.
    ConnectionError, TimeoutError
        If the server could not be reached, did not answer, was too busy, or stopped in the middle of an
        answer: trying again later can help.
    OutOfRangeError
        If a part was asked for that lies behind the end.
    OSError
        For any other answer.
    ImportError
        If obstore is not installed.
    """
    try:
        import obstore
        from obstore.exceptions import BaseError
    except ImportError:
        raise ImportError(f'{url} is opened by obstore: pip install "chunkrestore[s3]"') from None
    try:
        yield obstore
    except (BaseError, FileNotFoundError) as error:
        raise _translated(error, url) from None


def brief(error: Exception) -> str:
    """Return what went wrong without the URL, the answer's text and the debugging output around it."""
    return str(error).partition("\n")[0].rpartition(" - ")[2].rpartition(" error: ")[2]


def _translated(error: Exception, url: str) -> Exception:
    """Return the error to raise. Of an answer only status and code are shown: its text may hold a key's name."""
    from obstore.exceptions import NotSupportedError

    text = str(error)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
    code = found[1] if (found := re.search(r"<Code>(\w{1,60})</Code>", text)) else ""
    answer = f"{status or ''} {code}".strip()
    server = _server(url)
    if code == "NoSuchBucket":
        return MissingBucketError(f"{url}: {server} has no such bucket; check its name and AWS_ENDPOINT_URL")
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(f"{url} does not exist")
    if status in (401, 403) or "Token" in code:
        return PermissionError(f"{url}: {server} refuses access ({answer}); {_advice(url)}")
    if status == 416:
        return OutOfRangeError(f"{url} is shorter than its index says")
    if isinstance(error, NotSupportedError):
        return OSError(
            f"{url}: {server} sends no parts of files, which sharded arrays need; use another server"
        )
    if "redirect without LOCATION" in text or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return OSError(f"{url}: the bucket lies in another region; set AWS_REGION to that of the bucket")
    if code == "RequestTimeout":
        return TimeoutError(f"{url}: {server} waited too long for a request")
    if status in (408, 429) or status >= 500:
        return ConnectionError(f"{url}: {server} is busy or broken ({answer})")
    if status:
        return OSError(f"{url}: {server} answers {answer}")
    return _without_answer(error, url)


def _without_answer(error: Exception, url: str) -> OSError:
    """Return the error to raise where no answer came, or not all of it."""
    text, server = str(error), _server(url)
    if "kind: Timeout" in text:
        return TimeoutError(f"{url}: {server} did not answer in time")
    if "InvalidCertificate" in text:
        return OSError(
            f"{url}: the certificate of {server} is not trusted; name one in AWS_CA_BUNDLE, or for a web server"
            " in SSL_CERT_FILE"
        )
    if "kind: Connect" in text:
        return ConnectionError(f"{url}: {server} cannot be reached; check its address and the network")
    return ConnectionError(f"{url}: the connection to {server} broke ({brief(error)})")


def _server(url: str) -> str:
    """Return the name of the server, without anything secret that an endpoint may carry."""
    if not url.startswith("s3:"):
        return urlsplit(url).netloc
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    return urlsplit(endpoint).netloc.rpartition("@")[2] or "Amazon S3"


def _advice(url: str) -> str:
    if not url.startswith("s3:"):
        return "only pages that need no login can be read"
    if any(os.environ.get(name) for name in SIGNING):
        return "check the credentials in the environment (AWS_ACCESS_KEY_ID ...) and what they permit"
    return "it is not public: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles are not read)"
