"""An S3 server in this process (moto), with a bucket that refuses and one that often fails."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
SLOW = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"


@dataclass
class Bucket:
    """Where a test may write."""

    query: str
    failed: Counter[str] = field(default_factory=Counter)
    """Requests of the bucket `flaky` that were refused once."""

    def uri(self, path: str, bucket: str | None = None) -> str:
        """Below a bucket of its own for every object of this class."""
        return f"s3://key:secret@{bucket or self._name}/{path}{self.query}"

    def __post_init__(self) -> None:
        self._name = f"b{uuid.uuid4().hex[:12]}"

    @property
    def wrong(self) -> str:
        """In a bucket that nobody may enter."""
        return self.uri("run", "denied")

    @property
    def flaky(self) -> str:
        """In a bucket whose every request fails the first time."""
        return self.uri("run", "flaky")


@contextmanager
def served() -> Iterator[Bucket]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = DomainDispatcherApplication(create_backend_app)
    failed: Counter[str] = Counter()

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path, what = environ["PATH_INFO"], f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('QUERY_STRING')}"
        if path.startswith("/denied"):
            start("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(DENIED)))])
            return [DENIED]
        if path.startswith("/flaky") and not failed[what]:
            failed[what] += 1
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW)))])
            return [SLOW]
        return moto(environ, start)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    query = f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    yield Bucket(query, failed)
    server.shutdown()
