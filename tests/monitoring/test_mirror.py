"""Loggers of others: they get the rows, and whatever they do, training goes on at its pace."""

import io
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deepseek import frameworks
from deepseek.config import ConfigError, RunConfig, UserError, changed, load_config
from deepseek.config.schema import ExpManagerConfig, MLFlowConfig, WandbConfig
from deepseek.frameworks import pl, remote_loggers
from deepseek.monitoring.record import metrics_log
from deepseek.monitoring.record.metrics_log import Mirror
from support.micro_runs import MicroRuns


class Logger:
    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.threads: set[str] = set()

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.threads.add(threading.current_thread().name)
        self.told.append((step, metrics))


def test_it_gets_all_rows_in_order() -> None:
    logger = Logger()
    mirror = Mirror("Logger", lambda: logger, "m.jsonl")
    for step in range(500):
        mirror.tell({"loss": step / 2}, step)
    mirror.close()
    assert logger.told == [(step, {"loss": step / 2}) for step in range(500)]
    assert logger.threads == {"mirror Logger"}


def test_one_that_was_told_nothing_is_not_opened() -> None:
    def never() -> Any:
        raise AssertionError

    Mirror("Logger", never, "m.jsonl").close()


@pytest.mark.parametrize("where", ["opening", "logging"])
@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(1)])
def test_one_that_raises_is_told_of_once(
    capsys: pytest.CaptureFixture[str], where: str, error: BaseException
) -> None:
    calls: list[int] = []

    class Raising:
        def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
            calls.append(step)
            raise error

    def opened() -> Any:
        if where == "opening":
            raise error
        return Raising()

    mirror = Mirror("WandbLogger", opened, "m.jsonl")
    for step in range(3):
        mirror.tell({}, step)
        time.sleep(0.02)
    mirror.close()
    assert calls == ([0] if where == "logging" else [])
    assert capsys.readouterr().err == (
        f"WandbLogger failed ({type(error).__name__}: {error}) and gets no more; "
        "everything is in m.jsonl\n"
    )


def test_one_that_hangs_costs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_log, "MOST_WAITING", 10)
    free = threading.Event()

    class Hanging:
        def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
            free.wait()

    mirror = Mirror("MLFlowLogger", Hanging, "m.jsonl")
    try:
        begin = time.perf_counter()
        for step in range(1000):
            mirror.tell({"loss": 1.0}, step)
        assert time.perf_counter() - begin < 20  # waiting for the one that hangs would never end
        mirror.close(patience=0.05)
        assert time.perf_counter() - begin < 20
    finally:
        free.set()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "MLFlowLogger does not keep up, it is 10 rows behind: rows are left out"
    )
    assert second.startswith("MLFlowLogger did not take its last rows within 0.05 s, about 10 are")


# -- W&B and MLflow --


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Lightning's two loggers, as if their packages were there."""
    made: dict[str, Any] = {}

    def kind(name: str) -> type:
        class Fake(Logger):
            def __init__(self, **settings: Any) -> None:
                super().__init__()
                made[name] = self
                self.settings = settings

            def log_hyperparams(self, config: Any) -> None:
                self.config = config

        return Fake

    for package in ("wandb", "mlflow"):
        module = ModuleType(package)
        module.__spec__ = SimpleNamespace(name=package)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, package, module)
    loggers = ModuleType("loggers")
    loggers.WandbLogger = kind("wandb")  # type: ignore[attr-defined]
    loggers.MLFlowLogger = kind("mlflow")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"{pl.__name__}.loggers", loggers)
    settings = SimpleNamespace(base_url="http://127.0.0.1:9")
    sys.modules["wandb"].setup = lambda: SimpleNamespace(settings=settings)  # type: ignore[attr-defined]
    monkeypatch.setattr(frameworks.urllib.request, "urlopen", lambda url, timeout: io.BytesIO())
    monkeypatch.setattr(frameworks.atexit, "register", lambda function: None)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")  # and whatever the test sets is forgotten
    return made


def test_by_default_there_is_none(tmp_path: Path) -> None:
    assert remote_loggers(tmp_path, RunConfig(), print) == {}


def test_both_with_their_defaults(tmp_path: Path, packages: dict[str, Any]) -> None:
    manager = ExpManagerConfig(create_wandb_logger=True, create_mlflow_logger=True)
    run = RunConfig(name="tiny", exp_manager=manager)
    opens = remote_loggers(tmp_path / "version_3", run, print)
    assert not packages  # only the thread that feeds them opens them
    for name, open_logger in opens.items():
        mirror = Mirror(name, open_logger, "m.jsonl")
        mirror.tell({"loss": 2.0}, 1)
        mirror.close()
    assert packages["wandb"].settings == {
        "project": "tiny", "name": "version_3", "offline": False,
        "save_dir": str(tmp_path / "version_3")}  # fmt: skip
    assert os.environ["MLFLOW_ALLOW_FILE_STORE"] == "true"
    assert packages["mlflow"].settings == {
        "experiment_name": "tiny", "run_name": "version_3", "tracking_uri": None,
        "save_dir": str(tmp_path / "version_3" / "mlruns")}  # fmt: skip
    for logger in packages.values():
        assert logger.config == asdict(run)
        assert logger.told == [(1, {"loss": 2.0})]


