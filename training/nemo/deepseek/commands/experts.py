"""``deepseek experts``: what the routers of a checkpoint do with texts of several kinds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config import RunConfig
from deepseek.config.errors import UserError
from deepseek.console import StageProgress, complain, say, table
from deepseek.data.digests import Verification
from deepseek.data.tokenizer import Tokenizer
from deepseek.experts.analysis import (
    MEANING,
    Compared,
    DomainSize,
    KeptChoices,
    LayerRouting,
    RoutingAnalysis,
    RoutingCounts,
    dump,
    layer_routes,
    mean_saturation,
    read_routing,
)
from deepseek.experts.domains import Domain, built_in_domains, open_domains, packed_domain
from deepseek.files import write_whole
from deepseek.interop.open_weights import OpenedCheckpoint, open_checkpoint, with_config
from deepseek.run_folder import CHECKPOINTS

BATCH_TOKENS = 4096
"""Read in one forward pass, or one sequence if that is longer."""
COUNTED_WORDS = 2048
"""Vocabulary entries whose experts are counted: the most frequent ones."""
COMPARED_TOKENS = 65_536
"""Tokens that checkpoints are compared on: the first ones of every domain."""


def experts(
    run: Path,
    data: Sequence[str] = (),
    against: Sequence[Path] = (),
    tokens: int = 32_768,
    output: Path | None = None,
    minimum: int = 16,
    json_key: str = "text",
) -> RoutingAnalysis:
    """Analyse the routing of a checkpoint: a table on the terminal, and a page or JSON.

    Args:
        run: a run folder, of which the newest sound checkpoint is taken, or a checkpoint.
        data: domains, ``name=path``; a path holds text or prepared data (its prefix). None: the
            run's validation data; of the built-in corpus, its largest packages.
        against: checkpoints, or run folders, of which every other checkpoint is taken; router
            saturation is measured against each.
        tokens: read of each domain.
        output: ``.html`` for a page, ``.json`` for the data; None: ``routing.html`` in the run
            folder.
        minimum: occurrences from which a token's favourite experts are told.
        json_key: key or column of the text in .jsonl and .parquet files.

    Raises:
        UserError: no checkpoint, no experts in it, data that cannot be read, are not what
            prepare-data wrote or belong to another tokenizer, checkpoints that cannot be compared,
            an output that cannot be written.
    """
    for name, value in (("--tokens", tokens), ("--minimum", minimum)):
        if value < 1:
            raise UserError(f"{name} {value}: give at least 1")
    opened = open_checkpoint(run)
    target = _target(opened, output)
    others = [other for path in against for other in _others(path, opened)]
    config = opened.config.model
    model = opened.model()
    names = list(model.routers())
    if not names:
        raise UserError(
            f"{opened.path} has no experts: all {config.num_hidden_layers} blocks are dense "
            f"(model.first_k_dense_replace={config.first_k_dense_replace})"
        )
    tokenizer = opened.tokenizer()
    checks: list[Verification] = []
    domains = (
        open_domains(data, tokenizer, config.vocab_size, tokens, json_key, checks)
        if data
        else _own_domains(opened, tokenizer, tokens, checks)
    )
    counts = RoutingCounts(
        names,
        config.n_routed_experts,
        config.num_experts_per_tok,
        len(domains),
        _frequent(domains, minimum),
    )
    length = config.data.seq_length
    # Whole sequences, so that the beginning of a domain is routed alone as it is in the whole.
    share = max(1, COMPARED_TOKENS // len(domains) // length) * length
    kept = KeptChoices(share if others else 0)
    with StageProgress() as progress:
        for number, batches in _readings(domains, opened.config, progress, "reading"):
            _read(model, number, batches, counts, kept)
        del model
        compared = []
        beginnings = [domain.beginning(share) for domain in domains]
        for other in others:
            theirs = KeptChoices(share)
            model = other.model()
            stage = f"comparing step {other.step}"
            for number, batches in _readings(beginnings, opened.config, progress, stage):
                _read(model, number, batches, None, theirs)
            del model
            shares = [mean_saturation(kept, theirs, name, len(domains)) for name in names]
            compared.append(Compared(str(other.path), other.step, shares))
    for check in checks:
        if left := check.finish():
            complain(left)
    analysis = RoutingAnalysis(
        name=str(opened.path),
        step=opened.step,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        domains=[DomainSize(d.name, d.source, d.num_tokens) for d in domains],
        layers=layer_routes(counts, minimum),
        minimum=minimum,
        compared=sorted(compared, key=lambda other: other.step),
        compared_tokens=sum(d.num_tokens for d in beginnings) if others else 0,
        token_text=(lambda token: tokenizer.decode([token]))
        if tokenizer is not None
        else (lambda token: f"id {token}"),
    )
    _show(analysis)
    _write(analysis, target)
    say(f"routing      {target}")
    return analysis


def _others(path: Path, mine: OpenedCheckpoint) -> list[OpenedCheckpoint]:
    """The checkpoints to compare with; of a run folder all but the one that is analysed."""
    from deepseek.checkpoint.checkpoint import Checkpoint, describe

    here = mine.path.resolve()
    if (path / CHECKPOINTS).is_dir():
        found = []
        for summary in reversed(describe(path / CHECKPOINTS, digests=False)):
            if summary.problem is not None:
                complain(f"{summary.problem}; left out")
            elif summary.path.resolve() != here:
                found.append(with_config(Checkpoint.open(summary.path)))
        if not found:
            raise UserError(
                f"--against {path}: the run has no other sound checkpoint than {mine.path}; keep "
                "more with exp_manager.checkpoint_callback_params.save_top_k"
            )
    else:
        found = [open_checkpoint(path)]
        if found[0].path.resolve() == here:
            raise UserError(f"--against {path}: this is the checkpoint that is analysed")
    for other in found:
        _check_comparable(mine, other)
    return found


def _check_comparable(mine: OpenedCheckpoint, other: OpenedCheckpoint) -> None:
    """Both models have the same routers and read the same ids."""
    keys = (
        "num_hidden_layers",
        "first_k_dense_replace",
        "num_nextn_predict_layers",
        "n_routed_experts",
        "num_experts_per_tok",
        "vocab_size",
    )
    for key in keys:
        one, two = getattr(mine.config.model, key), getattr(other.config.model, key)
        if one != two:
            raise UserError(
                f"{other.path} cannot be compared with {mine.path}: model.{key} is {two}, not {one}"
            )
    tokenizers = mine.tokenizer(), other.tokenizer()
    if None not in tokenizers:
        prints = [tokenizer.fingerprint[:12] for tokenizer in tokenizers if tokenizer is not None]
        if prints[0] != prints[1]:
            raise UserError(
                f"{other.path} cannot be compared with {mine.path}: they were trained with "
                f"different tokenizers (fingerprints {prints[1]} and {prints[0]})"
            )


def _own_domains(
    opened: OpenedCheckpoint,
    tokenizer: Tokenizer | None,
    tokens: int,
    checks: list[Verification],
) -> list[Domain]:
    """The run's own data: what it validates on, by part of a blend, or the built-in corpus."""
    model = opened.config.model
    if model.data.data_prefix is None and model.data.validation_prefix is None:
        if tokenizer is None:
            raise UserError(
                f"{opened.path} does not lie in a run folder with a tokenizer; give --data, "
                "prepared with the tokenizer of the model"
            )
        return built_in_domains(tokenizer, model.vocab_size, tokens)
    return [
        packed_domain(name, f"{part.indexed.prefix}, documents for validation", part, tokens)
        for name, part in opened.validation_parts(checks)
    ]


