"""Servers on loopback: S3 as moto speaks it over real HTTP, plain web servers, and a proxy that fails on demand."""

import datetime
import http.client
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "loopback-key", "loopback-secret-never-to-be-shown"


@contextmanager
def serving(handler, certificate=None) -> Iterator[str]:
    """Serve with a handler class on a free port, encrypted if there is a certificate; yield the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def self_signed(path):
    """Write a key and a certificate for 127.0.0.1 into one file; return its path."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return path


class Files(SimpleHTTPRequestHandler):
    """The standard library's server of files; it sends whole files only."""

    absent = 404

    def log_message(self, *_):
        pass

    def send_error(self, code, message=None, explain=None):
        super().send_error(self.absent if code == 404 else code, message, explain)


class FilesInParts(Files):
    """As most servers of files, one that answers range requests."""

    def send_head(self):
        wanted = self.headers["Range"]
        if wanted is None:
            return super().send_head()
        try:
            content = Path(self.translate_path(self.path)).read_bytes()
        except OSError:
            return self.send_error(404)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else len(content) - int(last)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])


class FilesOfSecretiveBucket(FilesInParts):
    """As a bucket that may be read but not listed: what is absent is refused."""

    absent = 403


def files(folder, handler=Files):
    """Serve a folder; a context manager that gives the URL."""
    return serving(partial(handler, directory=str(folder)))


class Proxy:
    """Hands requests on to a server, unless told to fail.

    `fault` gets the request line and returns ``"drop"`` (no answer), ``"truncate"`` (half of the body),
    ``"stall"`` (no answer until `release` is set, nor then), ``"hold"`` (the server's answer, once `release` is
    set), a number (that status), or None (the server's answer).
    """

    def __init__(self, upstream):
        self.upstream = upstream.removeprefix("http://")
        self.fault = lambda line: None
        self.release = threading.Event()
        self.requests = []
        self.crowd = 1
        self.n_together = 0
        self._n_inside = 0
        self._met = threading.Condition()

    def meet(self):
        """Wait until `crowd` requests are here together, or a while has passed."""
        with self._met:
            self._n_inside += 1
            self.n_together = max(self.n_together, self._n_inside)
            self._met.notify_all()
            self._met.wait_for(lambda: self.n_together >= self.crowd, timeout=5)
            self._n_inside -= 1

    def handler(self):
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                proxy.requests.append(self.requestline)
                proxy.meet()
                fault = proxy.fault(self.requestline)
                if fault in ("stall", "hold"):
                    proxy.release.wait(20)
                if fault in ("drop", "stall"):
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(proxy.upstream, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in (
                        "transfer-encoding",
                        "connection",
                        "date",
                        "server",
                        "content-length",
                    ):
                        self.send_header(name, value)
                length = response.headers["Content-Length"] if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                connection.close()
                if fault == "truncate":
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        return Handler
