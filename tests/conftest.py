"""What every test leaves as it was."""

import signal
from collections.abc import Iterator

import pytest

from lclm.train.ends import SIGNALS


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """The command line leaves signals unheard when it ends by an error; the test's process goes on."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
