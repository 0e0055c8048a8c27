"""Where settings come from: a TOML file, below files of secrets, below the environment.

`read()` fills a tree of frozen pydantic dataclasses: the fields of the top one are the sections,
theirs are the keys. Whatever is wrong becomes one ConfigError line that names the file (or the
variable) and the key, and never repeats a secret.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Interval
from pydantic import AfterValidator, SecretStr, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from balancesync.errors import ConfigError

PREFIX: Final = "BALANCESYNC_"
CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"
# The test suite's own switches are no settings.
_TESTS: Final = f"{PREFIX}TEST_"
_BOOLEANS: Final = {"true": True, "1": True, "yes": True, "on": True} | {
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
_WORDS: Final = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    SecretStr: "text",
    tuple: "a list",
}

Model = TypeVar("Model")
Key = tuple[str, ...]


class Misfit(ValueError):
    """A rule about several keys is broken; `key` is the path, within its section, to look at."""

    def __init__(self, message: str, *key: str) -> None:
        super().__init__(message)
        self.key = key


def passes(check: Callable[[str], object]) -> AfterValidator:
    """The annotation of a text that `check` must let through; it raises ValueError if not."""

    def keep(text: str) -> str:
        check(text)
        return text

    return AfterValidator(keep)


def passes_secretly(check: Callable[[str], object]) -> AfterValidator:
    """The same for a secret."""

    def keep(secret: SecretStr) -> SecretStr:
        check(secret.get_secret_value())
        return secret

    return AfterValidator(keep)


@dataclass(frozen=True, slots=True)
class _Override:
    value: object
    origin: str


def read(model: type[Model], file: Path | None, environ: Mapping[str, str]) -> Model:
    """Read `model` from a TOML file, if there is one, and what overrides it.

    A value in the environment wins over the file that `..._FILE` names, that over one in
    `$CREDENTIALS_DIRECTORY`, that over the TOML file. Raises ConfigError.
    """
    raw = {} if file is None else _read_toml(file)
    keys = leaves(model)
    _refuse_unknown(keys, environ)
    overrides = dict(_overrides(keys, environ))
    for key, override in overrides.items():
        table: object = raw
        for part in key[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else None
        # What should be a table and isn't is refused below, by its own name.
        if isinstance(table, dict):
            table[key[-1]] = override.value
    try:
        return TypeAdapter(model).validate_python(raw)
    except ValidationError as error:
        # An unknown key often is why another one is missing.
        details = sorted(
            error.errors(include_url=False),
            key=lambda detail: detail["type"] != "unexpected_keyword_argument",
        )
        lines = [
            " ".join(_explain(model, detail, raw, overrides, file).split()) for detail in details
        ]
        more = f" (and {len(lines) - 1} more, which `balancesync check` lists)"
        raise ConfigError(lines[0] + (more if lines[1:] else ""), lines) from None


def leaves(model: type) -> dict[Key, Any]:
    """Every key that the environment can set, as (section, key) or (section,), with its type."""
    found: dict[Key, Any] = {}
    for section, hint in get_type_hints(model, include_extras=True).items():
        if is_dataclass(hint):
            keys = get_type_hints(hint, include_extras=True)
            found |= {(section, key): inner for key, inner in keys.items()}
        else:
            found[section,] = hint
    return found


def variable(key: Key) -> str:
    """The environment's name of a key.

    >>> variable(("redis", "url"))
    'BALANCESYNC_REDIS__URL'
    """
    return PREFIX + "__".join(key).upper()


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        # Editors on Windows put a byte order mark before the first key.
        return tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: isn't UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: isn't valid TOML: {error}") from None


def _refuse_unknown(keys: Mapping[Key, Any], environ: Mapping[str, str]) -> None:
    known = {variable(key) for key in keys}
    known |= {f"{variable(key)}_FILE" for key, hint in keys.items() if _bare(hint) is SecretStr}
    for name in sorted(environ):
        judged = name.startswith(PREFIX) and "__" in name and not name.startswith(_TESTS)
        if judged and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{' '.join(name.split())}: is no setting{hint}")


def _overrides(
    keys: Mapping[Key, Any], environ: Mapping[str, str]
) -> Iterator[tuple[Key, _Override]]:
    credentials = environ.get(CREDENTIALS)
    for key, hint in keys.items():
        name, file_name = variable(key), f"{variable(key)}_FILE"
        secret = _bare(hint) is SecretStr
        if name in environ:
            if secret and file_name in environ:
                raise ConfigError(f"{name}: is set, and so is {file_name}; keep one of them")
            yield key, _Override(_convert(name, environ[name], hint), name)
        elif secret and file_name in environ:
            yield key, _Override(_read_secret(Path(environ[file_name]), file_name), file_name)
        elif secret and credentials:
            origin = f"credential {'.'.join(key)}"
            path = Path(credentials, ".".join(key))
            with suppress(FileNotFoundError):
                yield key, _Override(_read_secret(path, origin, may_lack=True), origin)


def _read_secret(path: Path, origin: str, *, may_lack: bool = False) -> str:
    try:
        return path.read_bytes().decode().rstrip("\r\n")
    except OSError as error:
        if may_lack and isinstance(error, FileNotFoundError):
            raise
        raise ConfigError(f"{origin}: {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{origin}: {path} isn't UTF-8 text") from None


def _convert(name: str, text: str, hint: Any) -> object:
    bare = _bare(hint)
    try:
        if bare is bool:
            return _BOOLEANS[text.strip().lower()]
        if bare is int or bare is float:
            return bare(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name}: must be {requirement(hint)}{_got(text, hint)}") from None
    if get_origin(bare) not in (tuple, dict):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{name}: must be {requirement(hint)}, written as JSON") from None


def _explain(
    model: type,
    detail: ErrorDetails,
    raw: Mapping[str, Any],
    overrides: Mapping[Key, _Override],
    file: Path | None,
) -> str:
    cause = detail.get("ctx", {}).get("error")
    place = tuple(part for part in detail["loc"] if part != "[key]")
    if isinstance(cause, Misfit):
        place += cause.key
    message = _message(model, detail, place, cause)
    for length in (1, 2):
        override = overrides.get(tuple(str(part) for part in place[:length]))
        if override is not None:
            inner = f"{_dotted(raw, place)}: " if len(place) > length else ""
            return f"{override.origin}: {inner}{message}"
    return f"{file or 'configuration'}: {_dotted(raw, place)}: {message}"


def _message(model: type, detail: ErrorDetails, place: tuple[int | str, ...], cause: object) -> str:
    if isinstance(cause, ValueError):
        return str(cause)
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "unexpected_keyword_argument":
        parent = _hint_at(model, place[:-1])
        close = difflib.get_close_matches(str(place[-1]), get_type_hints(parent), n=1)
        return "is no setting" + (f"; did you mean {close[0]}?" if close else "")
    hint = _hint_at(model, place)
    bare = _bare(hint)
    if (
        isinstance(detail["input"], dict)
        and get_origin(bare) is tuple
        and is_dataclass(get_args(bare)[0])
    ):
        name = ".".join(map(str, place))
        return f"must be a list of tables: write [[{name}]], not [{name}]"
    return f"must be {requirement(hint)}{_got(detail['input'], hint)}"


def requirement(hint: Any) -> str:
    """What a key of this type takes, in words.

    >>> requirement(Annotated[int, Interval(ge=1, le=9)])
    'a whole number from 1 to 9'
    """
    bare = _bare(hint)
    if get_origin(bare) is Literal:
        return f"one of {', '.join(get_args(bare))}"
    words = _WORDS.get(get_origin(bare) or bare, "a table")
    for bound in get_args(hint)[1:]:
        if isinstance(bound, Interval):
            words += f" from {bound.ge} to {bound.le}"
    return words


def _got(value: object, hint: Any) -> str:
    # A secret typed at the wrong key is still a secret: show nothing that looks like an address.
    if _bare(hint) is SecretStr or not isinstance(value, str | int | float):
        return ""
    text = json.dumps(value)
    return f" (got {text})" if len(text) <= 40 and not re.search("[@/]", text) else ""


def _hint_at(hint: Any, place: Sequence[int | str]) -> Any:
    for part in place:
        bare = _bare(hint)
        if is_dataclass(bare):
            hint = get_type_hints(bare, include_extras=True)[str(part)]
        else:
            hint = get_args(bare)[1 if get_origin(bare) is dict else 0]
    return hint


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _dotted(raw: object, place: Sequence[int | str]) -> str:
    """`mapping.balances.key` for ("mapping", 0, "key"): a list's tables go by their names."""
    words = ""
    for part in place:
        if isinstance(part, int):
            raw = raw[part] if isinstance(raw, list) else None
            name = raw.get("name") if isinstance(raw, dict) else None
            named = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,63}", name)
            words += f".{name}" if named else f" #{part + 1}"
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
            plain = re.fullmatch(r"[\w-]+", part)
            words += f".{part if plain else json.dumps(part, ensure_ascii=False)}"
    return words.removeprefix(".")
