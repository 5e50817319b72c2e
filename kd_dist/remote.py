"""Finished shards under any URL that fsspec knows: read by range, or whole into a bounded folder of this machine.

Nothing is written to a URL. What a store gets wrong is asked for again, and nothing that arrives is taken unchecked.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar

from kd_dist.errors import ShardError

T = TypeVar("T")

WAITS = (0.0, 0.1, 0.2, 0.4, 0.8)  # seconds before each try
ANSWER = 30.0  # seconds that one request may take
AT_ONCE = 16  # requests that a process has under way
CHUNK = 2**23  # bytes of one request while a whole shard is fetched
REFUSED = (400, 401, 403, 405, 407, 416, 451)  # HTTP statuses that a second try does not change; 404 and 410: not there
MISSING = (404, 410)
COPY = "copy it there again from where it was written"  # what to do about a file under a URL


class _Stumble(Exception):
    """A try that the next one may make good."""


class Status(NamedTuple):
    """What `stat` says of a file under a URL."""

    st_size: int  # bytes
    st_ino: int = 0  # there are no inodes


@dataclass(frozen=True)
class Remote:
    """A file or folder under a URL. Reading, it stands where a `Path` stands; there is no way to write."""

    url: str
    cache: "LocalCache | None" = None  # None: each example and each row is a range request

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return replace(self, url=f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def with_suffix(self, suffix: str) -> "Remote":
        return replace(self, url=self.url.removesuffix(PurePosixPath(self.name).suffix) + suffix)

    def is_file(self) -> bool:
        """Whether something is there. Raises ShardError when the store does not say."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def stat(self) -> Status:
        """Its size. Raises FileNotFoundError when nothing is there, ShardError when the store does not say."""
        size = _persistently(self.url, lambda: _asked(self.url, "info").get("size"))
        if size is None:
            raise ShardError(f"{self.url}: the store does not say how large it is; use one that serves byte ranges")
        return Status(size)

    def read_bytes(self, sound: Callable[[bytes], bool]) -> bytes:
        """All of it, asked for until it is `sound`. Raises FileNotFoundError, or ShardError after the last try."""

        def attempt() -> bytes:
            return _checked(_asked(self.url, "cat_file"), sound)

        return _persistently(self.url, attempt)

    def pread(self, offset: int, size: int, sound: Callable[[bytes], bool], whole: tuple[int, str]) -> bytes:
        """`size` bytes from `offset`, asked for until they are `sound`: one range request, or one read in the cache.

        `whole` is the size and the sha256 of all of it. Raises ShardError after the last try.
        """

        def attempt() -> bytes:
            if self.cache is None:
                return _checked(self._range(offset, size), sound)
            return self.cache.pread(self, offset, size, sound, whole)

        return _persistently(f"{self.url}: bytes {offset} to {offset + size}", attempt)

    def fetch(self, size: int, sha256: str, file: BinaryIO | None = None) -> None:
        """Fetch all `size` bytes, into `file` if given. Raises ShardError unless they have this sha256."""

        def attempt() -> None:
            digest = hashlib.sha256()
            if file is not None:
                file.seek(0)
            for start in range(0, size, CHUNK):
                length = min(CHUNK, size - start)
                where = f"{self.url}: bytes {start} to {start + length}"
                data = _persistently(where, lambda start=start, length=length: self._range(start, length))
                digest.update(data)
                if file is not None:
                    file.write(data)
            if digest.hexdigest() != sha256:
                raise _Stumble(f"what came has sha256 {digest.hexdigest()[:12]}, written was {sha256[:12]}")

        _persistently(self.url, attempt)

    def _range(self, offset: int, size: int) -> bytes:
        try:
            data = _asked(self.url, "cat_file", start=offset, end=offset + size)
        except FileNotFoundError as error:
            raise ShardError(f"{self.url}: is missing though its index is there; {COPY}") from error
        if len(data) > size:
            raise ShardError(
                f"{self.url}: {len(data)} bytes came where {size} were asked for, so the store serves no byte ranges; "
                f"use one that does, or copy the shards to a local folder"
            )
        if len(data) < size:
            raise _Stumble(f"only {len(data)} of {size} bytes came")
        return data


