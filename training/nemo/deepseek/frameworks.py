"""Which framework drives training: NVIDIA NeMo where it works, PyTorch Lightning otherwise.

The only file that imports either. The choice is made once, at import, and never mixed:
``lightning.pytorch`` and ``pytorch_lightning`` are different class trees, and NeMo accepts only the
first. ``DEEPSEEK_FRAMEWORK`` may be ``auto`` (default), ``nemo`` or ``lightning``.

A NeMo that is installed but broken is an error, not a reason to fall back in silence.
"""

from __future__ import annotations

import atexit
import http.client
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.config.errors import UserError
from deepseek.config.load import stored_config
from deepseek.config.schema import ModelConfig, RunConfig

VARIABLE = "DEEPSEEK_FRAMEWORK"
NEMO_LIGHTNING = "lightning>2.2.1,<=2.4.0"
NEMO_TARGET = "nemo.core.classes.modelPT.ModelPT"
"""Class named in a ``.nemo`` file. NeMo 3.0 refuses to restore third-party classes by name; with
its own base class named, ``restore_from`` builds the class it is called on."""


class FrameworkError(UserError):
    """No training framework, or a broken one."""


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "nemo", "lightning"):
        raise FrameworkError(f"{VARIABLE}={choice}: must be auto, nemo or lightning")
    return choice


def _import_nemo() -> tuple[Any, Any]:
    """ModelPT and exp_manager, or a FrameworkError that says what is broken."""
    version = importlib.metadata.version("nemo_toolkit")
    way_out = (
        f'pip install "nemo_toolkit[core,common-only]=={version}" "{NEMO_LIGHTNING}", '
        f"or set {VARIABLE}=lightning to train without NeMo"
    )
    try:
        lightning_version = importlib.metadata.version("lightning")
    except importlib.metadata.PackageNotFoundError:
        lightning_version = "none"
    parts = tuple(int(p) for p in lightning_version.split(".")[:2] if p.isdigit())
    if not parts or parts > (2, 4):
        raise FrameworkError(
            f"nemo_toolkit {version} needs {NEMO_LIGHTNING}; installed is {lightning_version}: "
            f"{way_out}"
        )
    logging.getLogger("nv_one_logger").setLevel(logging.ERROR)  # telemetry that is off says so
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model_pt = importlib.import_module("nemo.core.classes.modelPT").ModelPT
            manager = importlib.import_module("nemo.utils.exp_manager").exp_manager
            nemo_logging = importlib.import_module("nemo.utils").logging
    except Exception as error:
        raise FrameworkError(
            f"nemo_toolkit {version} is installed but does not import "
            f"({type(error).__name__}: {error}): {way_out}"
        ) from error
    nemo_logging.setLevel(logging.ERROR)
    return model_pt, manager


def _import_lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        root = name.split(".")[0]
        if importlib.util.find_spec(root) is not None:
            return importlib.import_module(name)
    raise FrameworkError(
        "training needs PyTorch Lightning: pip install pytorch-lightning "
        "(or NeMo: pip install nemo_toolkit)"
    )


def _nemo_installed() -> bool:
    try:
        importlib.metadata.version("nemo_toolkit")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if _choice() == "nemo" and not _nemo_installed():
    raise FrameworkError(f"{VARIABLE}=nemo, but nemo_toolkit is not installed")

USES_NEMO = _choice() != "lightning" and _nemo_installed()
"""True if NeMo's ModelPT and exp_manager drive training."""

if USES_NEMO:
    _ModelPT, _exp_manager = _import_nemo()
pl = _import_lightning()
"""The Lightning namespace of this process."""

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
else:
    Trainer = pl.Trainer
    LightningModule = pl.LightningModule

ModelBase: Any = _ModelPT if USES_NEMO else LightningModule
"""Base class of ``DeepSeekModel``."""
Callback: Any = pl.Callback
"""Base class of ``DeepSeekCallback``, which has the types."""


class Unprofiled(pl.profilers.Profiler):  # type: ignore[misc, name-defined]
    """Of a trainer that measures nothing. Lightning's own one without effect makes a generator for
    every hook of every callback, fifty a step."""

    _NOTHING = nullcontext()

    def start(self, action_name: str) -> None:
        """Nothing."""

    def stop(self, action_name: str) -> None:
        """Nothing."""

    def profile(self, action_name: str) -> Any:
        """The same empty context for all."""
        return self._NOTHING


