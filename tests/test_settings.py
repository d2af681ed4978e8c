"""Settings: flag over environment over file over default, and errors that name their source."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from snapshotd.errors import UsageError
from snapshotd.settings import CoordinatorSettings, DaemonSettings, ToolSettings, add_flags, load, table


def daemon(*flags: str, environ: dict[str, str] | None = None) -> DaemonSettings:
    parser = argparse.ArgumentParser()
    add_flags(parser, DaemonSettings)
    return load(DaemonSettings, parser.parse_args(flags), "daemon", environ or {})


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("[daemon]\nbudget = '1GiB'\ngenerations = 5\ndomain = 'rack1'\n")
    environ = {"SNAPSHOTD_BUDGET": "2GiB", "SNAPSHOTD_GENERATIONS": "4"}
    settings = daemon("--budget", "3GiB", "--config", str(file), environ=environ)
    assert (
        settings.budget,
        settings.generations,
        settings.domain,
        settings.capture_every,
    ) == (3 << 30, 4, "rack1", 1)


@pytest.mark.parametrize("kind", [CoordinatorSettings, DaemonSettings, ToolSettings])
def test_every_setting_has_flag_variable_key_and_sentence(kind: type) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, kind)
    known = {action.dest for action in parser._actions}
    for name, setting in table(kind).items():
        assert name in known
        assert len(setting.doc) > 10


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        (["--budget", "lots"], {}, "--budget.*lots"),
        ([], {"SNAPSHOTD_CAPTURE_EVERY": "0"}, "SNAPSHOTD_CAPTURE_EVERY.*at least 1"),
        (["--generations", "1"], {}, "generations 1 cannot be"),
        (["--persist-every", "5"], {}, "need --persist"),
        (["--codec", "magic"], {}, "auto, isal or zfec"),
        (["--node-id", "a/b"], {}, "without '/'"),
        (["--config", "/nowhere.toml"], {}, "cannot read"),
    ],
)
def test_what_cannot_be_is_refused_with_its_source(flags: list[str], environ: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        daemon(*flags, environ=environ)


def test_unknown_keys_in_the_file_are_named(tmp_path: Path) -> None:
    """A misspelt setting that is silently ignored costs somebody their protection."""
    file = tmp_path / "s.toml"
    file.write_text("[daemon]\nbugdet = 1\n")
    with pytest.raises(UsageError, match="bugdet"):
        daemon("--config", str(file))


def test_half_a_tls_is_refused() -> None:
    with pytest.raises(UsageError, match="all of"):
        _ = daemon("--tls-cert", "a.pem").tls


def test_three_generations_when_snapshots_are_persisted(tmp_path: Path) -> None:
    assert daemon().slot_generations == 2
    assert daemon("--persist", str(tmp_path), "--persist-every", "10").slot_generations == 3
    assert daemon("--persist", str(tmp_path), "--persist-every", "10", "--generations", "4").slot_generations == 4
