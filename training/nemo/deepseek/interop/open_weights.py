"""Weights that exist: opened for a command, or to start a run from.

A checkpoint of ours or a ``.nemo`` file. Where it holds adapters, they are put on the weights that
they were trained on, or merged into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint.checkpoint import Checkpoint, newest_sound
from deepseek.checkpoint.manifest import MANIFEST
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.training_state import Base, load_adapters, load_weights
from deepseek.config import RunConfig
from deepseek.config.errors import ConfigError, UserError
from deepseek.config.load import stored_config
from deepseek.config.schema import ModelConfig
from deepseek.console import complain
from deepseek.data.blend import BlendedDataset
from deepseek.data.dataset import ChatDataset, PackedDataset
from deepseek.data.digests import Verification
from deepseek.data.open_data import open_data
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_files import generation_config, load_tokenizer
from deepseek.interop.hf_config import COMPUTED_KEYS
from deepseek.interop.nemo_file import SUFFIX, NemoFile
from deepseek.models.components.lora import is_adapter, merged_state
from deepseek.models.transformer import Transformer, global_name
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was found sound, and what belongs to it."""

    path: Path
    checkpoint: Checkpoint
    config: RunConfig
    run: Path | None
    """Its run folder, if it lies in one."""

    @property
    def step(self) -> int:
        return self.checkpoint.step

    def model(self) -> Transformer:
        """The model with its weights, adapters merged."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_whole(self.checkpoint, self.config.model, device).eval()

    def tokenizer(self, given: Path | None = None) -> Tokenizer | None:
        """The ``given`` one, else that in its run folder, which may have none."""
        if given is None:
            if self.run is None or not (self.run / TOKENIZER).is_dir():
                return None
            given = self.run / TOKENIZER
        read = load_tokenizer(given)
        return read if read.generation else read.with_generation(self.generation)

    @property
    def generation(self) -> dict[str, Any]:
        """The ``generation_config.json`` of a model that was imported without its tokenizer."""
        return generation_config(self.run) if self.run is not None else {}

    def validation_parts(
        self, checks: list[Verification]
    ) -> list[tuple[str, PackedDataset | ChatDataset]]:
        """What the run validates on: name and data of each prefix.

        Args:
            checks: gets the comparison of the run's data with their digests.

        Raises:
            UserError: it does not validate, or its data differ.
        """
        data = open_data(self.config.model, self.config.seed)
        checks.append(Verification.begun(data.verification.files))
        validation = data.validation
        if validation is None:
            raise UserError(
                f"{self.path}: the run has no validation data "
                "(model.data.validation_fraction=0); give --data"
            )
        parts = validation.datasets if isinstance(validation, BlendedDataset) else [validation]
        prefixes = [part.indexed.prefix for part in parts]
        short = len({prefix.name for prefix in prefixes}) == len(prefixes)
        names = [prefix.name if short else str(prefix) for prefix in prefixes]
        return list(zip(names, parts, strict=True))


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """The newest sound checkpoint of a run folder, the checkpoint ``path`` itself, or a ``.nemo``
    file."""
    if path.is_file() and path.suffix != SUFFIX:
        raise UserError(f"{path} is no run folder but a file; give a folder, or a {SUFFIX} file")
    if path.is_file() or (path / MANIFEST).is_file():
        return with_config(open_weights(path))
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a run folder, or a checkpoint in its {CHECKPOINTS}/"
        )
    if not (path / CONFIG_FILE).is_file() and not (path / CHECKPOINTS).is_dir():
        raise UserError(
            f"{path} is neither a run folder (it has no {CONFIG_FILE}) nor a checkpoint (it has no "
            f"{MANIFEST}); `deepseek train` prints the run folder at its start and end"
        )
    checkpoint = newest_sound(path / CHECKPOINTS, complain)
    if checkpoint is None:
        raise UserError(f"{path / CHECKPOINTS} holds no checkpoint yet; train first")
    return with_config(checkpoint)


def with_config(checkpoint: Checkpoint) -> OpenedCheckpoint:
    """The configuration is the one the checkpoint was written with."""
    try:
        config = stored_config(checkpoint.state()["config"])
    except (KeyError, ConfigError) as error:
        raise UserError(
            f"{checkpoint.path}: its configuration is not of this version ({error}); use the "
            "version that wrote it"
        ) from error
    folder = checkpoint.path.resolve().parent
    run = folder.parent if folder.name == CHECKPOINTS else None
    return OpenedCheckpoint(checkpoint.path, checkpoint, config, run)


def open_weights(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """A checkpoint, whether a folder of ours or a ``.nemo`` file; a collective over ``ranks``."""
    return (NemoFile if path.suffix == SUFFIX else Checkpoint).open(path, ranks)


def load_whole(checkpoint: Checkpoint, config: ModelConfig, device: str = "cpu") -> Transformer:
    """The model that a checkpoint is of, for inference; a run's adapters are merged.

    Args:
        checkpoint: of a run.
        config: the run's.
        device: where the weights go.

    Raises:
        UserError: the base of adapters is gone, or is not what they were trained on.
    """
    if config.peft is None:
        model = _blank(config, device)
        load_weights(checkpoint, model)
        return model
    adapted = load_adapted(checkpoint, config, device)
    model = _blank(replace(config, peft=None), device)
    model.load_state_dict(merged_state(adapted), assign=True)
    return model


def load_adapted(checkpoint: Checkpoint, config: ModelConfig, device: str = "cpu") -> Transformer:
    """The base with the adapters of ``checkpoint`` beside it. Raises as ``load_whole``."""
    assert config.peft is not None
    model = _blank(replace(config, peft=replace(config.peft, base_dtype=None)), device)
    base, run = base_of(checkpoint), checkpoint.path.resolve().parent.parent
    load_weights(open_base(base, checkpoint.ranks, config.restore_from, run), model)
    load_adapters(checkpoint, model)
    return model


def base_of(checkpoint: Checkpoint) -> Base:
    """Which checkpoint lies below these adapters."""
    recorded = checkpoint.state().get("base")
    if recorded is None:
        raise UserError(f"{checkpoint.path} does not say what its adapters were trained on")
    return Base(**recorded)


def open_base(base: Base, ranks: Ranks, given: str | None, run: Path | None = None) -> Checkpoint:
    """The checkpoint below adapters, as it was when they were trained.

    Args:
        base: what is recorded.
        ranks: that open it together.
        given: ``model.restore_from``, where it is looked for if it is not where it was; also
            relative to ``run``.
        run: folder of the adapters' run: both may have been moved together.

    Raises:
        UserError: it is gone, or has changed.
    """
    return open_weights(ranks.lead(lambda: _found(base, given, run)), ranks)


def _found(base: Base, given: str | None, run: Path | None) -> Path:
    places = [Path(base.path)]
    if given is not None:
        for folder in (Path(given), *([run / given] if run is not None else [])):
            places += [folder, *sorted(folder.glob(f"{CHECKPOINTS}/step_*"))]
    if run is not None:  # RUN/checkpoints/STEP, or NAME.nemo, beside this run
        parts = Path(base.path).parts
        places += [run.parent.joinpath(*parts[-depth:]) for depth in (3, 1)]
    there = [place for place in places if place.is_file() or (place / MANIFEST).is_file()]
    for place in there:
        if Base.of(place).sha256 == base.sha256:
            return place
    if there:
        raise UserError(
            f"{there[0]} is not the checkpoint that the adapters were trained on: its digest is "
            f"{Base.of(there[0]).sha256[:12]} instead of {base.sha256[:12]}; put the one of "
            f"{base.path} back, or set model.restore_from to where it is"
        )
    raise UserError(
        f"the adapters were trained on top of the weights in {base.path}, and there is no "
        "checkpoint there; put it back, or set model.restore_from to where it is"
    )


def _blank(config: ModelConfig, device: str) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    return model.to_empty(device=device)


def fill_start(module: Any, source: Path, report: Callable[[str], None]) -> None:
    """Fill the model of a run before its first step, in any layout; a collective.

    A run that was resumed keeps its own weights; one with adapters gets the weights below them,
    the same ones as before. Steps, data and optimiser start anew.

    Args:
        module: the run's ``DeepSeekModel``, after its own checkpoint was restored.
        source: ``model.restore_from``: a checkpoint, a folder with ``checkpoints/``, or a ``.nemo``
            file.
        report: where messages go; called on rank 0 only.

    Raises:
        UserError: no sound checkpoint, or it is of another model.
    """
    ranks = Ranks()

    def say(message: str) -> None:
        if ranks.rank == 0:
            report(message)

    adapted = module.config.peft is not None
    if module.finished_steps > 0 and not adapted:
        say(
            f"model.restore_from={source} is ignored: the run goes on from its own checkpoint of "
            f"step {module.finished_steps}"
        )
        return
    if adapted and module.base is not None:  # a resumed run: what is recorded
        checkpoint = open_base(module.base, ranks, str(source))
    elif ranks.lead(lambda: source.is_file() or (source / MANIFEST).is_file()):
        checkpoint = open_weights(source, ranks)
    else:
        newest = newest_sound(source / CHECKPOINTS, report, ranks)
        if newest is None:
            raise UserError(f"model.restore_from={source}: there is no checkpoint in it any more")
        checkpoint = newest
    if any(is_adapter(name) for name in checkpoint.tensor_names()):
        raise UserError(
            f"{checkpoint.path} holds adapters; `deepseek lora merge RUN DIR` makes one model of "
            "them and the weights below, to start from"
        )
    mine = [f"model.{global_name(name)}" for name in module.model.state_dict()]
    known = checkpoint.ranks.together(lambda: mine)
    try:
        left = _unused(checkpoint, {name for names in known for name in names})
        for note in _differences(checkpoint.state(), asdict(module.config)):
            say(note)
        load_weights(checkpoint, module.model)
    except UserError as error:
        own = checkpoint.path.absolute().parent.parent / CONFIG_FILE
        if not own.is_file():
            raise
        raise UserError(
            f"{error}\n--config {own} has the model section of these weights"
        ) from error
    if adapted:
        module.base = ranks.lead(lambda: Base.of(checkpoint.path))
    say(f"{'adapters on' if adapted else 'started from'} the weights of {checkpoint.path}")
    if left:
        say(f"not used: its {left} tensors of MTP modules, which this model lacks")


def _differences(state: dict[str, Any], mine: dict[str, Any]) -> Iterator[str]:
    """Settings under which the weights would compute something else than they did."""
    theirs = state.get("config", {}).get("model", {})
    for key in sorted(COMPUTED_KEYS & theirs.keys()):
        if theirs[key] != mine[key]:
            yield (
                f"note: the weights were made with model.{key}={theirs[key]}, this run has "
                f"{mine[key]}"
            )


def _unused(checkpoint: Checkpoint, known: set[str]) -> int:
    """How many weights no rank has a place for; only MTP modules may be left out."""
    left = [
        name
        for name in checkpoint.tensor_names()
        if name.startswith("model.") and name not in known
    ]
    foreign = [name for name in left if not name.startswith("model.mtp.")]
    if foreign:
        raise UserError(
            f"{checkpoint.path} holds {len(foreign)} weights that this model does not have, such "
            f"as {foreign[0]}; use the model section that it was made with"
        )
    return len(left)
