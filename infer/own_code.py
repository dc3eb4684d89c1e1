"""What of our own code a result rests on, as one hash: what is kept for later is made anew after that code changed."""

import ast
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

OURS = "motionlora."


@cache
def code_hash(*modules: str) -> str:
    """Of the sources of these modules and of all of ours that they import, at whatever depth and place in them."""
    files = sorted({file for module in modules for file in sources(module).items()})
    digest = sha256()
    for name, path in files:
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def sources(module: str) -> dict[str, Path]:
    """Name -> file of a module and of all of ours that it imports, inside functions too; none of them is run."""
    found: dict[str, Path] = {}
    ahead = [module]
    while ahead:
        name = ahead.pop()
        spec = find_spec(name) if name not in found else None
        if spec is None or spec.origin is None:
            continue
        found[name] = Path(spec.origin)
        ahead += _imported(found[name])
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            room = str(node.module)
            yield from [f"{room}.{alias.name}" for alias in node.names] if room.count(".") == 1 else [room]
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(OURS))
