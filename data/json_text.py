"""JSON from outside, of which every kind of damage is one kind of error."""

import json
from typing import Any


def parsed_json(text: str) -> Any:
    """The values of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