def model_config(section: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """The ``model`` section of a run, in whatever form a framework hands it over.

    NeMo's is a DictConfig with keys of its own beside ours; these are left out.
    """
    if isinstance(section, ModelConfig):
        return section
    names = {field.name for field in fields(ModelConfig)}
    return stored_config({"model": {key: section[key] for key in section if key in names}}).model


def nemo_config(model: ModelConfig) -> Any:
    """``model`` as NeMo's ModelPT wants it: a DictConfig, without types since it adds keys."""
    from omegaconf import OmegaConf  # comes with NeMo

    return OmegaConf.create({**asdict(model), "target": NEMO_TARGET})


def framework_name() -> str:
    """For people: which framework, and which version."""
    if USES_NEMO:
        version = importlib.metadata.version("nemo_toolkit")
        return f"NeMo {version} (Lightning {pl.__version__})"
    return f"PyTorch Lightning {pl.__version__}"


def remote_loggers(
    folder: Path, run: RunConfig, tell: Callable[[str], None]
) -> dict[str, Callable[[], Any]]:
    """What opens the loggers that may want a network, by name.

    They are not the trainer's, which would wait for them and end with them.

    Args:
        folder: of the run; what they write lies here.
        run: which ones, where they write to, and what is shown beside the curves.
        tell: called with what the user should know.

    Raises:
        UserError: a package is missing.
    """
    found: dict[str, Callable[[], Any]] = {}
    name, manager, config = run.name, run.exp_manager, asdict(run)
    if manager.create_wandb_logger:
        _need("wandb", "create_wandb_logger")
        wandb = manager.wandb_logger_kwargs
        found["WandbLogger"] = lambda: _opened(
            "WandbLogger",
            config,
            project=wandb.project or name,
            name=wandb.name or folder.name,
            offline=wandb.offline or not _wandb_answers(tell),
            save_dir=str(folder),
        )
    if manager.create_mlflow_logger:
        _need("mlflow", "create_mlflow_logger")
        mlflow = manager.mlflow_logger_kwargs
        uri = mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:  # since 3.17 MLflow writes plain files only if told so
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        found["MLFlowLogger"] = lambda: _opened(
            "MLFlowLogger",
            config,
            experiment_name=mlflow.experiment_name or name,
            run_name=mlflow.run_name or folder.name,
            tracking_uri=uri,
            save_dir=str(folder / "mlruns"),
        )
    return found


ANSWER_SECONDS = 5.0
"""For the server of Weights & Biases, before its logger is opened."""
FINISH_SECONDS = "4"
"""For its last uploads; what is left then is in the run folder."""


def _wandb_answers(tell: Callable[[str], None]) -> bool:
    """Whether there is a server to write to: without one, the package would try for ever, and keep
    the process from ending."""
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)  # should it go away later
    if os.environ.get("WANDB_MODE", "online") != "online":
        return True  # the user's own choice
    wandb = importlib.import_module("wandb")
    # The last one registered is the first one called: one comes before the package's own, which
    # may wait for ever, and one after it, since its service may live on and hold our output open.
    atexit.register(_end_wandb_service)
    url = wandb.setup().settings.base_url
    atexit.register(lambda: threading.Thread(target=_end_wandb_late, daemon=True).start())
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, http.client.HTTPException) as error:
        tell(
            f"WandbLogger: {url} does not answer ({error}); the curves are kept in the run folder, "
            "and `wandb sync` sends them"
        )
        return False
    return True


def _end_wandb_service() -> None:
    """Let the process, and what reads its output, end: the service tries on without a network."""
    for listing in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # what has ended meanwhile
            for child in listing.read_text().split():
                if "wandb" in Path(f"/proc/{child}/comm").read_text():
                    os.kill(int(child), signal.SIGKILL)


def _end_wandb_late() -> None:
    """Where the run ended while the service was still being opened, the package waits for ever."""
    time.sleep(ANSWER_SECONDS)
    _end_wandb_service()


def _need(package: str, key: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"exp_manager.{key}=true, but {package} is not installed: pip install {package}, or "
            "set it to false; metrics.jsonl in the run folder has all there is"
        )


def _opened(kind: str, config: Any, **settings: Any) -> Any:
    logger = getattr(importlib.import_module(f"{pl.__name__}.loggers"), kind)(**settings)
    logger.log_hyperparams(config)
    return logger


def attach_loggers(trainer: Trainer, folder: Path, tensorboard: bool) -> None:
    """Give the trainer its loggers: by NeMo's exp_manager, or the same TensorBoard files without.

    Checkpoints and resuming are ours under both, so exp_manager's are switched off. The folder must
    be for loggers alone: at each start exp_manager moves every file in it into ``run_N``.
    """
    if USES_NEMO:
        # It warns of any strategy but DDP, and of nodes without Slurm; both are ours and tested.
        logging.getLogger("nemo_logger").addFilter(
            lambda record: "not tested in NeMo" not in record.getMessage()
        )
        _exp_manager(
            trainer,
            {
                "explicit_log_dir": str(folder),
                "create_tensorboard_logger": tensorboard,
                "create_checkpoint_callback": False,
                "create_preemption_callback": False,
                "resume_if_exists": False,
                "disable_validation_on_resume": False,
                "log_step_timing": False,
                "log_tflops_per_sec_per_gpu": False,
            },
        )
    elif tensorboard:
        loggers = importlib.import_module(f"{pl.__name__}.loggers")
        trainer.loggers = [loggers.TensorBoardLogger(str(folder), name="", version="")]
