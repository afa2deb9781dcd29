"""What `jobs.submit` finds before a job is sent."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs import submit
from jobs.command import USER_ERRORS, plain
from jobs.submit import SubmitError, check, connected, environment, labels, packed
from mtrec_ray.config import ConfigError
from tests import tiny


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny.write_log(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.raw_config(tmp_path)))
    return tmp_path / "run.yaml"


@pytest.fixture
def old_cluster() -> Iterator[str]:
    """A dashboard of Ray 2.1.0."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"version": "4", "ray_version": "2.1.0", "ray_commit": "x"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_job_that_may_be_submitted_exists() -> None:
    there = {p.stem for p in Path(submit.__file__).parent.glob("*.py")}
    assert set(submit.JOBS) == there - {"__init__", "command", "submit", "serve", "demo", "fetch"}


def test_an_address_where_no_cluster_of_this_version_answers_is_refused(old_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SubmitError, match="which cluster"):
        connected(None)
    with pytest.raises(SubmitError, match="expected the dashboard's address"):
        connected("ray://head:10001")
    with pytest.raises(SubmitError, match=r"no Ray cluster answers there .*8265"):
        connected("http://127.0.0.1:9")
    with pytest.raises(SubmitError, match=r"the cluster runs Ray 2\.1\.0, here is Ray .*pip install 'ray==2\.1\.0'"):
        connected(old_cluster)


def test_mistakes_of_the_configuration_are_said_here(config: Path) -> None:
    out = "s3://bucket/run"
    check(["--config", str(config), "--out", out, "train.epochs=3"])
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key"):
        check(["--config", str(config), "--out", out, "train.epoch=3"])
    with pytest.raises(SubmitError, match="--out: name a URI"):
        check(["--config", str(config)])
    check(["--config", str(config), "--run", out])  # jobs.tasks
    with pytest.raises(SubmitError, match="--out: runs/x is relative"):
        check(["--config", str(config), "--out", "runs/x"])
    with pytest.raises(SubmitError, match=r"data\.interactions\.path: log is relative"):
        check(["--config", str(config), "--out", out, "data.interactions.path=log"])
    with pytest.raises(SubmitError, match=r"scoring\.users: users\.parquet is relative"):
        check(["--config", str(config), "--out", out, "scoring.users=users.parquet"])
    with pytest.raises(SubmitError, match="--verify: runs/x is relative"):
        check(["--verify", "runs/x"])


def test_code_and_configurations_travel_and_data_do_not(config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--out", "/shared/run", "train.epochs=1"]
    with packed(arguments) as (folder, inside):
        assert inside == ["--config", "configs/1_run.yaml", "--out", "/shared/run", "train.epochs=1"]
        assert (Path(folder) / inside[1]).read_text() == config.read_text()
        assert {p.name for p in Path(folder).iterdir()} == {"mtrec_ray", "jobs", "serve_apps", "configs"}
        assert (Path(folder) / "mtrec_ray" / "serving" / "page.html").exists() and (Path(folder) / "jobs" / "submit.py").exists()
        assert not list(Path(folder).rglob("__pycache__"))
        assert sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) < 5 << 20
    assert not Path(folder).exists()


def test_variables_and_labels_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu")
    assert environment(["AWS_REGION", "A=b=c"]).items() >= {"AWS_REGION": "eu", "A": "b=c"}.items()
    with pytest.raises(SubmitError, match="--env NOWHERE: it is not set here"):
        environment(["NOWHERE"])
    assert labels(["role=batch"]) == {"role": "batch"} and labels([]) is None
    with pytest.raises(SubmitError, match="expected KEY=VALUE"):
        labels(["batch"])


def test_the_command_line_says_one_thing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pipeline", "--address", "http://127.0.0.1:9", f"--config={config}", "--out=/x", "train.epochs=2"]
    assert submit.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --address http://127.0.0.1:9") and len(told.splitlines()) == 1
    with pytest.raises(SystemExit):
        submit.main(["juggle"])


def test_labels_may_be_repeated_and_swallow_no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def stop(wanted: list[str]) -> None:
        seen.append(wanted)
        raise SubmitError("seen")

    monkeypatch.setattr(submit, "check", seen.append)
    monkeypatch.setattr(submit, "labels", stop)
    given = ["--out", "/mnt/run", "--labels", "role=head", "train.epochs=3", "--labels", "zone=a"]
    assert submit.main(["pipeline", *given]) == 2
    assert seen == [["--out", "/mnt/run", "train.epochs=3"], ["role=head", "zone=a"]]


def test_a_part_of_ray_that_died_is_said_with_the_cure() -> None:
    import ray.exceptions

    said = plain(ray.exceptions.ActorDiedError())
    assert said.startswith("a part of Ray died: The actor died unexpectedly")
    assert "The same command goes on" in said and "--debug" in said
    assert isinstance(ray.exceptions.ActorDiedError(), USER_ERRORS)
