"""Who is who, the same in every run: `received/people.json` keeps each person's name and learning platform's numbers.

    {"canvas 12345": {"student": "doejane-12345", "name": "doejane", "lms": "canvas", "ids": {"02_lora": "12345"}}, …}

A name once given stays: whoever hands in later under a name that comes to the same gets another one, not theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pefttools.grading.people import apart, folded, safe

if TYPE_CHECKING:
    from pefttools.grading.intake import HandIn


def read_people(roster: Path) -> dict[str, Any]:
    """What `people.json` knows: {key: {"student", "name", "lms", "ids": {chapter: number}}}."""
    try:
        found = json.loads(roster.read_text(encoding="utf-8"))
        return {
            key: entry
            for key, entry in found.items()
            if isinstance(entry.get("student"), str) and isinstance(entry.get("ids"), dict)
        }
    except (OSError, ValueError, AttributeError):
        return {}


def tell_apart(hand_ins: Iterable[HandIn], roster: Path | None) -> None:
    """Give each person a name of their own, the same in every run, and keep it with the platform's numbers."""
    known: dict[str, Any] = read_people(roster) if roster is not None else {}
    namesakes: dict[tuple[str, str], set[str]] = {}
    for hand_in in hand_ins:
        if hand_in.person is not None and hand_in.person.lms == "moodle":
            namesakes.setdefault((hand_in.person.key, hand_in.chapter), set()).add(hand_in.person.lms_id)
    several = {key for (key, _), numbers in namesakes.items() if len(numbers) > 1}
    taken = {folded(entry["student"]): key for key, entry in known.items()}
    for hand_in in sorted(hand_ins, key=lambda h: (h.person.key, h.person.lms_id) if h.person else ("", "")):
        who = hand_in.person
        if who is None:
            continue
        key, name = who.key, who.student
        if key in several:
            key, name = f"{key} {who.lms_id}", safe(f"{who.name}-{who.lms_id}")
            hand_in.notes.append(f"Two people are called {who.name}: this is participant {who.lms_id}.")
        if key not in known:
            if taken.get(folded(name), key) != key:
                hand_in.notes.append(
                    f"Another hand-in goes by the name {name} as well: this one is kept apart from it."
                )
                name = apart(name, key)
            known[key] = {"student": name, "name": who.name, "lms": who.lms, "ids": {}}
            taken[folded(name)] = key
        hand_in.student = known[key]["student"]
        if who.lms_id:
            known[key]["ids"][hand_in.chapter or ""] = who.lms_id
    if roster is not None and known:
        roster.parent.mkdir(parents=True, exist_ok=True)
        new = roster.with_suffix(".new")
        new.write_text(
            json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8", errors="replace"
        )
        os.replace(new, roster)