def test_their_settings(
    tmp_path: Path, packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = ExpManagerConfig(
        create_wandb_logger=True,
        wandb_logger_kwargs=WandbConfig("v3", "first", True),
        create_mlflow_logger=True,
        mlflow_logger_kwargs=MLFlowConfig("exp", "first", "http://there"),
    )
    run = RunConfig(name="tiny", exp_manager=manager)
    for open_logger in remote_loggers(tmp_path, run, print).values():
        open_logger()
    wandb, mlflow = packages["wandb"].settings, packages["mlflow"].settings
    assert (wandb["project"], wandb["name"], wandb["offline"]) == ("v3", "first", True)
    assert (mlflow["experiment_name"], mlflow["run_name"]) == ("exp", "first")
    assert mlflow["tracking_uri"] == "http://there"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    run = changed(run, {"exp_manager.mlflow_logger_kwargs.tracking_uri": None})
    remote_loggers(tmp_path, run, print)["MLFlowLogger"]()
    assert packages["mlflow"].settings["tracking_uri"] == "http://elsewhere"


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_one_whose_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: None)
    manager = ExpManagerConfig(**{f"create_{package}_logger": True})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"create_{package}_logger=true.*pip install {package}"):
        remote_loggers(tmp_path, RunConfig(exp_manager=manager), print)


@pytest.mark.parametrize(
    "setting",
    ["wandb_logger_kwargs.project=p", "wandb_logger_kwargs.offline=true",
     "mlflow_logger_kwargs.tracking_uri=http://there"],
)  # fmt: skip
def test_settings_of_a_logger_that_is_not_made_are_refused(setting: str) -> None:
    key = setting.split("=")[0]
    name = key.split("_")[0]
    with pytest.raises(ConfigError) as error:
        load_config("deepseek_v3_tiny", [f"exp_manager.{setting}"])
    assert f"exp_manager.{key}" in str(error.value)
    assert f"would be ignored, since exp_manager.create_{name}_logger=false" in str(error.value)
    load_config(
        "deepseek_v3_tiny", [f"exp_manager.{setting}", f"exp_manager.create_{name}_logger=true"]
    )


# -- a key, and no network --


@pytest.mark.parametrize("port", ["closed", "silent", "gives nonsense", "answers"])
def test_a_server_is_asked_first(
    packages: dict[str, Any], monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    """One that is not there is told, and the files stay in the run folder."""
    monkeypatch.undo()
    monkeypatch.setattr(frameworks, "ANSWER_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(frameworks.atexit, "register", lambda function: None)
        module = ModuleType("wandb")
        settings = SimpleNamespace(base_url=url)
        module.setup = lambda: SimpleNamespace(settings=settings)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", module)
        reply = {"gives nonsense": b"what?\r\n\r\n", "answers": b"HTTP/1.0 404 no\r\n\r\n"}

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply[port])

        if port == "closed":
            server.close()
        elif port in reply:
            threading.Thread(target=serve, daemon=True).start()
        told: list[str] = []
        assert frameworks._wandb_answers(told.append) == (port == "answers")
        assert len(told) == (port != "answers")
        assert all(f"{url} does not answer (" in words and "wandb sync" in words for words in told)
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert frameworks._wandb_answers(told.append), "the user's own choice"


SCRIPT = """
import time
from pathlib import Path
from deepseek.config import RunConfig
from deepseek.config.schema import ExpManagerConfig
from deepseek.frameworks import remote_loggers
from deepseek.monitoring.record.metrics_log import Mirror
run = RunConfig(name="x", exp_manager=ExpManagerConfig(create_wandb_logger=True))
(opens,) = remote_loggers(Path("."), run, print).values()
mirror = Mirror("WandbLogger", opens, "m.jsonl")
mirror.tell({"loss": 1.0}, 1)
time.sleep(1)
print("end of the run", time.time(), flush=True)
mirror.close()
"""


@pytest.mark.framework
@pytest.mark.parametrize("silent", [False, True], ids=["closed", "silent"])
def test_a_key_without_network_ends_soon_after_the_run(
    micro: MicroRuns, tmp_path: Path, silent: bool
) -> None:
    """The package itself, where it is installed (NeMo brings it)."""
    pytest.importorskip("wandb")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        env = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_API_KEY": "a" * 40,
            **{f"WANDB_{name}_DIR": str(tmp_path) for name in ("CACHE", "CONFIG", "DATA")},
        }
        script = micro.cli.start("script.py", cwd=tmp_path, program="python", env=env)
        done = script.wait().assert_done()
        ended = time.time()
    (line,) = (line for line in done.out.splitlines() if line.startswith("end of the run"))
    # 9 s by design; a machine under load takes longer to take the package down.
    assert ended - float(line.split()[-1]) < 60
