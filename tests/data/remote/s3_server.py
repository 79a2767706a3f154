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
    url = f"http://127.0.0.1:{port}"
    try:
        send("POST", f"{url}/moto-api/reset")  # one store serves every server of a process: what others put is there
        send("PUT", f"{url}/bucket")
        for path in sorted(folder.glob("*.tar")):
            send("PUT", f"{url}/bucket/train/{path.name}", path.read_bytes())
        yield port
    finally:
        server.stop()


def send(method: str, url: str, body: bytes | None = None) -> None:
    answer = urllib3.request(method, url, body=body, headers={"x-amz-acl": "public-read"})
    assert answer.status == 200, (method, url, answer.status, answer.data)


def set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any will do for moto; and no proxy for loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
