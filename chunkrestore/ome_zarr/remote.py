"""Objects behind ``s3://``, ``https://`` and ``http://`` URLs, for `chunkrestore.ome_zarr.store`.

Buckets are read and written, web servers only read. Everything but the URL comes from the environment, so
handles and manifests hold no secret:

=================================================  =======================================================
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,  credentials; without any, requests are not signed, as public
``AWS_SESSION_TOKEN``                              buckets want it
``AWS_WEB_IDENTITY_TOKEN_FILE``, ``AWS_ROLE_ARN``  credentials of a pod
``AWS_CONTAINER_CREDENTIALS_RELATIVE_URI``         credentials of a container, also as ``..._FULL_URI``
``AWS_REGION``                                     region of the bucket, ``us-east-1`` by default
``AWS_ENDPOINT_URL``, ``AWS_ENDPOINT_URL_S3``      another server than Amazon's
``AWS_CA_BUNDLE``                                  file with certificates to trust besides those of the system
``SSL_CERT_FILE``                                  the same for web servers
``ZARR_ASYNC__CONCURRENCY``                        chunks under way at a time, 10 by default; over 50 ms of latency, 64
                                                   read 3.7 times faster (``write``: 1.3 times)
=================================================  =======================================================

Profiles in ``~/.aws`` and roles of EC2 machines are not read.

The library is obstore: one wheel that brings retries with back-off, resumed downloads and multipart uploads,
on threads of its own. (fsspec would need s3fs, aiobotocore and botocore besides.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from chunkrestore.ome_zarr.limits import MAX_DOCUMENT_NBYTES
from chunkrestore.ome_zarr.remote_errors import SIGNING, MissingBucketError, brief, named

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, HTTPStore, RetryConfig, S3Config, S3Store
    from zarr.abc.store import Store

SCHEMES = ("s3", "https", "http")

RETRIES: RetryConfig = {
    "max_retries": 6,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 3},
}
"""Of one request: two to ten seconds in all, as the delays are random. What takes longer is left to the caller."""

_TIMEOUTS: ClientConfig = {
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=60),
    # The default of 30 s for a whole request would make large shards impossible over a slow line.
    "timeout": timedelta(minutes=30),
}


def location(url: str) -> str:
    """Return `url` without a final slash.

    Raises
    ------
    ValueError
        If its scheme is unknown, it names no server or bucket, has empty or dotted components, or carries a
        password or query, which would be a secret in every manifest.
    """
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    shown = f"{parts.scheme}://{host}{parts.path}"
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"`store` {shown!r} cannot be opened; use a path or a URL that begins with {known}")
    if parts.query or parts.fragment or host != parts.netloc:
        raise ValueError(
            f"`store` {shown!r} was given with a password, query or fragment, which would end up in every record"
            " of a job; give a plain URL, and credentials in the environment (AWS_ACCESS_KEY_ID ...)"
        )
    key = parts.path.strip("/")
    if not host or any(part in ("", ".", "..") for part in (key.split("/") if key else ())):
        raise ValueError(
            f"`store` {shown!r} must name a bucket or server, without empty, '.' or '..' components"
        )
    return f"{parts.scheme}://{host}/{key}".rstrip("/")


def writable(url: str) -> str:
    """Return `url` if something can be written there; nothing is looked up.

    Raises
    ------
    ValueError
        If it is an HTTP(S) URL.
    """
    if not url.startswith("s3:"):
        raise ValueError(f"`output` {url} cannot be written: web servers are read only; use s3:// or a path")
    return url


def join(folder: str, *parts: str) -> str:
    """Return the URL of a member of `folder`."""
    return "/".join([folder, *(str(PurePosixPath(p)) for p in parts if p)])


def parents(url: str) -> list[str]:
    """Return the URLs around `url`, innermost first, down to the bucket or server."""
    root, _ = _split(url)
    around = []
    while url != root:
        url = url.rpartition("/")[0]
        around.append(url)
    return around


def same(first: str, second: str) -> bool:
    """Return whether two URLs are the same."""
    return location(first) == location(second)


def read(url: str) -> bytes | None:
    """Return a document, or None if there is none.

    Raises
    ------
    ValueError
        If it is too large to be one.
    PermissionError, ConnectionError, TimeoutError, OSError
        If it cannot be told whether there is one.
    """
    root, key = _split(url)
    try:
        with named(url) as obstore:
            answer = obstore.get(client(root), key)
            if answer.meta["size"] > MAX_DOCUMENT_NBYTES:
                raise ValueError(f"{url} has {answer.meta['size']} bytes; it is no metadata document")
            return bytes(answer.bytes())
    except FileNotFoundError as error:
        if isinstance(error, MissingBucketError):
            raise
        return None


def write(url: str, content: bytes) -> None:
    """Write an object; a reader sees the old content or the new one, never a part."""
    root, key = _split(writable(url))
    with named(url) as obstore:
        obstore.put(client(root), key, content)


def remove(urls: Sequence[str]) -> None:
    """Remove objects of one bucket; absent ones are fine."""
    if not urls:
        return
    root, _ = _split(writable(urls[0]))
    with named(urls[0]) as obstore:
        obstore.delete(client(root), [_split(url)[1] for url in urls])


def remove_tree(folder: str) -> None:
    """Remove all objects whose names begin with that of `folder` and a slash."""
    root, key = _split(writable(folder))
    with named(folder) as obstore:
        for batch in obstore.list(client(root), key):
            obstore.delete(client(root), [entry["path"] for entry in batch])


def names(folder: str) -> list[str] | None:
    """Return what is in `folder`, or None if there is nothing.

    Raises
    ------
    ValueError
        If it is an HTTP(S) URL: web servers list nothing, and only what is written needs a list.
    """
    root, key = _split(writable(folder))
    with named(folder) as obstore:
        found = obstore.list_with_delimiter(client(root), key or None)
    paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
    # Some tools mark a folder by an empty object of its name.
    return sorted({PurePosixPath(path).name for path in paths if path != key}) or None


def is_free(url: str) -> bool:
    """Return whether nothing lies at `url` or below it; a `ValueError` for HTTP(S), as of `names`."""
    return names(url) is None and not is_file(url)


def is_file(url: str) -> bool:
    """Return whether an object lies at `url`; a page of a web server counts as one."""
    return _head(url) is not None


def exists(url: str) -> bool:
    """Return whether an object lies at `url`, or, in a bucket, below it."""
    return is_file(url) or (url.startswith("s3:") and names(url) is not None)


def stamp(url: str) -> str | None:
    """Return what changes whenever the object at `url` is written, or None if there is none, or refused."""
    try:
        entry = _head(url)
    except PermissionError:
        return None
    return None if entry is None else str(entry["e_tag"] or entry["last_modified"])


def free_nbytes(url: str) -> None:
    """Return None: a bucket is never full."""


def clean_partial(folder: str) -> int:
    """Return 0: an object exists whole or not at all."""
    return 0


def array_store(folder: str) -> Store:
    """Return the zarr store whose root is `folder`."""
    from chunkrestore.ome_zarr.chunk_store import RemoteStore

    return RemoteStore(folder)


def client(url: str) -> S3Store | HTTPStore:
    """Return a client whose keys are relative to `url`, made once per process and environment.

    Raises
    ------
    ImportError
        If obstore is not installed.
    ValueError
        If the environment does not make sense.
    """
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    with named(url):
        return _client(url, settings)


@lru_cache(maxsize=256)
def _client(url: str, settings: tuple[tuple[str, str], ...]) -> S3Store | HTTPStore:
    from obstore.store import HTTPStore, S3Store

    options: ClientConfig = {**_TIMEOUTS, "allow_http": True}
    root, key = _split(url)
    if not root.startswith("s3:"):
        return HTTPStore(f"{root}/{quote(key)}", client_options=options, retry_config=RETRIES)
    given = dict(settings)
    if bundle := given.get("AWS_CA_BUNDLE"):
        options["root_certificate"] = _certificates(bundle)
    config: S3Config = {} if any(given.get(name) for name in SIGNING) else {"skip_signature": True}
    try:
        return S3Store(
            urlsplit(root).netloc,
            prefix=key or None,
            client_options=options,
            retry_config=RETRIES,
            config=config,
        )
    except Exception as error:
        raise ValueError(
            f"{url} cannot be opened with the AWS_ variables of the environment: {brief(error)}"
        ) from None


def _certificates(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"AWS_CA_BUNDLE {path!r} cannot be read: {error.strerror}") from None


def _split(url: str) -> tuple[str, str]:
    """Return the URL of the bucket or server, and the key inside it."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    # Names of objects are taken as they are, as all tools for buckets do; paths of web servers are encoded.
    return f"{scheme}://{host}", path if scheme == "s3" else unquote(path)


def _head(url: str) -> ObjectMeta | None:
    """Return what is known of an object, or None if there is none."""
    root, key = _split(url)
    if not key:
        return None
    try:
        with named(url) as obstore:
            return obstore.head(client(root), key)
    except FileNotFoundError:
        return None
