"""The errors a user can cause. Everything else is a bug and keeps its traceback.

An error says what is wrong, where, what was expected, and what to do next. `attnconvert.cli.main` catches `AttnConvertError` once and
prints `render()`; exit code 1. This module imports nothing, so every layer may use it.
"""

from __future__ import annotations


class AttnConvertError(Exception):
    """A mistake in the input or the surroundings (recipe, model, data, disk), never in attnconvert.

    Args:
        code: stable kebab-case identifier, e.g. `unknown-method`. Tests and scripts may rely on it.
        message: one line, what is wrong, with the offending value in quotes.
        where: `file:line  yaml.path`, a file, a module path; whatever locates the mistake.
        expected: what would have been accepted, including close matches.
        hint: what to do next, as a full sentence or a command in backticks.
    """

    def __init__(self, code: str, message: str, *, where: str | None = None, expected: str | None = None, hint: str | None = None):
        self.code, self.message, self.where, self.expected, self.hint = code, message, where, expected, hint
        super().__init__(self.render())

    def render(self) -> str:
        """The full text shown to the user: several lines, no trailing newline."""
        lines = [f"error[{self.code}]: {self.message}"]
        if self.where:
            lines.append(f"  --> {self.where}")
        if self.expected:
            lines.append(f"  expected {self.expected}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class ErrorGroup(AttnConvertError):
    """Several mistakes found in one pass (a recipe with three typos reports all three)."""

    def __init__(self, errors: list[AttnConvertError]):
        assert errors, "an ErrorGroup needs at least one error"
        self.errors = errors
        Exception.__init__(self, self.render())
        self.code, self.message = errors[0].code, errors[0].message
        self.where, self.expected, self.hint = errors[0].where, errors[0].expected, errors[0].hint

    def render(self) -> str:
        return "\n".join(e.render() for e in self.errors)
