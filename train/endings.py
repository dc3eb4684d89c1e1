"""What every ending of a run is told as, and its exit code.

0 done, 1 our bug, 2 the input or a setting is wrong, 3 storage, 4 the numbers went bad, 130 and 143 stopped.
"""

import errno
import os
import sys
import traceback

from motionlora.data.errors import InputError, NumbersError, Stopped, StorageError
from motionlora.infer.private import without_secrets

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG}
BUG = "this is a bug of motionlora: please report it with the lines above and the command."


def exit_code(error: BaseException, of: str = "") -> int:
    """Says what ended a run, `of` in front of it, in one sentence on stderr, and gives its exit code."""
    code, sentence = ending(error)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left; nothing to say
        return code
    if sentence == BUG:
        print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    print(f"motionlora: {of}{sentence}", file=sys.stderr, flush=True)
    return code


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of what ended a run, and the sentence on one line for it."""
    code, sentence = _found(error)
    return code, without_secrets(" ".join(sentence.split()))


def _found(error: BaseException) -> tuple[int, str]:
    match error:
        case Stopped(code=code):
            return code, str(error)
        case KeyboardInterrupt():
            return 130, "stopped by the user; only what was finished before is kept."
        case BrokenPipeError():
            return 0, ""
        case InputError():
            return 2, str(error)
        case NumbersError():
            return 4, str(error)
        case StorageError():
            return 3, str(error)
        case OSError(errno=number) if number in STORAGE:
            where = f" ({error.filename})" if error.filename else ""
            return 3, f"storage failed: {error.strerror or error}{where}; free some space or choose another place."
        case _ if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return 2, "out of memory; take fewer frames, a smaller size or --memory lowest."
    return 1, BUG
