"""Credentials in a job's URLs: refused before anything is written, and repeated nowhere."""

from pathlib import Path

import pytest

from tests.commands import options, tessera

SPEC = "examples/llava_onevision.yaml"
SIGNED = "https://host/x?X-Amz-Credential=AKIA&X-Amz-Signature=hush"


@pytest.mark.parametrize("field", ["input__path", "model__path", "output__path"])
def test_a_job_with_credentials_in_a_url_is_refused_and_leaves_nothing(tmp_path: Path, field: str) -> None:
    (tmp_path / "in").mkdir()
    done = tessera("run", SPEC, *options(tmp_path, **{field: SIGNED}))
    assert done.code == 2 and f"{field.replace('__', '.')}" in done.err
    assert "holds credentials" in done.err and "through its environment" in done.err
    assert "hush" not in done.err + done.out and "AKIA" not in done.err + done.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_a_target_with_credentials_is_refused(command: str) -> None:
    done = tessera(command, SIGNED)
    assert done.code == 2 and "https://host/x?...: holds credentials" in done.err
    assert "hush" not in done.err + done.out
