"""The errors that users see: each says what was expected, what came, where, and what to do next."""

from __future__ import annotations


class GaugeError(Exception):
    """Base of every error this package raises on purpose.

    ``str()`` of it is one line: ``summary: expected X, got Y, in WHERE. NEXT STEP``; the parts stay readable as
    attributes so that reports can lay them out.
    """

    def __init__(
        self,
        summary: str,
        *,
        expected: str | None = None,
        actual: str | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.summary = summary
        self.expected = expected
        self.actual = actual
        self.where = where
        self.hint = hint
        super().__init__(self._line())

    def _line(self) -> str:
        details = [f"expected {self.expected}" if self.expected else "", f"got {self.actual}" if self.actual else ""]
        details.append(f"in {self.where}" if self.where else "")
        line = ": ".join(part for part in (self.summary, ", ".join(d for d in details if d)) if part)
        return f"{line}. {self.hint}" if self.hint else line

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), dict(self.__dict__)))


def _rebuild(kind: type[GaugeError], state: dict[str, object]) -> GaugeError:
    error = kind.__new__(kind)
    error.__dict__.update(state)
    Exception.__init__(error, error._line())
    return error


class ConfigurationError(GaugeError):
    """A bad option, marker or argument: names the value and the allowed set (pytest exits 4 on options)."""


class MachineError(GaugeError):
    """Something the machine lacks: Java, a framework, a GPU."""


class DataError(GaugeError):
    """Data that is missing, truncated, corrupt or mislabelled."""


class ClusterError(GaugeError):
    """The Spark cluster could not start, is too small, or lost an executor it needed."""


class TrainingError(GaugeError):
    """Training failed; ``str()`` is the one line and, below it, the failing executor's own traceback."""

    def __init__(
        self, summary: str, *, executor: int | None = None, traceback_text: str = "", **parts: str | None
    ) -> None:
        self.executor = executor
        """Rank of the executor that failed, where one did."""
        self.traceback_text = traceback_text
        """What Python, or Spark, printed there."""
        super().__init__(summary, **parts)

    def __str__(self) -> str:
        return "\n".join(part for part in (super().__str__(), self.traceback_text.rstrip()) if part)


class TrainingTimeout(TrainingError):
    """A round ran longer than ``--gauge-timeout`` and was cancelled."""


class BaselineError(GaugeError):
    """A baseline that cannot be read, written, or is of a newer schema."""


class NewerBaselineError(BaselineError):
    """A baseline of a newer schema: it holds what this version cannot keep, and is never replaced by it."""


class NotMeasuredError(GaugeError):
    """A gated assert without a measurement behind it: never a pass."""
