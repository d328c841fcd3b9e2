"""The command itself: help, exit codes, one line for a mistake, no heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tilewise import __version__
from tilewise.cli import BAD_USAGE, FAILED, INTERRUPTED, OK, run
from tilewise.cli import main as main_module

COMMAND = "import sys; from tilewise.cli import run; sys.exit(run())"


def tilewise(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, after the statements `before`."""
    return subprocess.run(
        [sys.executable, "-c", before + COMMAND, *arguments], capture_output=True, text=True, check=False
    )


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == OK
    shown = capsys.readouterr().out
    for verb in main_module.VERBS:
        assert verb in shown


def test_help_needs_no_torch() -> None:
    """Of the whole command and of every verb."""
    check = "import atexit; atexit.register(lambda: print({'torch'} & set(sys.modules)));"
    for arguments in ([], ["bench"], ["compare"], ["explain"], ["doctor"], ["mask"]):
        done = tilewise(*arguments, "--help", before="import sys;" + check)
        assert done.returncode == OK, done.stderr
        assert done.stdout.endswith("set()\n"), arguments


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == OK
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compar"], "No such command 'compar'"),
        (["compare", "--heads", "0"], "0 is not in the range"),
        (["compare", "--lengths", "512,x"], "not a list of integers"),
        (["compare", "--lengths", "0"], "must be at least 1"),
        (["compare", "--unknown"], "No such option"),
        (["explain", "--window", "3"], "not LEFT,RIGHT"),
        (["explain", "--backend", "fast"], "'auto' or one of"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == BAD_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_no_verb_shows_help_and_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == BAD_USAGE
    assert "compare" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["click", "rich", "jinja2"])
def test_a_missing_library_names_the_extra_in_one_line(missing: str) -> None:
    done = tilewise("compare", before=f"import sys; sys.modules[{missing!r}] = None;")
    assert done.returncode == BAD_USAGE
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert "tilewise[cli]" in done.stderr


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module.cli, "main", interrupted)
    assert run(["compare"]) == INTERRUPTED
    assert capsys.readouterr().err == "tilewise: interrupted\n"


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    """As in `tilewise doctor --json | head`: the pipe is closed before anything is written."""
    command = [sys.executable, "-c", COMMAND, "explain", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
        assert process.wait() in (OK, FAILED)
    assert complaint == ""


def test_the_installed_command_is_this_one() -> None:
    from importlib.metadata import entry_points

    found = entry_points(group="console_scripts", name="tilewise")
    if not found:
        pytest.skip("tilewise is not installed here, only on the path")
    assert next(iter(found)).value == "tilewise.cli:run"


@pytest.mark.parametrize(
    ("problem", "code", "says"),
    [
        (MemoryError("Unable to allocate 9 GiB"), BAD_USAGE, "too large for this machine: Unable to allocate 9 GiB"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory\nmore"), BAD_USAGE, "can't allocate memory"),
        (RuntimeError("numel: integer multiplication overflow"), BAD_USAGE, "overflow"),
        (OSError(28, "No space left on device"), FAILED, "No space left on device"),
    ],
)
def test_what_the_machine_cannot_do_is_one_line(
    problem: Exception, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise problem

    monkeypatch.setattr(main_module.cli, "main", fails)
    assert run(["compare"]) == code
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(main_module.cli, "main", fails)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(["compare"])


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "2>&- >/dev/null"])
def test_streams_that_take_nothing(redirect: str) -> None:
    line = f'"{sys.executable}" -c "{COMMAND}" mask --n 64 {redirect}'
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == (FAILED if "full" in redirect else OK)
    assert "Traceback" not in done.stderr
    assert ("No space left" in done.stderr) == ("full" in redirect)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_streams_of_few_characters(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for more in ([], ["--json"]):
        command = [sys.executable, "-c", COMMAND, "roofline", "--device", "T4", *more]
        done = subprocess.run(command, capture_output=True, check=False, env=environment)
        assert done.returncode == OK, done.stderr
    assert json.loads(done.stdout.decode(encoding))["steps"]["standard: QKᵀ"]
