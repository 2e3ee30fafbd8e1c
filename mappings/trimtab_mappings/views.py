"""The package's results as reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab_mappings.report import Cell, Report, Section, Share, show
from trimtab_mappings.table import Coverage

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trimtab_mappings.inspection import Difference, Lookup, Pieces, Row, Summary, Token
    from trimtab_mappings.scoring import Meetings, Score
    from trimtab_mappings.table import MappingTable

_MEANINGS = {
    "exact": "of the same bytes",
    "prefix": "the control's is shorter",
    "extension": "the control's is longer",
    "role": "special, of one role",
    "none": "no counterpart",
}
_COARSE = (
    "the control's vocabulary is coarser than the target's, which spells {share} of {whole} ({counts}) in"
    " pieces. The target has to choose a first piece where the control knows only the whole, so the"
    " control may do little or nothing there. Choose a template and a control whose vocabulary is finer"
    " than the targets'.{hint}"
)
_FAR = 12  # the distance from which on rows are counted together
_SHOWN = 50  # rows of a difference; JSON has all


def table_facts(table: MappingTable) -> dict[str, Cell]:
    """What a table is for."""
    return {
        "target": f"{table.target_name} ({table.target_fingerprint[:16]})",
        "control": f"{table.control_name} ({table.control_fingerprint[:16]})",
        "strategy": table.strategy,
    }


def summary_report(summary: Summary) -> Report:
    """A table at a glance."""
    facts: dict[str, Cell] = {
        "target": f"{summary.target_name} ({summary.target_fingerprint[:16]})",
        "target tokens": summary.target_tokens,
        "control": f"{summary.control_name} ({summary.control_fingerprint[:16]})",
        "control tokens": summary.control_tokens,
        "strategy": summary.strategy,
    }
    by = "distance times uses" if summary.uses else "distance"
    sections = [
        coverage_section(summary.coverage, summary.uses),
        _pieces_section(summary),
        _distance_section(summary.distances, summary.distance_uses),
    ]
    if summary.worst:
        columns = (*_ROW_COLUMNS, *(["uses"] if summary.uses else []))
        rows = [_row_cells(row) for row in summary.worst]
        note = "of a token without a counterpart, its own length is its distance"
        sections.append(Section(f"The worst rows, by {by}", columns, rows, note))
    warnings = [_coarse_warning(summary.control_in_pieces)] if summary.coarser else []
    return Report("Mapping table", facts, sections, warnings)


def coverage_section(coverage: Coverage, uses: Coverage | None = None) -> Section:
    """Rows by kind, and where there is a text, its tokens by the kind of their row."""
    return Section(
        "Coverage",
        ("kind", "tokens", "of all", *(("uses", "of the text") if uses else ()), "meaning"),
        [
            (
                kind,
                *_count(getattr(coverage, kind), sum(coverage)),
                *(_count(getattr(uses, kind), sum(uses)) if uses else ()),
                meaning,
            )
            for kind, meaning in _MEANINGS.items()
        ],
    )


def lookup_report(table: MappingTable, lookups: Sequence[Lookup]) -> Report:
    """Rows of a table, each with its segment and its neighbours."""
    sections = []
    for lookup in lookups:
        row = lookup.row
        spelled = ", ".join(f"{show(_token_cell(token))} #{token.id}" for token in lookup.segment)
        note = f"the control spells it {spelled}" if spelled else "the control has no spelling of it"
        near = [(n.token.bytes, n.token.id, n.kind.name.lower(), n.distance) for n in lookup.near]
        sections.append(Section(f"Token #{row.target.id}", _ROW_COLUMNS, [_row_cells(row)], note))
        if near:
            columns = ("control", "id", "kind", "distance")
            sections.append(Section(f"Control tokens near #{row.target.id}", columns, near))
    return Report("Lookup", table_facts(table), sections)


def difference_report(before: MappingTable, after: MappingTable, difference: Difference) -> Report:
    """Two tables side by side."""
    changes = difference.changes
    facts: dict[str, Cell] = {
        **{f"before, {key}": value for key, value in table_facts(before).items()},
        **{f"after, {key}": value for key, value in table_facts(after).items()},
        "rows": difference.rows,
        "rows that differ": len(changes),
        "segments that differ": difference.segments,
    }
    if not changes:
        title = "The two tables map alike, but spell some tokens differently"
        return Report(title if difference.segments else "The two tables are alike", facts)
    rows = [
        (
            _token_cell(change.before.target),
            change.before.target.id,
            *(
                cell
                for row in (change.before, change.after)
                for cell in (_control_cell(row), row.kind.name.lower())
            ),
        )
        for change in changes[:_SHOWN]
    ]
    sections = [
        Section(
            "Rows that differ, by kind",
            ("from and to", "rows", "of all"),
            [(kind, *_count(count, difference.rows)) for kind, count in difference.kinds.items()],
        ),
        Section(
            "Rows that differ",
            ("token", "id", "before", "kind", "after", "kind"),
            rows,
            f"the first {_SHOWN} of {len(changes):,}; --json has all" if len(changes) > _SHOWN else "",
        ),
    ]
    return Report("The two tables differ", facts, sections)


def score_report(table: MappingTable, meetings: Meetings, scores: Sequence[Score]) -> Report:
    """Strategies side by side on one text."""
    facts = table_facts(table) | {
        "target tokens in the text": meetings.target_tokens,
        "control tokens in the text": meetings.control_tokens,
        "places where both begin a token": len(meetings.target_ids),
        "bytes that one of the two can't spell, left out": meetings.skipped_bytes,
    }
    kinds = [kind for kind in Coverage._fields if any(getattr(s.places_by_kind, kind) for s in scores)]
    overall = Section(
        "How often the table names the control's own next token",
        ("strategy", "hits", "of all places"),
        [(s.strategy, *_count(s.hits, s.places)) for s in scores],
        f"{table.strategy} is the table's own strategy",
    )
    by_kind = [
        Section(
            f"On rows of the kind {kind}",
            ("strategy", "places", "hits", "of these places"),
            [
                (s.strategy, places, *_count(getattr(s.hits_by_kind, kind), places))
                for s in scores
                if (places := getattr(s.places_by_kind, kind))
            ],
        )
        for kind in kinds
    ]
    return Report("Score", facts, [overall, *by_kind])


_ROW_COLUMNS = ("token", "id", "kind", "control", "id", "distance")


def _row_cells(row: Row) -> tuple[Cell, ...]:
    control = row.control
    uses = () if row.uses is None else (row.uses,)
    kind = row.kind.name.lower()
    control_id = f"#{control.id}" if control else None
    return (
        _token_cell(row.target),
        f"#{row.target.id}",
        kind,
        _control_cell(row),
        control_id,
        row.distance,
        *uses,
    )


def _control_cell(row: Row) -> str | bytes | None:
    return _token_cell(row.control) if row.control else None


def _token_cell(token: Token) -> str | bytes:
    return token.bytes if token.name is None else token.name


def _distance_section(distances: Mapping[int, int], uses: Mapping[int, int] | None) -> Section:
    all_rows, all_uses = sum(distances.values()), sum(uses.values()) if uses else 0
    bins: dict[str, tuple[int, ...]] = {f"{value}": (value,) for value in range(1, _FAR)}
    bins[f"{_FAR} and more"] = tuple(value for value in distances if value >= _FAR)
    rows = [
        (
            label,
            *_count(sum(distances.get(value, 0) for value in values), all_rows),
            *(_count(sum(uses.get(value, 0) for value in values), all_uses) if uses is not None else ()),
        )
        for label, values in bins.items()
    ]
    columns = ("distance", "tokens", "of these", *(("uses", "of their uses") if uses is not None else ()))
    return Section("Edit distance of tokens of the kinds prefix and extension", columns, rows)


def _pieces_section(summary: Summary) -> Section:
    sides = {
        "the control": summary.control_in_pieces,
        "the target": summary.target_in_pieces,
        "the target, from a bare space on": summary.from_bare_space,
    }
    return Section(
        "Tokens that the other side has not, and spells in pieces",
        ("of", "tokens", "of all", *(("uses", "of the text") if summary.uses else ())),
        [
            (side, *_count(*pieces.tokens), *(_count(*pieces.uses) if pieces.uses else ()))
            for side, pieces in sides.items()
        ],
        "spelled from a bare space on: words of other scripts, which no routing carries",
    )


def _coarse_warning(control: Pieces) -> str:
    if control.uses:
        part, whole, hint = control.uses, "the control's tokens in this text", ""
    else:
        part, whole, hint = control.tokens, "the control's tokens", " --text FILE weighs them by use."
    counts = f"{part.part:,} of {part.whole:,}"
    return _COARSE.format(share=show(_count(*part)[1]), whole=whole, counts=counts, hint=hint)


def _count(count: int, whole: int) -> tuple[int, Share]:
    return count, Share(count / whole if whole else 0.0)
