"""A command run in this process."""

from __future__ import annotations

import sys

from foreword import cli


def call(capsys, monkeypatch, *arguments):
    """Run the command as `main` does; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["foreword", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exc:
        code = exc.code or 0
    done = capsys.readouterr()
    return code, done.out, done.err