def _frequent(domains: Iterable[Domain], minimum: int) -> np.ndarray:
    """The vocabulary entries whose experts are counted."""
    ids, seen = np.unique(
        np.concatenate([ids for domain in domains for ids in domain.documents]), return_counts=True
    )
    often = np.argsort(-seen, kind="stable")[:COUNTED_WORDS]
    return ids[often[seen[often] >= minimum]]


def _readings(
    domains: Sequence[Domain], config: RunConfig, progress: StageProgress, stage: str
) -> Iterator[tuple[int, Iterator[dict[str, np.ndarray]]]]:
    """Every domain's number and its batches; progress is shown as they are read."""
    data = config.model.data
    total, done = sum(domain.num_tokens for domain in domains), 0

    def watched(domain: Domain) -> Iterator[dict[str, np.ndarray]]:
        nonlocal done
        size = max(1, BATCH_TOKENS // data.seq_length)
        for batch in domain.batches(data.seq_length, size, data.isolate_documents):
            progress.update(stage, done, total, domain.name)
            yield batch
            done += int((batch["documents"] >= 0).sum())

    for number, domain in enumerate(domains):
        yield number, watched(domain)


def _read(
    model: Any,
    domain: int,
    batches: Iterable[dict[str, np.ndarray]],
    counts: RoutingCounts | None,
    kept: KeptChoices,
) -> None:
    def observe(seen: LayerRouting) -> None:
        if counts is not None:
            counts.add(domain, seen)
        kept.add(seen.layer, domain, seen.experts_TK)

    read_routing(model, batches, observe)


def _target(opened: OpenedCheckpoint, output: Path | None) -> Path:
    """Where the result goes, checked before the work."""
    target = output or (opened.run or Path()) / "routing.html"
    if target.suffix not in (".html", ".json"):
        raise UserError(f"--output {target}: end it in .html for a page or .json for the data")
    folder = target.parent
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"--output {target}: it is a folder, or its folder does not exist or cannot be "
            "written; choose another"
        )
    return target


def _write(analysis: RoutingAnalysis, target: Path) -> None:
    if target.suffix == ".json":
        text = dump(analysis)
    else:
        from deepseek.experts.routing_page import routing_page

        text = routing_page(analysis)
    write_whole(target, text, "; choose another file with --output")


def _show(analysis: RoutingAnalysis) -> None:
    """The layers as a table."""
    several = len(analysis.domains) > 1
    columns = ["layer", "max/mean", "CV", "dead", "margin", "closest experts", "token's favourite"]
    columns += ["most particular domain"] if several else []
    columns += [f"as step {other.step}" for other in analysis.compared]
    rows = []
    for number, layer in enumerate(analysis.layers):
        one, two, together = layer.closest
        margin, favourite = layer.margin.quantile(0.5), layer.top_share
        row = [
            layer.name,
            f"{layer.max_violation + 1:.2f}",
            f"{layer.variation:.2f}",
            str(layer.dead),
            "-" if margin is None else f"{margin:.3f}",
            f"{one}, {two}: {together:.0%}",
            "-" if favourite is None else f"{favourite:.0%}",
        ]
        if several:
            domain, expert, above = layer.most_particular
            row.append(f"{analysis.domains[domain].name}, {expert}: +{above:.0%}")
        row += [f"{other.share_L[number]:.0%}" for other in analysis.compared]
        rows.append(row)
    sizes = ", ".join(f"{d.name} {d.tokens:,}" for d in analysis.domains)
    table(
        f"{analysis.name}: {analysis.num_experts} experts, {analysis.top_k} chosen; {sizes} tokens",
        columns,
        rows,
    )
    if not several:
        say("one domain: nothing to compare it with; give --data twice to see specialisation")
    say(MEANING)
