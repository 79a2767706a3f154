"""An S3 endpoint on loopback: moto's server, over real sockets."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3
from moto.server import ThreadedMotoServer


@contextmanager
def bucket_of(folder: Path) -> Iterator[int]:
    """The port of a server whose one bucket, `bucket`, holds the shards of a folder under train/."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    try:
        urllib3.request("PUT", f"http://127.0.0.1:{port}/bucket")
        for path in sorted(folder.glob("*.tar")):
            answer = urllib3.request("PUT", f"http://127.0.0.1:{port}/bucket/train/{path.name}", body=path.read_bytes())
            assert answer.status == 200
        yield port
    finally:
        server.stop()


def set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any will do for moto; and no proxy for loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
