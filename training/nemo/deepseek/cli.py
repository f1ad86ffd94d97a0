"""The command line: ``deepseek VERB``. It parses and calls; the work is in ``commands``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from deepseek import __version__
from deepseek.commands.entry import chosen, guarded, refuse_idle, refuse_words

app = typer.Typer(
    name="deepseek",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _names(incomplete: str) -> list[str]:
    """Shipped configurations, for completion in a shell."""
    from deepseek.config import shipped_configs

    return [name for name in shipped_configs() if name.startswith(incomplete)]


def _words(incomplete: str) -> list[str]:
    """Shipped configurations, and keys of settings."""
    from deepseek.config.schema import LEAVES

    keys = [f"{key}=" for key in LEAVES if key.startswith(incomplete)]
    return [*_names(incomplete), *(keys if incomplete else [])]


Config = Annotated[
    str | None,
    typer.Option(help="Name of a shipped configuration, or a YAML file.", autocompletion=_names),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [a.b=c ...]",
        help="The configuration, if not given by --config, and settings that override it.",
        autocompletion=_words,
    ),
]
ConfigAndFile = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] OUTPUT [a.b=c ...]",
        help="The configuration, if not given by --config; the new file; settings.",
        autocompletion=_words,
    ),
]
Bare = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG]", help="The configuration, as with --config.", autocompletion=_names
    ),
]
PASS_ON = {"ignore_unknown_options": True}  # `--a.b=c` is an override too


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepseek {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train DeepSeek-V3-class models from one YAML file, on a laptop or a cluster."""


@app.command("train", context_settings=PASS_ON)
def train_command(
    words: Words = None,
    config: Config = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or to be continued; none: EXP_DIR/NAME/version_N."),
    ] = None,
    sample: Annotated[bool, typer.Option(help="Print a generated sample at the end.")] = False,
    report: Annotated[bool, typer.Option(help="Write the run's report at the end.")] = False,
    resume_from: Annotated[
        int | None,
        typer.Option(help="With --run-dir: go back to the checkpoint of this step.", min=0),
    ] = None,
    resume_with_changes: Annotated[
        bool, typer.Option(help="Go on although what the run computes changes.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log what each rank applies to the model.")
    ] = False,
) -> None:
    """Train, or continue, a run; without a configuration one of deepseek_v3_tiny."""
    from deepseek.commands.train import train

    if verbose:
        logging.basicConfig(format=f"rank {os.environ.get('RANK', 0):<7} %(message)s")
        logging.getLogger("deepseek").setLevel(logging.INFO)

    name, overrides = chosen(words or [], config, "deepseek_v3_tiny")
    train(name, overrides, run_dir, sample, report, resume_from, resume_with_changes)


