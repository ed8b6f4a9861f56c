"""`python -m pefttools.grading.exercises`: the table of all exercises and questions."""

from __future__ import annotations

from pefttools.grading.exercises import chapters, exercises, questions, title


def table() -> str:
    """One line an exercise: points, minutes, difficulty, numbers of mistakes and alternatives; sums a chapter."""
    lines = []
    for chapter in chapters():
        own, asked = exercises(chapter), questions(chapter)
        points, minutes = (sum(getattr(entry, name) for entry in (*own, *asked)) for name in ("points", "minutes"))
        lines.append(
            f"{title(chapter)}: {len(own)} exercises, {len(asked)} questions, {points} points, {minutes} minutes"
        )
        lines.append(f"  {'name':<28} {'points':>6} {'min':>4} {'':>4} {'mistakes':>8} {'alternatives':>12}  title")
        for entry in own:
            lines.append(
                f"  {entry.name:<28} {entry.points:>6} {entry.minutes:>4} {entry.stars:>4} {len(entry.mistakes):>8} "
                f"{len(entry.alternatives):>12}  {entry.title}"
            )
        for entry in asked:
            lines.append(
                f"  {entry.name:<28} {entry.points:>6} {entry.minutes:>4} {'?':>4} {len(entry.options):>5} options"
            )
    return "\n".join(lines) or "no exercises yet"


if __name__ == "__main__":
    print(table())
