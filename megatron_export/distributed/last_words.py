"""What torchrun shows at its very end of a rank that failed: the message that the rank left in a file which torchrun named."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ..common.text import clean

FILE = "TORCHELASTIC_ERROR_FILE"  # of the environment; torchrun sets it for every rank
_STARTED = time.time()


def leave(message: str, *, blamed: bool = False) -> None:
    """Leave a message for torchrun, which shows that of the rank that failed first; without torchrun, nothing happens.

    `blamed`: the message tells of another rank, which died earlier and left none. It is to be shown in place of that rank's.
    Source: torch.distributed.elastic.multiprocessing.errors, `ErrorHandler.record_exception`, `ProcessFailure`, `ChildFailedError`.
    """
    file = os.environ.get(FILE)
    if not file:
        return
    message = clean(message)
    told = {"py_callstack": message, "timestamp": f"{int(_STARTED if blamed else time.time())}"}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": told}}))
