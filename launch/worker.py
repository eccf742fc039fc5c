"""One process of `lclm train` under launch/agent.py: torchrun restarts it unless its exit code is 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FINAL = (0, 2, 75, 130)
"""Exit codes after which a restart by the launcher helps nothing, or is not wanted now."""


def main() -> None:
    """Run lclm with the arguments; an exit code of FINAL goes to $LAUNCH_CODES/LOCAL_RANK, and 0 is given."""
    from lclm.train.ends import end, end_with_launcher

    end_with_launcher()
    from lclm.cli import main as lclm

    left = Path(os.environ["LAUNCH_CODES"]) / os.environ["LOCAL_RANK"]
    left.unlink(missing_ok=True)
    code: object = 0
    try:
        lclm(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code or 0
    if code in FINAL:
        left.write_text(str(code))
        code = 0
    end(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
