"""Files in object stores (S3, Google Cloud Storage, Azure): ranges with If-Match, through obstore.

Endpoints and credentials come from the usual environment variables: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_SKIP_SIGNATURE=true for public buckets; GOOGLE_...; AZURE_...
An endpoint that begins with http:// is used as it is.
"""

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any

from obstore.exceptions import (
    BaseError,
    GenericError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)  # fmt: skip
from obstore.store import AzureStore, GCSStore, S3Store

from mmpt.data.remote.ranges import (
    CHECK_PLACE,
    REINDEX_REMOTE,
    ChangedError,
    FileFacts,
    ForbiddenError,
    MissingError,
    NoRangeError,
    RemoteConfig,
    RemoteError,
    TransientError,
    check_facts,
)

SCHEMES = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT")
CLIENT_ERROR = re.compile(r"\b([34]\d\d) [A-Z]")
OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got")
RETRIED = ("408", "425", "429")


class ObjectFile:
    """A file at s3://bucket/path, gs://bucket/path or az://container/path; see `mmpt.data.remote.ranges.Source`."""

    def __init__(self, place: str, config: RemoteConfig):
        self.place = place
        self._store, self._path = _store_of(place, config)

    def facts(self) -> FileFacts:
        try:
            return _facts(self._store.head(self._path))
        except (BaseError, OSError, ValueError) as error:
            raise _read_error(error, self.place, 0) from error

    def blocks(self, start: int, stop: int, expected: FileFacts) -> Iterator[bytes]:
        options: dict[str, Any] = {"range": (start, stop)}
        if expected.version.startswith('"'):
            options["if_match"] = expected.version
        try:
            answer = self._store.get(self._path, options=options)  # type: ignore[arg-type]
            check_facts(self.place, start, _facts(answer.meta), expected)
            # As they arrive: were larger blocks collected first, nobody would see that a connection merely drips.
            yield from map(bytes, answer.stream(min_chunk_size=1))
        except (BaseError, OSError, ValueError) as error:
            raise _read_error(error, self.place, start) from error


def list_objects(folder: str, config: RemoteConfig) -> list[tuple[str, FileFacts]]:
    """(name, facts) of each file directly in a folder. One try; raises as `Source` does."""
    store, path = _store_of(folder, config)
    prefix = f"{path.rstrip('/')}/" if path else ""
    try:
        listed = store.list_with_delimiter(prefix or None)["objects"]
        return [(entry["path"].rpartition("/")[2], _facts(entry)) for entry in listed]
    except (BaseError, OSError, ValueError) as error:
        raise _read_error(error, folder, 0) from error


def is_prefix(folder: str, config: RemoteConfig) -> bool:
    """Whether anything is in a folder. One try; raises as `Source` does."""
    store, path = _store_of(folder, config)
    try:
        return any(page for page in store.list(f"{path.rstrip('/')}/" if path else None, chunk_size=1))
    except (BaseError, OSError, ValueError) as error:
        raise _read_error(error, folder, 0) from error


def _store_of(place: str, config: RemoteConfig) -> tuple[S3Store | GCSStore | AzureStore, str]:
    scheme, _, rest = place.partition("://")
    bucket, _, path = rest.partition("/")
    endpoints = tuple(os.environ.get(name, "") for name in ENDPOINTS)
    try:
        return _store(scheme, bucket, config.timeout_seconds, endpoints, os.getpid()), path
    except (BaseError, OSError, ValueError) as error:
        raise RemoteError(place, 0, f"the store cannot be used ({_line(error)})", CHECK_PLACE) from error


@lru_cache(maxsize=64)
def _store(
    scheme: str, bucket: str, timeout_seconds: float, endpoints: tuple[str, ...], pid: int
) -> S3Store | GCSStore | AzureStore:
    """Open connections of this process; a process that is forked does not inherit them. Retries are ours."""
    patience = timedelta(seconds=timeout_seconds)
    return SCHEMES[scheme](
        bucket,
        client_options={
            "allow_http": any(endpoint.startswith("http://") for endpoint in endpoints),
            "connect_timeout": patience,
            "read_timeout": patience,
            "timeout": timedelta(days=1),
        },
        retry_config={"max_retries": 0},
    )


def _facts(meta: Any) -> FileFacts:
    return FileFacts(int(meta["size"]), meta["e_tag"] or meta["last_modified"].isoformat())


def _read_error(error: Exception, place: str, offset: int) -> Exception:
    """The error to raise instead: what may be tried again is a TransientError."""
    if isinstance(error, RemoteError | TransientError):
        return error
    text = _line(error)
    if "non-partial response when range requested" in text:
        return NoRangeError(place, offset, "the store answers a range with the whole object", CHECK_PLACE)
    if OTHER_RANGE.search(text):
        return NoRangeError(place, offset, f"the store sends another range ({text})", REINDEX_REMOTE)
    if "416 Range Not Satisfiable" in text:
        return ChangedError(place, offset, "the object is shorter than the index has it", REINDEX_REMOTE)
    if isinstance(error, FileNotFoundError):
        return MissingError(place, offset, "there is no such object", CHECK_PLACE)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return ForbiddenError(place, offset, f"the store refuses ({text})", "check the credentials and permissions")
    if isinstance(error, PreconditionError):
        return ChangedError(place, offset, "the object was changed since it was indexed", REINDEX_REMOTE)
    if isinstance(error, InvalidPathError | NotSupportedError | UnknownConfigurationKeyError | ValueError):
        return RemoteError(place, offset, text, CHECK_PLACE)
    client_error = CLIENT_ERROR.search(text)
    if isinstance(error, GenericError) and client_error and client_error[1] not in RETRIED:
        return RemoteError(place, offset, f"the store refuses ({text})", CHECK_PLACE)
    return TransientError(text)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).partition(" Debug source:")[0][:300]
