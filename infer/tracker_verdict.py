"""The point tracker of a comparison, and whether its figures may be used; asked once for each tracker."""

import json
from importlib.metadata import version
from pathlib import Path

from motionlora.data.cache import content_key, write_text
from motionlora.infer.check_tracker import check_tracker
from motionlora.infer.track_points import OpticalFlowTracker, Tracker


def judged_tracker(points: int, folder: Path) -> tuple[Tracker | None, str]:
    """A tracker of points x points, and the check as a sentence; None where it is not exact enough or not wanted.

    The check takes seconds to a minute; its result is kept in `folder`.
    """
    if not points:
        return None, "no points were tracked (--points 0)"
    tracker = OpticalFlowTracker(side=points)
    parts = ("tracker", repr(tracker), version("opencv-python-headless"))
    path = folder / f"{content_key(*parts)}.json"
    if not path.is_file():
        check = check_tracker(tracker)
        write_text(path, json.dumps({"passed": check.passed, "told": f"{points} x {points} points. {check}"}))
    kept = json.loads(path.read_text())
    return (tracker if kept["passed"] else None), kept["told"]
