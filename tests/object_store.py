"""An S3 server of this process for the tests, on loopback, that can be told to fail."""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import boto3
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

Fault = Callable[[str, str], int | None]
"""(method, path) -> the HTTP status to fail with, or None to serve the request."""


class ObjectStore:
    """An S3 server with one bucket; a context manager."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.served: Callable[[str, str], object] | None = None
        """Hears of (method, path) of each request that was served, before the answer goes out."""
        self.num_failed = 0
        self._serve = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.client().create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()

    def client(self) -> Any:
        """A plain S3 client, to look at the store without dpkd."""
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to use the store."""
        return CREDENTIALS | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Name below the prefix -> content of every object there."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        read = self.client().get_object
        return {name.removeprefix(prefix): read(Bucket=BUCKET, Key=name)["Body"].read() for name in names}

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"]) if self.fault else None
        if status is None:
            answer = self._serve(environ, start_response)
            if self.served:
                self.served(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            return answer
        self.num_failed += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(f"{status} Failed", [("Content-Type", "application/xml")])
        code = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}[status]
        body = f"<Error><Code>{code}</Code><Message>this store is told to fail</Message></Error>"
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body.encode()]


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_request: object) -> None:
        """Says nothing."""


def forget_connections() -> None:
    """Lets s3fs read the environment again."""
    s3fs.S3FileSystem.clear_instance_cache()
