"""The exceptions: their tree, exit codes and messages."""

import re
import subprocess
import sys

import pytest

from balancesync import errors
from balancesync.errors import BalanceSyncError


def tree(cls: type[BalanceSyncError]) -> list[type[BalanceSyncError]]:
    return [cls, *(one for inner in cls.__subclasses__() for one in tree(inner))]


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    drawn = re.findall(r"^[ │├└─]*(\w+) +(\d+)(?: |$)", errors.__doc__ or "", re.MULTILINE)
    assert drawn == [(one.__name__, str(one.exit_code)) for one in tree(BalanceSyncError)]


@pytest.mark.parametrize("cls", tree(BalanceSyncError))
def test_a_docstring_is_the_message_until_another_is_given(cls: type[BalanceSyncError]) -> None:
    assert str(cls()) == " ".join((cls.__doc__ or "").split())
    assert str(cls("said")) == "said"


def test_messages_without_docstrings() -> None:
    run = "from balancesync.errors import LockHeld; print(LockHeld())"
    out = subprocess.run([sys.executable, "-OO", "-c", run], capture_output=True, check=True)
    assert out.stdout.strip() == b"LockHeld"