@dataclass(frozen=True)
class LocalCache:
    """A folder of whole shards by their sha256, of at most `capacity` bytes in all, for any number of processes.

    Room is taken before a byte is fetched, so the files in the folder never add up to more than `capacity`. One that
    makes room while a process reads an example from it is on the disk until that one read ends.
    """

    folder: Path
    capacity: int

    def pread(
        self, tar: Remote, offset: int, size: int, sound: Callable[[bytes], bool], whole: tuple[int, str]
    ) -> bytes:
        """As `Remote.pread`, one try; a file that has gone bad on the disk is dropped."""
        if whole[0] > self.capacity:
            raise ShardError(
                f"{tar}: its {whole[0]:,} bytes do not fit into data.local_cache, {self.capacity:,} bytes; give it "
                f"room for several shards, or null for range reads"
            )
        try:
            with self._opened(tar, *whole) as file:
                data = os.pread(file.fileno(), size, offset)
                if len(data) < size or not sound(data):
                    self._drop(file, whole[1])
                    raise _Stumble(f"its copy in {self.folder} was damaged")
                return data
        except FileNotFoundError as error:
            raise _Stumble(f"{self.folder} was emptied meanwhile") from error
        except OSError as error:
            raise ShardError(
                f"{self.folder}: the local cache cannot be used ({error}); make room, choose another data.cache_dir, "
                f"or set data.local_cache: null"
            ) from error

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _opened(self, tar: Remote, size: int, sha256: str) -> BinaryIO:
        """The shard, open for reading; fetched if it is not there."""
        path = self._path(sha256)
        while True:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # used just now
                return open(path, "rb", buffering=0)
            part, busy = self._claimed(path, size)
            if part is not None:
                self._fill(part, path, tar, size, sha256)
                return part
            if busy is not None:
                with busy:
                    fcntl.flock(busy, fcntl.LOCK_SH)  # had when whoever fetches it is done, or dead

    def _claimed(self, path: Path, size: int) -> tuple[BinaryIO | None, BinaryIO | None]:
        """A file of `size` bytes to fetch into, locked, and None; or None and one that another fetches into, which has
        to end first; or twice None when the shard has come meanwhile."""
        part = path.with_suffix(".part")
        with self._locked():
            if path.exists():
                return None, None
            live = []
            for one in self.folder.glob("*.part"):
                if _abandoned(one):
                    one.unlink()
                else:
                    live.append(one)
            room = self.capacity - size - sum(one.stat().st_size for one in live)
            if part in live or room < 0:
                return None, open(part if part in live else live[0], "rb")
            self._evict(room)
            return _own(open(part, "x+b"), size), None

    def _fill(self, part: BinaryIO, path: Path, tar: Remote, size: int, sha256: str) -> None:
        """Fetch the shard and give it its name; whatever goes wrong, nothing is left."""
        try:
            tar.fetch(size, sha256, part)
            part.flush()
            os.fsync(part.fileno())
            with self._locked():
                os.replace(part.name, path)
        except BaseException:
            with self._locked():
                Path(part.name).unlink(missing_ok=True)
            part.close()
            raise
        fcntl.flock(part, fcntl.LOCK_UN)

    def _evict(self, room: int) -> None:
        """Drop what was used longest ago until the rest takes no more than `room` bytes."""
        shards = sorted((one.stat().st_mtime_ns, one.stat().st_size, one) for one in self.folder.glob("*.tar"))
        taken = sum(size for _, size, _ in shards)
        for _, size, one in shards:
            if taken <= room:
                break
            one.unlink()
            taken -= size

    def _drop(self, file: BinaryIO, sha256: str) -> None:
        """Take the open file out of the folder, unless another has taken its name by now."""
        path = self._path(sha256)
        with self._locked():
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the names in the folder, among all threads and processes of this machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def location(text: str | os.PathLike | Remote, cache: LocalCache | None = None) -> Path | Remote:
    """What a path or URL points to; whatever is on this machine's disks is a plain `Path`."""
    if isinstance(text, (Remote, Path)):
        return text
    protocol, separator, rest = os.fspath(text).partition("://")
    if not separator:
        return Path(text)
    return Path(rest) if protocol in ("file", "local") else Remote(text.rstrip("/"), cache)