@app.command("sweep", context_settings=PASS_ON)
def sweep_command(
    words: Words = None,
    config: Config = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs; none: EXP_DIR/NAME/sweep.")
    ] = None,
    only: Annotated[int | None, typer.Option(help="Number of the one run to do, from 0.")] = None,
    slurm: Annotated[
        Path | None, typer.Option(help="Write a job array for sbatch to this file instead.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="With --slurm: time limit of a run.")] = None,
    partition: Annotated[str | None, typer.Option(help="With --slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="With --slurm: account.")] = None,
    resume_with_changes: Annotated[
        bool, typer.Option(help="Take runs that other settings have left, and go on with them.")
    ] = False,
) -> None:
    """Run a grid, such as model.optim.lr=1e-3,2e-3 seed=1,2, skip what is done, compare."""
    from deepseek.commands.sweep import sweep
    from deepseek.launch.cluster_job import JobSettings

    of_jobs = {"--time": time, "--partition": partition, "--account": account}
    if slurm is None:
        refuse_idle({key: value is not None for key, value in of_jobs.items()}, "without --slurm")
    settings = JobSettings(time, partition, account)
    name, grid = chosen(words or [], config, "deepseek_v3_tiny")
    sweep(name, grid, output, only, slurm, settings, resume_with_changes)


@app.command("test")
def test_command(name: Bare = None, config: Config = None) -> None:
    """Check the model: shapes, causality, routing, gradients, agreement with the reference."""
    from deepseek.commands.check import test_model

    config, words = chosen(name or [], config, "deepseek_v3_tiny")
    refuse_words(words)
    raise typer.Exit(0 if test_model(config) else 1)


@app.command("validate", context_settings=PASS_ON)
def validate_command(
    words: Words = None,
    config: Config = None,
    world: Annotated[
        int | None,
        typer.Option(help="As on so many processes, which need not be there; none: as configured."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU, to see whether ranks fit.", metavar="GIB")
    ] = None,
) -> None:
    """Print every error of a configuration; of a sound one, its numbers and what lies where."""
    from deepseek.commands.auto_layout import auto_layout
    from deepseek.commands.validate import validate

    of_run = chosen(words or [], config, "deepseek_v3_tiny")
    validate(*of_run, world, memory, auto_layout())


@app.command("estimate", context_settings=PASS_ON)
def estimate_command(
    words: Words = None,
    config: Config = None,
    gpu: Annotated[
        str, typer.Option(help="H100, H800, B200, GB200, ..., cpu, or a file of calibrate.")
    ] = "H100",
    gpus: Annotated[int | None, typer.Option(help="Their number; none: as configured.")] = None,
    published: Annotated[
        Path | None,
        typer.Option(help="JSON list of published runs: predict each of them instead."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tell what one layout computes, holds, sends and takes on GPUs that need not be there."""
    from deepseek.commands.estimate import estimate, estimate_published

    if published is None:
        name, settings = chosen(words or [], config)
        estimate(name, settings, gpu, gpus, as_json)
        return
    given = {"--config": config is not None, "--gpus": gpus is not None, "--json": as_json}
    refuse_idle({**given, "--gpu": gpu != "H100"}, "with --published, which prints JSON")
    refuse_words(words or [])
    estimate_published(published)


@app.command("plan", context_settings=PASS_ON)
def plan_command(
    words: Words = None,
    config: Config = None,
    gpu: Annotated[
        str, typer.Option(help="H100, H800, B200, ..., cpu, or a file of calibrate.")
    ] = "H100",
    nodes: Annotated[int | None, typer.Option(help="Nodes; none: as configured.", min=1)] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of a node; none: as configured, or 8.", min=1)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU; none: of its data sheet.", metavar="GIB")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of the training; none: of the configured steps.")
    ] = None,
    top: Annotated[int, typer.Option(help="Number of layouts to show.", min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write the best to this new file, for train and validate.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show where seconds and bytes of the best go.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Draw the best: pipeline and memory, into this new file.")
    ] = None,
) -> None:
    """Find the fastest layouts of a model on GPUs that need not be there, and their cost."""
    from deepseek.commands.plan import plan

    if as_json:
        refuse_idle({"--explain": explain}, "with --json, which has all of it")
    name, settings = chosen(words or [], config)
    of_cluster = gpu, nodes, gpus_per_node, memory
    plan(name, settings, *of_cluster, tokens, top, as_json, write, explain, html)


@app.command("calibrate")
def calibrate_command(
    output: Annotated[
        Path | None,
        typer.Option(help="New file for --gpu; none: that of --gpu cpu."),
    ] = None,
) -> None:
    """Measure this machine's CPU, for estimate and plan; two minutes or more."""
    from deepseek.commands.calibrate import calibrate

    calibrate(output)


@app.command("scaling", context_settings=PASS_ON)
def scaling_command(
    words: Words = None,
    config: Config = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as H100, H800 or B200.")] = "H100",
    nodes: Annotated[
        int | None, typer.Option(help="Nodes of the smallest cluster; none: as configured.", min=1)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of a node; none: as configured, or 8.", min=1)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU; none: of its data sheet.", metavar="GIB")
    ] = None,
    up_to: Annotated[int, typer.Option(help="GPUs of the largest cluster.", min=1)] = 16384,
    mtbf_hours: Annotated[
        float, typer.Option(help="Mean hours between failures of one GPU.", min=1)
    ] = 50_700.0,
    write_rate: Annotated[
        float, typer.Option(help="GB/s that each GPU writes of a checkpoint.", min=1e-3)
    ] = 0.5,
    restart: Annotated[
        float, typer.Option(help="Seconds to start again after a failure.", min=0)
    ] = 600.0,
    output: Annotated[
        Path | None, typer.Option(help="Draw the curves into this new SVG file.")
    ] = None,
) -> None:
    """Follow a training to thousands of GPUs on paper: speed, what limits it, failures."""
    from deepseek.commands.scaling import scaling
    from deepseek.planner.scaling_curve import Failures

    name, settings = chosen(words or [], config)
    failures = Failures(mtbf_hours, write_rate * 1e9, restart)
    scaling(name, settings, gpu, nodes, gpus_per_node, memory, up_to, failures, output)


@app.command("launch", context_settings=PASS_ON)
def launch_command(
    words: Words = None,
    config: Config = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a job for sbatch.")] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Write a PyTorchJob (Kubeflow).")
    ] = False,
    jobset: Annotated[
        bool, typer.Option("--jobset", help="Write a JobSet for Kubernetes.")
    ] = False,
    skypilot: Annotated[
        bool, typer.Option("--skypilot", help="Write a task for SkyPilot.")
    ] = False,
    nemo_run: Annotated[
        bool, typer.Option("--nemo-run", help="Submit through NeMo-Run, which must be installed.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="File of the job; none: print it.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, such as 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name of the job; none: the run's.")] = None,
    container: Annotated[
        str | None, typer.Option(help="Image in which to train; with Slurm through pyxis.")
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(help="SOURCE:/PATH in the container: a folder, claim or bucket. Repeatable."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of the environment. Repeatable.")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="One more option of sbatch, --qos=high. Repeatable.")
    ] = None,
    exclusive: Annotated[
        bool | None,
        typer.Option("--exclusive/--no-exclusive", help="Whole nodes; none: if several."),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="With --skypilot: kind of GPU.")] = None,
    save_bandwidth: Annotated[
        float, typer.Option(help="GB/s that a node writes: when to save before the limit.")
    ] = 1.0,
) -> None:
    """Start a run on a cluster: write the file that Slurm, Kubernetes or SkyPilot takes."""
    from deepseek.commands.launch import launch
    from deepseek.launch.cluster_job import JobSettings

    settings = JobSettings(
        time,
        partition,
        account,
        job_name,
        container,
        mount or (),
        env or (),
        sbatch or (),
        exclusive,
        gpu,
        save_bandwidth,
    )
    flags = {"slurm": slurm, "kubernetes": kubernetes, "jobset": jobset, "skypilot": skypilot}
    flags["nemo-run"] = nemo_run
    targets = [name for name, is_chosen in flags.items() if is_chosen]
    launch(*chosen(words or [], config), settings, targets, output)


@app.command("doctor", context_settings=PASS_ON)
def doctor_command(
    words: Words = None,
    config: Config = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where the run is to write.")] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Processes to start; none: trainer.devices.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at devices, memory, disk, and with several processes at clocks and bandwidth."""
    from deepseek.commands.doctor import doctor

    doctor(*chosen(words or [], config, "deepseek_v3_tiny"), run_dir, devices, json_)


@app.command("prepare-data")
def prepare_data_command(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Text, .jsonl or .parquet files or folders, also compressed; none: the built-in "
            "corpus."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Prefix P of the files P.bin and P.idx.")] = Path(
        "data/corpus"
    ),
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or a folder holding one; none: train one.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of the tokenizer that is trained.")] = 4096,
    json_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    append_eos: Annotated[bool, typer.Option(help="End each document with the end token.")] = True,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin documents with a token; none: as the tokenizer."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Read conversations, and mark their answers.")
    ] = False,
    answers: Annotated[
        str | None, typer.Option(help="With --chat: all answers are learnt, or the last.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse folders of which something is left out.")
    ] = False,
) -> None:
    """Turn text into training data (Megatron .bin/.idx), training a tokenizer if none is given."""
    from deepseek.commands.prepare_data import prepare_chat_data, prepare_data

    text_only = {
        "--vocab-size": vocab_size != 4096,
        "--json-key": json_key != "text",
        "--workers": workers != 0,
        "--no-append-eos": not append_eos,
        "--bos": bos is not None,
    }
    if not chat:
        refuse_idle({"--answers": answers is not None}, "without --chat")
    if chat:
        refuse_idle(text_only, "with --chat")
        prepare_chat_data(inputs, output, tokenizer, answers or "all", strict=strict)
        return
    refuse_idle({"--strict": strict and not inputs}, "without folders")
    text = (vocab_size, json_key, workers, append_eos, bos)
    prepare_data(inputs or None, output, tokenizer, *text, strict=strict)


@app.command("docs")
def docs_command() -> None:
    """Print the folder of the guides, which are Markdown files."""
    typer.echo(Path(__file__).parent / "docs")


data = typer.Typer(help="Prepared training data.", no_args_is_help=True)
app.add_typer(data, name="data")


@data.command("verify")
def data_verify_command(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefixes P of P.bin, P.idx and P.json.")],
) -> None:
    """Compare data with the digests that prepare-data recorded; name the blocks that differ."""
    from deepseek.commands.prepare_data import verify_data

    verify_data(prefixes)


@app.command("generate")
def generate_command(
    run: Annotated[
        Path,
        typer.Argument(help="A run folder, a checkpoint, a .nemo file, or Hugging Face files."),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to draw.")] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: the most probable token; none: generation_config.json's, or 0.8."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from the k most probable tokens, 0: all; none: the file's, or 0."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the fewest that have this probability; none: the file's, or 0.95."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Prompts are questions; none, on a terminal: a conversation."),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File with a prompt a line, or .jsonl with prompt or messages; - : stdin."
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
    draft: Annotated[
        str | None, typer.Option(help="mtp: speculative decoding with the model's MTP modules.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or its folder; none: the one there.")
    ] = None,
) -> None:
    """Continue prompts, or with --chat answer them, with a run's newest checkpoint."""
    from deepseek.commands.generate import generate_text

    drawn = (max_new_tokens, temperature, top_k, top_p, seed)
    generate_text(
        run,
        prompt or [],
        *drawn,
        chat,
        prompts_file=prompts,
        stop=stop or [],
        as_json=as_json,
        draft=draft,
        tokenizer=tokenizer,
    )


@app.command("eval")
def eval_command(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Domain name=path: text or a prefix; may be repeated. None: validation data."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Ids read together; none: model.data.seq_length.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="From one window to the next; none: half of it.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Ids of each domain; none: all.")] = None,
    json_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every document.")
    ] = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a checkpoint on texts of several kinds."""
    from deepseek.commands.evaluate import evaluate

    evaluate(run, data or [], window, stride, tokens, json_key, as_json)


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are also compared.")],
    output: Annotated[
        Path | None, typer.Option(help="The file; none: report.html in the first run folder.")
    ] = None,
) -> None:
    """Draw a run: losses, experts, communication, time, memory, as one HTML file."""
    from deepseek.commands.report import report

    report(runs, output)


@app.command("monitor")
def monitor_command(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may be going on.")],
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Serve the report on this machine instead.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port of --web; 0: any free one.", min=0, max=65535)
    ] = 0,
    every: Annotated[float, typer.Option(help="Seconds between frames.")] = 2.0,
) -> None:
    """Watch a run: in the terminal, or as a report in a browser that renews itself."""
    from deepseek.commands.monitor import monitor

    monitor(run, once, web, port, every)


@app.command("experts")
def experts_command(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Domain name=path: text or a prefix; may be repeated."),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint or run folder to compare with; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens read of each domain.")] = 32_768,
    output: Annotated[
        Path | None, typer.Option(help=".html or .json; none: routing.html in the run folder.")
    ] = None,
    minimum: Annotated[int, typer.Option(help="Occurrences from which a token is counted.")] = 16,
    json_key: Annotated[str, typer.Option(help="Key or column of the text.")] = "text",
) -> None:
    """Show what the experts of a checkpoint do with texts of several kinds."""
    from deepseek.commands.experts import experts

    experts(run, data or [], against or [], tokens, output, minimum, json_key)


hf = typer.Typer(help="Hugging Face files in and out.", no_args_is_help=True)
app.add_typer(hf, name="hf")
Mtp = Annotated[str, typer.Option(help="Multi-token-prediction modules: keep or drop.")]


@hf.command("import")
def hf_import_command(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(help="New folder: checkpoint, config, tokenizer.")],
    mtp: Mtp = "keep",
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json or its folder; none: the source's.")
    ] = None,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(help="Key of config.json that does not change the model; may be repeated."),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(help="Rows of embedding and head that do not fit: pad or trim; none: refuse."),
    ] = None,
) -> None:
    """Turn Hugging Face weights into a folder that train, generate and experts read."""
    from deepseek.commands.convert import import_hf

    import_hf(source, target, mtp, tokenizer, ignore_key or [], vocab)


@hf.command("config")
def hf_config_command(
    source: Annotated[
        Path, typer.Argument(help="config.json, its folder, or JSON of DeepSeek's inference code.")
    ],
    output: Annotated[Path, typer.Argument(help="New YAML file.")],
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(help="Key of config.json that does not change the model; may be repeated."),
    ] = None,
) -> None:
    """Write the configuration of a model that config.json describes."""
    from deepseek.commands.convert import config_of_hf

    config_of_hf(source, output, ignore_key or [])


@hf.command("export")
def hf_export_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder.")],
    target: Annotated[Path, typer.Argument(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="fp32, every bit kept, bf16, or fp8.")] = "fp32",
    mtp: Mtp = "keep",
    shard_gb: Annotated[float, typer.Option(help="Largest file, GB.")] = 5.0,
) -> None:
    """Write a checkpoint as Hugging Face files."""
    from deepseek.commands.convert import export_hf

    export_hf(checkpoint, target, dtype, mtp, shard_gb)


nemo = typer.Typer(help="NVIDIA NeMo's files.", no_args_is_help=True)
app.add_typer(nemo, name="nemo")


@nemo.command("export")
def nemo_export_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder.")],
    target: Annotated[Path, typer.Argument(help="New file, NAME.nemo.")],
) -> None:
    """Write a checkpoint of any layout as one .nemo file."""
    from deepseek.commands.convert import export_nemo

    export_nemo(checkpoint, target)


emitting = typer.Typer(
    help="A configuration in the words of NVIDIA's other programs.", no_args_is_help=True
)
app.add_typer(emitting, name="emit")


@emitting.command("automodel", context_settings=PASS_ON)
def emit_automodel_command(
    words: ConfigAndFile = None,
    config: Config = None,
) -> None:
    """Write a recipe of NeMo AutoModel, or say what it lacks."""
    from deepseek.interop.peer_configs import emit

    config, (output, *overrides) = chosen(words or [], config, then="the new file")
    emit("automodel", config, Path(output), overrides)


@emitting.command("megatron", context_settings=PASS_ON)
def emit_megatron_command(
    words: ConfigAndFile = None,
    config: Config = None,
) -> None:
    """Write the arguments of Megatron-Core's classes, or say what it lacks."""
    from deepseek.interop.peer_configs import emit

    config, (output, *overrides) = chosen(words or [], config, then="the new file")
    emit("megatron", config, Path(output), overrides)


lora = typer.Typer(help="Adapters of a run.", no_args_is_help=True)
app.add_typer(lora, name="lora")
Adapted = Annotated[Path, typer.Argument(help="A run folder with adapters, or its checkpoint.")]


@lora.command("export")
def lora_export_command(
    run: Adapted,
    target: Annotated[Path, typer.Argument(help="New folder.")],
    base: Annotated[
        str | None, typer.Option(help="Hugging Face name or folder of the model below.")
    ] = None,
) -> None:
    """Write adapters as peft reads them."""
    from deepseek.commands.convert import export_lora

    export_lora(run, target, base)


@lora.command("merge")
def lora_merge_command(
    run: Adapted,
    target: Annotated[Path, typer.Argument(help="New folder: checkpoint, config, tokenizer.")],
) -> None:
    """Make one model of adapters and what is below them."""
    from deepseek.commands.convert import merge_lora

    merge_lora(run, target)


migrate = typer.Typer(help="From PyTorch FSDP to here, and back.", no_args_is_help=True)
app.add_typer(migrate, name="migrate")


@migrate.command("fsdp-checkpoint", context_settings=PASS_ON)
def migrate_checkpoint_command(
    source: Annotated[Path, typer.Argument(help="A .pt file, or a folder of DCP or accelerate.")],
    target: Annotated[Path, typer.Argument(help="The new run folder.")],
    words: Words = None,
    config: Config = None,
    names: Annotated[
        Path | None, typer.Option(help="Table of names; none: those of Hugging Face.")
    ] = None,
    write_names: Annotated[
        Path | None, typer.Option(help="Write that table here, to edit it, and stop.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Optimiser steps done; none: as the source says.")
    ] = None,
    optimizer: Annotated[
        Path | None, typer.Option(help="The optimiser's file or folder, if it lies apart.")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Start the optimiser anew.")
    ] = False,
) -> None:
    """Turn a checkpoint of FSDP into a run that `deepseek train` continues."""
    from deepseek.commands.migrate import migrate_checkpoint

    of_run = chosen(words or [], config)
    migrate_checkpoint(source, target, *of_run, names, write_names, step, optimizer, weights_only)


@migrate.command("to-fsdp")
def migrate_back_command(
    run: Annotated[Path, typer.Argument(help="A migrated run folder, or its checkpoint.")],
    target: Annotated[Path, typer.Argument(help="New file or folder.")],
    like: Annotated[
        Path | None, typer.Option(help="Migrated run folder whose form and names are taken.")
    ] = None,
) -> None:
    """Write a migrated run as the FSDP checkpoint that it came from: form, names, dtypes."""
    from deepseek.commands.migrate import export_to_fsdp

    export_to_fsdp(run, target, like)


@migrate.command("fsdp-config")
def migrate_config_command(
    file: Annotated[
        list[Path], typer.Argument(help="accelerate YAML, TrainingArguments as JSON or YAML.")
    ],
    output: Annotated[Path | None, typer.Option(help="File to write; none: print it.")] = None,
    extends: Annotated[
        str | None, typer.Option(help="Configuration that the result extends: the model's.")
    ] = None,
) -> None:
    """Turn settings of accelerate and the Hugging Face Trainer into a configuration."""
    from deepseek.interop.accelerate_settings import migrate_config

    migrate_config(file, output, extends)


@app.command("ls")
def ls_command(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A folder of runs, a run, or a checkpoint; none: configurations."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the digests of checkpoints: reads them.")
    ] = False,
) -> None:
    """List the shipped configurations, the runs in a folder, or the checkpoints of a run."""
    from deepseek.commands.runs import list_runs
    from deepseek.commands.shipped import list_configs

    if folder is not None:
        list_runs(folder, as_json, verify)
        return
    refuse_idle({"--json": as_json, "--verify": verify}, "without a folder")
    list_configs()


@app.command("rm")
def rm_command(
    paths: Annotated[list[Path], typer.Argument(help="Run folders, or checkpoints.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete runs or checkpoints; one that is being written or read is refused."""
    from deepseek.commands.runs import remove

    remove(paths, yes)


@app.command("cp")
def cp_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] TARGET",
            help="The shipped configuration, if not given by --config; the file to write.",
            autocompletion=_names,
        ),
    ] = None,
    config: Config = None,
) -> None:
    """Copy a shipped configuration to a file of your own, whose name the runs get."""
    from deepseek.commands.shipped import copy_config

    config, (target, *more) = chosen(words or [], config, then="the file to write")
    refuse_words(more)
    copy_config(config, Path(target))


@app.command("cat")
def cat_command(
    name: Bare = None,
    config: Config = None,
    resolved: Annotated[bool, typer.Option(help="Every key, after `extends`.")] = False,
) -> None:
    """Print a configuration."""
    from deepseek.commands.shipped import print_config

    config, words = chosen(name or [], config)
    refuse_words(words)
    print_config(config, resolved)


def main() -> None:
    """Entry point of the ``deepseek`` command."""
    guarded(lambda: app(prog_name="deepseek"))


if __name__ == "__main__":
    main()
