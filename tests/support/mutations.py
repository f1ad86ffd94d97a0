"""Plants one fault at a time in a copy of the package, and runs the test that must notice it.

``python -m support.mutations [--only WORD]`` from ``tests/``; ``make test-all`` runs it. A fault
that no test notices exits with 1. That every fault can still be planted is a test of ``make test``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = Path("training/nemo/deepseek")
SECONDS = 600
"""A test that takes longer hangs: the fault is noticed by the time limit of the suite."""


class Mutation(NamedTuple):
    """A fault as somebody might make it."""

    what: str
    """The area, and the fault in words."""
    file: str
    """In the package."""
    old: str
    """Stands in the file once."""
    new: str
    test: str
    """The narrowest test that must fail, below ``tests/``."""


ROUTER = "models/components/router.py"
TENSOR = "parallel/tensor.py"
GRADIENTS = "parallel/gradients.py"
DISPATCH = "parallel/expert_dispatcher.py"
DEEPEP = "parallel/deepep_dispatcher.py"
MODEL = "models/transformer.py"
STEP = "training/step.py"
BALANCE = "models/components/balance.py"
ROPE = "models/components/rope.py"
COLLECTIVES = "parallel/collectives.py"
PIPELINE = "parallel/pipeline.py"
DATASET = "data/dataset.py"
LOADER = "data/loader.py"
MANIFEST = "checkpoint/manifest.py"
CHAT = "data/chat_template.py"
MUON = "training/muon.py"
DIGESTS = "data/digests.py"
LAYOUT = "parallel/test_layouts.py::test_chosen_layout"
BY_HAND = "training/test_step.py::test_gradients_are_those_of_the_mean_over_labels_and_clipped"

# fmt: off
MUTATIONS = (
    Mutation("routing: the bias weighs too", ROUTER, "scores_TE, expert_ids_TK, self.normalise",
             "self.choice_scores(scores_TE), expert_ids_TK, self.normalise",
             "models/test_router.py::test_the_bias_chooses_but_does_not_weigh"),
    Mutation("routing: masked groups score 0", ROUTER, 'float("-inf")).flatten(1)',
             "0.0).flatten(1)",
             "models/test_router.py::test_a_masked_group_loses_to_negative_scores"),
    Mutation("routing: a group counts by its best expert", ROUTER,
             '2 if self.topk_method == "noaux_tc"', '1 if self.topk_method == "noaux_tc"',
             "models/test_router.py::test_group_scores"),
    Mutation("routing: weights are scaled, then normalised", ROUTER,
             "self.normalise, self.scaling_factor",
             "self.normalise, 1.0 if self.normalise else self.scaling_factor",
             "models/test_router.py::test_normalise_then_scale"),
    Mutation("routing: logits in the dtype of the tokens", ROUTER,
             "logits_TE = linear(x_TD.to(dtype), self.weight.to(dtype))",
             "logits_TE = linear(x_TD, self.weight.to(x_TD.dtype)).to(dtype)",
             "models/test_router.py::test_bf16_tokens_are_routed_in_fp32"),
    Mutation("balance bias: overloaded experts are raised", ROUTER,
             "torch.sign(load_E.mean() - load_E)", "torch.sign(load_E - load_E.mean())",
             "models/test_router.py::test_update_bias"),
    Mutation("balance bias: the counts of a micro-batch replace those before", BALANCE,
             "total_counts_E += ctx.counts_E", "total_counts_E.copy_(ctx.counts_E)",
             "models/test_moe.py::test_micro_batches_change_nothing"),
    Mutation("balance bias: each rank goes by its own tokens", STEP,
             "sum_over(counts_LE, self.meshes.stage)", "sum_over(counts_LE, None)",
             LAYOUT + "[EP]"),
    Mutation("balance bias: it moves in skipped steps too", STEP,
             "                for router in routers:\n                    router.update_bias(",
             "            for router in routers:\n                    router.update_bias(",
             "training/test_step.py::test_a_gradient_that_is_not_finite_changes_no_weight"),
    Mutation("balance loss: padding is averaged", "ops/routing.py",
             "share_BSE * real_BS1, real_BS1.to", "share_BSE, real_BS1.to",
             "models/test_balance.py::test_equals_its_equations"),
    Mutation("experts: those without rows are empty groups", "ops/rows.py",
             "least_rows = 0 if skip_empty else 1", "least_rows = 0",
             "models/test_experts.py"
             "::test_what_kernels_leave_in_empty_groups_and_rows_reaches_nothing"),
    Mutation("dispatch: results are put back by the order of sending",
             "models/components/dispatcher.py", "(order_R, inverse_R, expert_ids_TK.shape[1])",
             "(inverse_R, order_R, expert_ids_TK.shape[1])",
             "models/test_dispatcher.py::test_equals_a_dense_loop"),
    Mutation("dispatch: the sizes of the way back are those of the way there", COLLECTIVES,
             "back = partial(_exchange, send_counts=receive_counts, receive_counts=send_counts,",
             "back = partial(_exchange, send_counts=send_counts, receive_counts=receive_counts,",
             "parallel/test_comm.py::test_all_to_all_rows"),
    Mutation("dispatch: rows stay in the order of their source", DISPATCH,
             "arrival_Q = local_expert_Q.argsort(stable=True)\n        return",
             "arrival_Q = torch.arange(len(local_expert_Q))\n        return",
             "parallel/test_expert_dispatcher.py::test_where_rows_arrive"),
    Mutation("dispatch: results leave in the order of the experts", DISPATCH,
             "permute_rows(y_RD, plan.arrival_inverse_Q, plan.arrival_Q)",
             "permute_rows(y_RD, plan.arrival_Q, plan.arrival_inverse_Q)",
             "parallel/test_expert_dispatcher.py::test_any_case"),
    Mutation("dispatch: DeepEP's rows are used before they have arrived", DEEPEP,
             "        exchange.wait()\n", "",
             "parallel/test_expert_dispatcher.py::test_over_deep_ep_exactly"),
    Mutation("dispatch: a recomputation over DeepEP has an order of its own", DEEPEP,
             "keep(lambda: self._exchange(x_TD, expert_ids_TK))",
             "self._exchange(x_TD, expert_ids_TK)",
             "parallel/test_expert_dispatcher.py::test_recomputed_over_deep_ep"),
    Mutation("TP: every rank masks by the first part of the sequence", TENSOR,
             "real_BS.chunk(size, dim=1)[rank]", "real_BS.chunk(size, dim=1)[0]",
             LAYOUT + "[TP]"),
    Mutation("TP: tokens of other ranks get the first row's embedding", TENSOR,
             "lookup(index_BS, weight_vD).masked_fill(~mine_BS.unsqueeze(-1), 0.0)",
             "lookup(index_BS, weight_vD)",
             "parallel/test_vocabulary.py::test_local_embedding"),
    Mutation("TP: the largest logits are added", TENSOR, "dist.ReduceOp.MAX", "dist.ReduceOp.SUM",
             "parallel/test_vocabulary.py::test_large_logits_do_not_overflow"),
    Mutation("TP: the gradient of a sum is summed again", COLLECTIVES,
             "lambda grad: grad)", "lambda grad: 2 * grad)",
             "parallel/test_comm.py::test_sum_forward"),
    Mutation("PP: gradients are divided by the micro-batches", PIPELINE, "scale_grads=False",
             "scale_grads=True", LAYOUT + "[PP]"),
    Mutation("PP: the loss is that of the last micro-batch", PIPELINE,
             "self._sums += sums.detach()", "self._sums = sums.detach()", LAYOUT + "[PP]"),
    Mutation("PP: validation hands on what it was handed", PIPELINE,
             "dist.send(h_BSD.contiguous(), group=pp, group_dst=after)",
             "dist.send(torch.zeros_like(h_BSD), group=pp, group_dst=after)",
             "parallel/test_layouts.py::test_validation"),
    Mutation("gradients: divided by the tokens, not by the labels", STEP,
             "mtp_weight * sums[1]) / num_labels", "mtp_weight * sums[1]) / num_real", BY_HAND),
    Mutation("gradients: divided by this rank's labels", STEP,
             "sum_over(torch.stack(counts), self.meshes.data)",
             "sum_over(torch.stack(counts), None)", LAYOUT + "[EP]"),
    Mutation("compiled: norms are gathered inside of a block", "parallel/parallelize.py",
             "        if around is not None:", "        if around is self:",
             "parallel/test_compiled_ranks.py::test_blocks_in_bf16"),
    Mutation("compiled: blocks of documents in every layer", MODEL,
             "        blocks = chunk_blocks(tokens_BS, documents_BS, self.chunks, tells)",
             "        blocks = [chunk_blocks(tokens_BS, documents_BS, self.chunks, tells) "
             "for _ in self.layers][0]",
             "models/test_transformer.py::test_blocks_of_documents_are_made_once_for_all_layers"),
    Mutation("memory: DeepEP's buffer is forgotten", "config/rank_need.py",
             "(ends + senders) * self.hidden", "ends * self.hidden",
             "config/test_rank_need.py::test_deep_ep_has_room_for_all_that_may_come"),
    Mutation("gradients: averaged over ranks", "parallel/parallelize.py",
             "unit.set_gradient_divide_factor(1.0)", "unit.set_gradient_divide_factor(2.0)",
             LAYOUT + "[EP]"),
    Mutation("gradients: small ones are scaled up to the limit", GRADIENTS,
             "0 < factor < 1", "0 < factor", BY_HAND),
    Mutation("gradients: never clipped", GRADIENTS, "torch._foreach_mul_(", "torch._foreach_mul(",
             BY_HAND),
    Mutation("gradients: copies of a weight count once each in the norm", GRADIENTS,
             "_holders(parameter, meshes)))", "1))",
             LAYOUT + "[TP]"),
    Mutation("gradients: experts over TP ranks are summed as if whole", GRADIENTS,
             'not {"tp", "ep", "edp"} & set', 'not {"tp"} & set',
             LAYOUT + "[TP]"),
    Mutation("gradients: the first stage has its own part of the embedding's", GRADIENTS,
             "        gradient += theirs\n", "        gradient += 0 * theirs\n",
             LAYOUT + "[PP]"),
    Mutation("resume: data begin anew", LOADER, "first = consumed_samples(step, ",
             "first = consumed_samples(step - self.start_step, ",
             "data/test_loader.py::test_a_run_goes_on_from_any_step"),
    Mutation("resume: the data of the step before are read again", STEP,
             "self.train_loader(self.finished_steps,",
             "self.train_loader(max(0, self.finished_steps - 1),",
             "training/test_interruptions.py::test_other_settings_continue_bitwise_too"),
    Mutation("resume: the optimiser begins anew", "checkpoint/training_state.py",
             "        optimizer.state[parameter] = {\n", "        _ = {\n",
             "training/test_training_state.py::test_everything_comes_back_and_the_next_update_is_the_same"),
    Mutation("resume: reading draws from the run's random numbers", LOADER,
             "        generator=torch.Generator().manual_seed(0),\n", "",
             "data/test_loader.py::test_reading_leaves_the_random_state_alone"),
    Mutation("resume: every pass has the order of the first", DATASET,
             "permuted(place, len(self), self.seed, group, _SHUFFLED)",
             "permuted(place, len(self), self.seed, 0, _SHUFFLED)",
             "data/test_dataset.py::test_a_pass_has_every_stretch_once_and_mixes_documents"),
    Mutation("manifest: digests are not compared", MANIFEST, "if actual != expected:",
             "if actual is None:", "checkpoint/test_manager.py::test_flipped_bit"),
    Mutation("manifest: a file no one checks", "checkpoint/checkpoint.py",
             "sorted(manifest.files)[ranks.rank :: ranks.size]",
             "sorted(manifest.files)[ranks.rank + 1 :: ranks.size]",
             "checkpoint/test_manager.py::test_flipped_bit"),
    Mutation("manifest: longer files pass", MANIFEST, "if size != entry.size:",
             "if size < entry.size:", "checkpoint/test_manager.py::test_shorter_or_longer"),
    Mutation("restarts: a complete run starts anew", "launch/supervisor.py",
             "(group.rank_0_ended_well or complete())", "False",
             "launch/test_supervisor.py"
             "::test_a_rank_lost_after_the_last_step_is_no_reason_to_start_again"),
    Mutation("restarts: a lost rank is no reason", "launch/supervisor.py",
             "(group.rank_0_ended_well or complete())", "True",
             "launch/test_supervisor.py::test_a_rank_lost_before_the_last_step_is_one"),
    Mutation("digests: the whole file is taken for its first block", DIGESTS,
             "!= self.blocks[count - 1]:", "!= self.blocks[0]:",
             "data/test_digests.py::test_the_place_is_told"),
    Mutation("digests: what the checkpoint was trained on does not matter", DIGESTS,
             "expected is not None and known != expected:", "expected is not None and known == '':",
             "data/test_digests.py::test_files_without_a_record_are_compared_with_the_checkpoint"),
    Mutation("chat mask: one id early", DATASET, "self.is_answer[start + 1 : start + length] == 1",
             "self.is_answer[start : start + length - 1] == 1",
             "data/test_chat.py::test_every_conversation_is_whole_in_one_sequence_once_an_epoch"),
    Mutation("chat mask: the beginning of the assistant's turn is learnt", CHAT,
             "self._rendered(messages[:k], True, tools)",
             "self._rendered(messages[:k], False, tools)",
             "data/test_chat.py::test_plain_template_learns_every_answer_and_its_end"),
    Mutation("chat mask: answers switched off are learnt", CHAT,
             "strict=True) if on]\n        if not kept", "strict=True)]\n        if not kept",
             "data/test_chat_forms.py::test_answers_that_are_switched_off_are_context"),
    Mutation("padding: counts as real", MODEL, "real_BS=documents_BS >= 0",
             "real_BS=documents_BS >= -1", "training/test_step.py::test_padding_changes_nothing"),
    Mutation("borders: the last id of a document predicts the next one's first", DATASET,
             "            labels[begins[1:] - 1] = IGNORE_INDEX\n", "",
             "data/test_dataset.py::test_isolated_fields_of_a_known_sample"),
    Mutation("borders: attention crosses them", MODEL,
             "            isolated_BS,\n            real_BS",
             "            None,\n            real_BS", BY_HAND),
    Mutation("MTP: labels one place too far", MODEL,
             "shift(labels_BS, depth, IGNORE_INDEX, documents_BS)",
             "shift(labels_BS, depth + 1, IGNORE_INDEX, documents_BS)",
             "models/test_losses.py::test_equals_a_loop"),
    Mutation("MTP: every depth is fed the first one's tokens", MODEL,
             "shift(tokens_BS, depth, 0, context.documents_BS)",
             "shift(tokens_BS, 1, 0, context.documents_BS)",
             "models/test_multi_token_prediction.py::test_what_a_depth_is_fed"),
    Mutation("RoPE: pairs turn the other way in one half", ROPE, "even * sin + odd * cos",
             "odd * cos - even * sin", "models/test_rope.py::test_rotate_equals_its_twin"),
    Mutation("RoPE: pairs turn the other way", ROPE, "torch.complex(cos_BSA, sin_BSA)",
             "torch.complex(cos_BSA, -sin_BSA)",
             "models/test_rope.py::test_rotation_is_a_complex_product"),
    Mutation("RoPE: gradients turn as their pairs did", ROPE, "ctx.saved_tensors[0].conj()",
             "ctx.saved_tensors[0]", "models/test_rope.py::test_rotate_equals_its_twin"),
    Mutation("nodes: gradients of rotary keys turn as their pairs did",
             "models/components/attention_node.py", "kept.sin_BSA, -1.0)", "kept.sin_BSA, 1.0)",
             "models/test_training_nodes.py::test_attention"),
    Mutation("nodes: a router counts with each gradient", "models/components/router_node.py",
             "if self._is_added:", "if False:", "models/test_training_nodes.py::"
             "test_a_token_is_counted_once_where_gradients_of_inputs_and_weights_are_asked_for_apart"),
    Mutation("nodes: a mixture's shared experts give its input no gradient",
             "models/components/moe_node.py", "router.top_k, by_x_TD)", "router.top_k)",
             "models/test_training_nodes.py::test_mixture"),
    Mutation("memory: a gradient that somebody has kept is written over", "ops/gradient_rooms.py",
             "if _users(room) > _NOBODY + is_there:", "if False:",
             "ops/test_gradient_rooms.py::test_a_gradient_that_somebody_has_kept_stays"),
    Mutation("norm: a gradient that was changed counts as it was written", "ops/noted_squares.py",
             "if note is None or note.version != grad._version:", "if note is None:",
             "ops/test_noted_squares.py::test_a_changed_gradient_is_read"),
    Mutation("norm: a weight's hooks change what is noted", "ops/noted_squares.py",
             "if has_hooks(weight):", "if False:",
             "ops/test_noted_squares.py::test_hooks_may_change_what_no_version_tells"),
    Mutation("norm: hooks of modules change what is noted", "ops/noted_squares.py",
             "if notes and any(watched):", "if False:",
             "training/test_step.py"
             "::test_hooks_of_modules_may_change_gradients_that_kernels_have_noted"),
    Mutation("norm: squares of a gradient that is added to are added up, too",
             "ops/native/slabs.h", "if (squares && now.first == 0)", "if (0)",
             "ops/test_noted_squares.py::test_are_those_of_the_norm"),
    Mutation("YaRN: fast pairs are stretched, slow ones left alone", ROPE,
             "stretched_A * stretch_A + plain_A * (1 - stretch_A)",
             "plain_A * stretch_A + stretched_A * (1 - stretch_A)",
             "models/test_rope.py::test_v3_frequencies"),
    Mutation("YaRN: the scale goes into q alone", ROPE,
             "yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2",
             "yarn_mscale(scaling.factor, scaling.mscale_all_dim)",
             "models/test_rope.py::test_softmax_scale"),
    Mutation("Muon: no look ahead", MUON,
             'nesterov = gradient.lerp(kept, group["momentum"])', "nesterov = kept",
             "training/test_muon.py::test_by_hand"),
    Mutation("Muon: the size goes by the shorter side", MUON, "0.2 * max(parameter.shape[-2:])",
             "0.2 * min(parameter.shape[-2:])", "training/test_muon.py::test_equals_torch_muon"),
    Mutation("Muon: experts of a stack share a norm", MUON, "x.norm(dim=(-2, -1), keepdim=True)",
             "x.norm()", "training/test_muon.py::test_a_stack_is_a_row_of_matrices"),
    Mutation("QK-clip: the rotary query by the root too", "training/qk_clip.py",
             "gamma_N1.expand(-1, attn.qk_rope_head_dim)",
             "gamma_N1.sqrt().expand(-1, attn.qk_rope_head_dim)",
             "training/test_qk_clip.py::test_heads_above_the_threshold_are_scaled_down_to_it"),
    Mutation("mixture: the residual stream's own gradient is lost",
             "models/components/moe_node.py", "plus=grad_TD",
             "plus=torch.zeros_like(grad_TD)", "models/test_training_nodes.py::test_mixture"),
    Mutation("monitors: a mixture of one node tells no rows", "models/components/moe.py",
             "self.experts.tell(h_BSD.shape[:2].numel() * self.gate.top_k)", "pass",
             "parallel/test_monitors.py::test_a_mixture_that_is_one_node_tells_as_much"),
    Mutation("monitors: records keep the facts of the first", "monitoring/array_log.py",
             "if meta != self._meta[0]:", "if not self._meta[0]:",
             "monitoring/test_array_log.py::test_each_record_has_its_own_facts"),
    Mutation("AdamW: states of other sizes are taken", "training/adamw.py",
             "if x is not None and local(x).shape != size:", "if False:",
             "training/test_build_optimizer.py::test_a_state_of_other_sizes_is_an_error"),
    Mutation("decoding: a half of a block forgets the stream", "ops/native/decoding.c",
             "y[i] += h[i]", "y[i] += 0 * h[i]",
             "ops/test_native_decoding.py::test_half_of_a_block_with_a_feed_forward"),
    Mutation("barrier: ranks leave before the last one has come", "parallel/cpu_barrier.py",
             "comers = self._size *", "comers = (self._size - 1) *",
             "parallel/test_cpu_barrier.py::test_none_leaves_before_all_have_come"),
)
# fmt: on


def mutated(mutation: Mutation, source: str) -> str:
    """The file with the fault.

    Raises:
        ValueError: the old text does not stand in it exactly once.
    """
    if (found := source.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.what}: {mutation.old!r} stands {found} times in "
                         f"{mutation.file}, expected once; write the mutation anew")  # fmt: skip
    return source.replace(mutation.old, mutation.new)


def run(root: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Pytest in a copy of the repository."""
    names = [f"tests/{test}" for test in tests]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *names],
        cwd=root,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root / PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )  # fmt: skip


