"""Pictures behind URLs: fetched once, with limits, and kept, so that a build that goes on fetches nothing twice."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from packshot.runs.files import replacing_file

_CHUNK = 2**16
# Answers that another try may change; all others are final.
_RETRIED = (429, 500, 502, 503, 504)


class DownloadError(Exception):
    """A picture could not be fetched; the message is for the table of rejected ones."""


def cached(url: str, folder: Path) -> Path:
    """Where the picture of a URL is kept."""
    return folder / hashlib.sha256(url.encode()).hexdigest()


def forget_failures(folder: str) -> None:
    """What failed in an earlier run is tried again in this one."""
    for file in Path(folder).glob("*.failed"):
        file.unlink()


def fetch(url: str, folder: Path, seconds: float, mebibytes: float, retries: int) -> bytes:
    """The bytes behind a URL, from ``folder`` where they are kept.

    A failure is kept too, until the next run: a shard is read twice, for its digest and for its pictures.

    Raises:
        DownloadError: no answer, an error, or more time or bytes than allowed.
    """
    path = cached(url, folder)
    failed = path.with_suffix(".failed")
    if path.exists():
        return path.read_bytes()
    if failed.exists():
        raise DownloadError(failed.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        data = download(url, seconds, int(mebibytes * 2**20), retries)
    except DownloadError as error:
        failed.write_text(str(error), encoding="utf-8")
        raise
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)
    return data


def refuse_excess(url: str, received: int, limit: int, end: float, seconds: float) -> None:
    """Raises DownloadError for more bytes than ``limit``, or after ``end`` on the monotonic clock."""
    if received > limit:
        raise DownloadError(f"{url}: more than {limit / 2**20:g} MiB (source.download_mib)")
    if time.monotonic() > end:
        raise DownloadError(f"{url}: not whole after {seconds:g} s a try (source.download_seconds)")


def download(url: str, seconds: float, limit: int, retries: int) -> bytes:
    """One picture over HTTP, tried ``retries`` times more where the server may answer otherwise.

    Raises:
        DownloadError: as for :func:`fetch`.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    policy = Retry(total=retries, backoff_factor=0.5, status_forcelist=_RETRIED, raise_on_status=False)
    end = time.monotonic() + seconds * (retries + 1)
    data = bytearray()
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=policy))
            headers = {"User-Agent": "packshot (dataset builder)"}
            with session.get(url, stream=True, timeout=seconds, headers=headers) as answer:
                if not answer.ok:
                    raise DownloadError(f"{url}: HTTP {answer.status_code} {answer.reason}")
                for chunk in answer.iter_content(_CHUNK):
                    data += chunk
                    refuse_excess(url, len(data), limit, end, seconds)
    except (requests.RequestException, OSError) as error:
        raise DownloadError(f"{url}: {type(error).__name__}: {str(error)[:200]}") from error
    return bytes(data)
