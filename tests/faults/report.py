"""What an attack found."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

SHOWN = 3  # examples of one kind of fault

Progress = Callable[[int], object]  # called with the number of cases that were tried since


@dataclass
class Report:
    """The number of cases that were tried, and what did not hold.

    faults: (subject, what happened) of every case that did not hold. skipped: why the attack did
    not run, or nothing.
    """

    name: str
    tried: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)
    skipped: str = ""

    def fault(self, subject: str, what: str) -> None:
        """Note a case that did not hold."""
        self.faults.append((subject, " ".join(what.split())[:400]))

    def row(self, seconds: float) -> str:
        """One line of the table of all attacks."""
        numbers = f"{self.tried:>8,}{len(self.faults):>8,}{seconds:>9.0f}"
        if self.skipped:
            return f"{self.name:<14}{numbers}  skipped: {self.skipped}"
        return f"{self.name:<14}{numbers}  {'DID NOT HOLD' if self.faults else 'held'}"

    def examples(self) -> list[str]:
        """A few faults of every subject, and how many there are."""
        lines = []
        for subject, count in Counter(subject for subject, _ in self.faults).most_common():
            lines.append(f"{self.name}: {subject}: {count} of {self.tried:,} did not hold")
            found = dict.fromkeys(what for whose, what in self.faults if whose == subject)
            lines += [f"    {what}" for what in list(found)[:SHOWN]]
        return lines