def url_problem(text: str) -> str | None:
    """Why nothing can be read from the path or URL on this machine; None when it can."""
    protocol, separator, _ = text.partition("://")
    if not separator:
        return None
    from fsspec import available_protocols, get_filesystem_class  # here, because few recipes read from a URL

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        return f"'{protocol}://' needs a package that is not installed ({error})"
    except ValueError:
        known = ", ".join(sorted(available_protocols()))
        return f"'{protocol}://' is no kind of URL that fsspec knows; it knows {known}"
    return None


def read_whole(path: Path | Remote, sound: Callable[[bytes], bool]) -> bytes:
    """All bytes of a file; under a URL, asked for until they are `sound`. Raises FileNotFoundError."""
    return path.read_bytes() if isinstance(path, Path) else path.read_bytes(sound)


def remedy(where: Path | Remote, local: str) -> str:
    """What to do about a damaged file: `local` for one of this machine."""
    return local if isinstance(where, Path) else COPY


def each(where: Path | Remote, function: Callable[..., T], *items: Iterable[Any]) -> list[T]:
    """The function, which reads in the folder, of each item in order; several at once where each is a request."""
    if isinstance(where, Path) or where.cache is not None:
        return list(map(function, *items))
    return at_once(where, function, *items)


def at_once(where: Remote, function: Callable[..., T], *items: Iterable[Any]) -> list[T]:
    """The function, which asks the store, of each item in order, several at once; one after the other if the store's
    library is not made for that."""
    if not _store(where.url)[0].async_impl:
        return list(map(function, *items))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, *items))


def _store(url: str) -> tuple[Any, str]:
    """The file system that serves a URL, and the path that it has there.

    Asked for anew each time: fsspec keeps one for each process, and one made before a fork does not live after it.
    """
    import fsspec  # here, because few recipes read from a URL

    return fsspec.url_to_fs(url)


def _asked(url: str, method: str, **options: int) -> Any:
    """What a store answers to a method of its file system, within `ANSWER` seconds; a store whose library is not
    asynchronous has its own patience. Raises FileNotFoundError when it says that nothing is there, ShardError when
    asking again would not help, _Stumble for all else."""
    try:
        store, path = _store(url)
        patience = {"timeout": ANSWER} if store.async_impl else {}
        return getattr(store, method)(path, **options, **patience)
    except Exception as error:  # every library has errors of its own
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        silence = f"no answer within {ANSWER:g} s" if isinstance(error, TimeoutError) else ""
        status, said = _status(cause), f"{type(cause or error).__name__}: {str(cause or error) or silence}"
        if status in MISSING or cause is None:  # fsspec says "not found" of an HTTP server that answers nothing at all
            raise FileNotFoundError(url) from error
        if status in REFUSED or isinstance(error, PermissionError):
            raise ShardError(
                f"{url}: the store refuses ({said}); check the URL and the credentials that fsspec uses for it"
            ) from error
        if isinstance(error, ImportError):
            raise ShardError(
                f"{url}: needs a package that is missing ({said}); for http:// pip install -e '.[remote]'"
            ) from error
        if isinstance(error, ValueError) and status is None:
            raise ShardError(f"{url}: cannot be asked for ({said}); correct data.shards") from error
        raise _Stumble(said) from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error, which each library keeps in another place."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = (getattr(one, name, None) for one in (error, response) for name in ("status", "status_code", "code"))
    return next((one for one in found if isinstance(one, int)), None)


def _checked(data: bytes, sound: Callable[[bytes], bool]) -> bytes:
    if not sound(data):
        raise _Stumble("what came is not what was written")
    return data


def _persistently(where: str, attempt: Callable[[], T]) -> T:
    """What the attempt gives, made again after each _Stumble; ShardError, which begins with `where`, after the last."""
    for wait in WAITS:
        if wait:
            time.sleep(wait)
        try:
            return attempt()
        except _Stumble as error:
            last = error
    raise ShardError(
        f"{where}: cannot be had after {len(WAITS)} tries, at last: {last}; check the connection and the store, and "
        f"if it is damaged there, {COPY}"
    ) from last


def _own(part: BinaryIO, size: int) -> BinaryIO:
    """The new file, locked while it is open, and as large as what is to come."""
    fcntl.flock(part, fcntl.LOCK_EX)
    part.truncate(size)
    return part


def _abandoned(part: Path) -> bool:
    """Whether whoever was fetching into this file is gone: the lock went too."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
