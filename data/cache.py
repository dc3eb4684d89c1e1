"""Latents and prompt embeddings computed once: safetensors files found by the hash of what went into them.

Also the one way in which this house writes a file: whole or not at all.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from motionlora.data.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


def cached(
    folder: Path, key: str, make: Callable[[], dict[str, "Tensor"]], say: Callable[[str], None] = print
) -> dict[str, "Tensor"]:
    """The tensors stored under `key` in `folder`; computed by `make` and stored when absent or damaged.

    Tensors come back on the CPU, contiguous and in the dtype in which they were made, whether computed now or read:
    a second run sees the same numbers. `key` is a file name without suffix, from `content_key`. A damaged file is
    removed, which is said, and made anew.

    Raises:
        StorageError: the folder cannot be read or written.
    """
    path = Path(folder) / f"{key}.safetensors"
    found = _stored(path, say)
    if found is not None:
        return found
    made = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in make().items()}
    _store(made, path)
    return made


def content_key(*parts: str | int | float | None) -> str:
    """sha256 hex digest of the parts, their kinds and their order; 1, 1.0, "1" and None all differ."""
    kinds = [(type(part).__name__, part if part is None or isinstance(part, str) else repr(part)) for part in parts]
    return hashlib.sha256(json.dumps(kinds).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end, or vanishes after an exception.

    Makes the folder where it is missing, so that a reader sees the old file or the whole new one and never a part.

    Raises:
        StorageError: the disk is full or read-only, or the folder cannot be made.
    """
    path = Path(path)
    draft = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        os.replace(draft, path)
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise StorageError(f"{path} could not be written ({reason}); free space or name another place.") from fault
    finally:
        # Only the draft itself may be missing or out of reach here, and the first error is the one to tell.
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, its line ends as they are, whole or not at all; StorageError as `replacing`."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="")


def _stored(path: Path, say: Callable[[str], None]) -> dict[str, "Tensor"] | None:
    """The tensors of a cache file, or None where it is absent or was damaged (and then removed)."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        # Read, not memory-mapped: mapped weights lie at odd addresses, which changes CPU results in the last digit.
        tensors = load(path.read_bytes())
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("sha256") != _hash_of(tensors):
                raise ValueError("its numbers are not those that were written")
        return tensors
    except FileNotFoundError:
        return None
    except OSError as fault:
        raise StorageError(f"{path} could not be read ({fault.strerror}); name another cache folder.") from fault
    except (SafetensorError, ValueError, KeyError) as fault:
        say(f"{path}: damaged cache file removed and made anew ({fault}).")
    try:
        path.unlink(missing_ok=True)
    except OSError as fault:
        raise StorageError(f"{path} is damaged and could not be removed ({fault.strerror}); remove it.") from fault
    return None


def _store(tensors: dict[str, "Tensor"], path: Path) -> None:
    from safetensors.torch import save

    with replacing(path) as draft:
        draft.write_bytes(save(tensors, {"sha256": _hash_of(tensors)}))


def _hash_of(tensors: dict[str, "Tensor"]) -> str:
    from safetensors.torch import save

    return hashlib.sha256(save(tensors)).hexdigest()