def copied(root: Path) -> None:
    """What a test needs of the repository."""
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in ("tests", "training"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))


def verdict(root: Path, mutation: Mutation) -> str:
    """``caught``, ``SURVIVED``, or what else came of it."""
    path = root / PACKAGE / mutation.file
    sound = path.read_text()
    path.write_text(mutated(mutation, sound))
    try:
        ran = run(root, mutation.test)
    except subprocess.TimeoutExpired:
        return "caught (it hangs)"
    finally:
        path.write_text(sound)
    if ran.returncode > 1:
        return f"ERROR {ran.returncode}: {ran.stdout[-500:]}{ran.stderr[-500:]}"
    return "caught" if ran.returncode else "SURVIVED"


def main() -> None:
    """Run them one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word of the mutations to run")
    word = parser.parse_args().only
    chosen = [mutation for mutation in MUTATIONS if word in mutation.what]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copied(root)
        sound = run(root, *sorted({mutation.test for mutation in chosen}))
        if sound.returncode:
            sys.exit(f"the tests fail without any fault:\n{sound.stdout[-3000:]}")
        missed = 0
        for mutation in chosen:
            found = verdict(root, mutation)
            missed += not found.startswith("caught")
            print(f"{found:9} {mutation.what} ({mutation.test})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults are caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
