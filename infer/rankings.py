"""What people ranked in a page's blind mode, summed up: the human study of a comparison.

Mean ranks (1 is best, equal ranks share their mean) and the share of groups in which a method was ranked best or as
good as the best, with bootstrap intervals over reference clips.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from motionlora.data.cache import write_text
from motionlora.data.errors import InputError
from motionlora.data.json_text import parsed_json
from motionlora.infer.report import comparison_id, row_id
from motionlora.infer.row import Row
from motionlora.infer.statistics import mean_interval, mean_of
from motionlora.infer.table_text import as_cell, markdown_table, short, span

FORMAT = "motionlora ranking 1"
CRITERIA = ("motion", "text", "quality")
Ranks = dict[tuple[str, str], dict[str, list[float]]]
"""(method, criterion) -> clip -> ranks."""


def sum_up(files: Sequence[Path], out: Path, say: Callable[[str], None] = print) -> None:
    """Writes `rankings.json` and `rankings.md` into `out`, the folder of the comparison, and prints the table.

    Raises:
        InputError: no comparison in `out`; a file that is no ranking, is of another comparison, or came twice.
    """
    rows = read_rows(out / "results.jsonl")
    rankings = [_read(path, rows) for path in files]
    texts = [json.dumps(ranking["rankings"], sort_keys=True) for ranking in rankings]
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise InputError(f"{files[index]} holds the same ranks as {files[texts.index(text)]}: give each once.")
    figures = ranked(rankings, rows)
    text = table(figures, [str(ranking.get("rater") or "unnamed") for ranking in rankings])
    write_text(out / "rankings.json", json.dumps(figures, indent=2) + "\n")
    write_text(out / "rankings.md", text)
    say(text)


def read_rows(path: Path) -> list[Row]:
    """The cells of a finished comparison."""
    try:
        # Not splitlines: JSON lets other signs that end a line stand in a text.
        return [Row(**parsed_json(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError) as fault:
        raise InputError(
            f"{path} cannot be read ({fault}): name the folder of the comparison that was ranked with --out."
        ) from None


def ranked(rankings: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A figure for each method and criterion, from all raters; the best mean rank of each criterion first."""
    known = {row_id(row): row for row in rows}
    ranks: Ranks = {}
    best: Ranks = {}
    for ranking in rankings:
        for group in ranking["rankings"]:
            cells = [known[entry["cell"]] for entry in group]
            for criterion in CRITERIA:
                given = rankdata([entry[criterion] for entry in group])
                for cell, rank in zip(cells, given, strict=True):
                    place = (cell.method, criterion)
                    ranks.setdefault(place, {}).setdefault(cell.clip, []).append(float(rank))
                    best.setdefault(place, {}).setdefault(cell.clip, []).append(float(rank == given.min()))
    figures = [
        {
            "method": method,
            "criterion": criterion,
            "rank": mean_of(list(clips.values())),
            "interval": mean_interval(list(clips.values())),
            "best": mean_of(list(best[method, criterion].values())),
            "ranked": sum(map(len, clips.values())),
        }
        for (method, criterion), clips in ranks.items()
    ]
    return sorted(figures, key=lambda figure: (CRITERIA.index(figure["criterion"]), figure["rank"]))


def table(figures: Sequence[Mapping[str, Any]], raters: Sequence[str]) -> str:
    """As Markdown."""
    people = ", ".join(map(as_cell, raters))
    heads = ["criterion", "method", "mean rank", "95 %", "best or equal", "ranked"]
    lines = [
        [f["criterion"], f["method"], short(f["rank"]), span(*f["interval"]), f"{f['best']:.0%}", str(f["ranked"])]
        for f in figures
    ]
    title = ["# Blind rankings", "", f"{len(raters)} raters: {people}.", ""]
    return "\n".join([*title, *markdown_table(heads, lines), ""])


def _read(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """A ranking file whose every cell is one of the comparison's and is ranked by every criterion."""
    try:
        ranking = parsed_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError(f"{path} cannot be read as a ranking ({fault}): save it again from the page.") from None
    if not isinstance(ranking, dict) or ranking.get("format") != FORMAT:
        raise InputError(f"{path} is no ranking of a comparison's page: give the file that its blind mode saved.")
    if ranking.get("comparison") != comparison_id(rows):
        raise InputError(
            f"{path} ranks another comparison than the one given by --out, or one that was made anew since."
        )
    known = {row_id(row) for row in rows}
    found = ranking.get("rankings")
    groups: list[Any] = found if isinstance(found, list) else [None]
    whole = all(isinstance(group, list) and group for group in groups)
    entries = [entry for group in groups for entry in group] if whole else []
    if not whole or not all(isinstance(e, dict) and e.get("cell") in known and _is_ranked(e) for e in entries):
        raise InputError(f"{path} is damaged, it lacks ranks or names cells that are not there: save it again.")
    return ranking


def _is_ranked(entry: Mapping[str, Any]) -> bool:
    ranks = [entry.get(criterion) for criterion in CRITERIA]
    return all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in ranks)
