"""A table of broken configurations: the field that is named, and what the message says of it."""

from __future__ import annotations

import pytest

from deepseek.config import ConfigError, load_config
from deepseek.config.errors import Problem

TP4 = "trainer.devices=4 & model.tensor_model_parallel_size=4"
PP2 = "trainer.devices=2 & model.pipeline_model_parallel_size=2"
DEEP_EP = (
    "trainer.devices=2 & model.expert_model_parallel_size=2 & "
    "model.moe_token_dispatcher_type=deepep"
)
PP4 = "trainer.devices=4 & model.pipeline_model_parallel_size=4"
INTERLEAVED = (
    "model.pipeline_schedule=Interleaved1F1B & model.virtual_pipeline_model_parallel_size=2"
)

# (overrides of deepseek_v3_tiny, separated by " & "), field, phrases of its message
ONE_PROBLEM = [
    # types
    ("model.hidden_size=7.5", "model.hidden_size", ["must be a whole number", "write 7 or 8"]),
    ("model.hidden_size=1e3", "model.hidden_size", ["must be a whole number", "write 1000"]),
    ('model.hidden_size="256"', "model.hidden_size", ["write 256", "without quotes"]),
    ("model.hidden_size=1_024", "model.hidden_size", ["write 1024", "digits only"]),
    ("model.hidden_size=null", "model.hidden_size", ["not null", "(default 256)"]),
    ("model.hidden_size=???", "model.hidden_size", ["placeholder ???", "such as 256"]),
    ("model.hidden_size={a: 1}", "model.hidden_size", ["must be a whole number"]),
    ("model.hidden_size=true", "model.hidden_size", ["=true: must be a whole number"]),
    ("model.optim.lr=fast", "model.optim.lr", ["must be a number", "default is 0.00022"]),
    ("model.optim.lr=.inf", "model.optim.lr", ["must be a finite number"]),
    ("model.optim.lr=.nan", "model.optim.lr", ["must be a finite number"]),
    ('model.optim.lr="1e-3"', "model.optim.lr", ["must be a number", "write 0.001"]),
    ("model.torch_compile=yes", "model.torch_compile", ["must be true or false", "write true"]),
    ("model.torch_compile=off", "model.torch_compile", ["must be true or false", "write false"]),
    ("model.torch_compile=2", "model.torch_compile", ["write true or false"]),
    ("name={a: 1}", "name", ["must be text"]),
    ("name=null", "name", ["must be text, not null", "default deepseek"]),
    ("model.optim.betas=0.9", "model.optim.betas", ["list of numbers", "[0.9, 0.95]"]),
    ("model.optim.betas=[0.9, hi]", "model.optim.betas", ["list of numbers", "[0.9, 0.95]"]),
    ("model.data.data_prefix={a: b}", "model.data.data_prefix", ["text, a number or a list"]),
    ("model.optim=adamw", "model.optim", ["is a section with keys name", "model.optim.name=adamw"]),
    ("model.rope_scaling=yarn", "model.rope_scaling", ["model.rope_scaling.type=yarn"]),
    (
        "model=null",
        "model",
        ["is a section with keys model_type, vocab_size", "remove the empty line"],
    ),
    # unknown keys
    ("model.hiden_size=4", "model.hiden_size", ["no such key", "did you mean model.hidden_size?"]),
    ("optim.lr=1e-3", "optim.lr", ["no such key", "did you mean model.optim.lr?"]),
    ("modle.optim.lr=1e-3", "modle.optim.lr", ["did you mean model.optim.lr?"]),
    ("lr=1e-3", "lr", ["did you mean model.optim.lr?"]),
    ("model.encoder_seq_length=8", "model.encoder_seq_length", ["use model.data.seq_length"]),
    ("model.max_seq_length=8", "model.max_seq_length", ["use model.data.seq_length"]),
    ("model.num_layers=8", "model.num_layers", ["use model.num_hidden_layers"]),
    ("model.num_moe_experts=8", "model.num_moe_experts", ["use model.n_routed_experts"]),
    ("trainer.gradient_clip=1", "trainer.gradient_clip", ["use trainer.gradient_clip_val"]),
    ("trainer.max_epochs=3", "trainer.max_epochs", ["counted in steps", "trainer.max_steps"]),
    ("model.num_key_value_heads=8", "model.num_key_value_heads", ["model.kv_lora_rank"]),
    ("model.max_steps=5", "model.max_steps", ["trainer.max_steps or model.optim.sched.max_steps"]),
    ("model.optim.sched.warmup=3", "model.optim.sched.warmup", ["model.optim.sched.warmup_steps?"]),
    ("model.optim.betas.1=0.9", "model.optim.betas.1", ["a value, not a section"]),
    ("model.xyzzy=5", "model.xyzzy", ["deepseek cat deepseek_v3_tiny"]),
    ("xyzzy=5", "xyzzy", ["the top level has the keys name, seed, trainer, model, exp_manager"]),
    ("model.rope_scaling={factors: 4}", "model.rope_scaling.factors", ["rope_scaling.factor?"]),
    ("extends=deepseek_v3_base", "extends", ["top of the file", "--config"]),
    # code and secrets
    ("model._target_=os.system", "model._target_", ["refused", "import and run code"]),
    ("model.optim={_target_: torch.optim.SGD}", "model.optim._target_", ["refused"]),
    (
        "model.data.data_prefix=[{_target_: x}]",
        "model.data.data_prefix._target_",
        ["refused", "a configuration is data"],
    ),
    (
        "model.data.cache_dir=${oc.env:HOME}",
        "model.data.cache_dir",
        ["${oc.env:HOME} is not read", "secrets"],
    ),
    ("name=a${now:%Y}", "name", ["${now:%Y} is not read"]),
    ("model.hidden_size=${model.hiden_size}", "model.hidden_size", ["${model.hidden_size}?"]),
    ("model.hidden_size=${model.optim}", "model.hidden_size", ["refers to a section"]),
    # ranges and names
    ("model.hidden_size=0", "model.hidden_size", ["must be at least 1", "use 1 or more"]),
    ("model.q_lora_rank=0", "model.q_lora_rank", ["must be at least 1"]),
    (f"model.global_batch_size={10**30}", "model.global_batch_size", ["at most 1000000000;"]),
    ("model.global_batch_size=0", "model.global_batch_size", ["must be at least 1"]),
    ("model.initializer_range=0", "model.initializer_range", ["above 0", "more than 0"]),
    ("model.optim.lr=0", "model.optim.lr", ["must be above 0", "(default 0.00022)"]),
    ("model.rope_theta=1", "model.rope_theta", ["must be above 1"]),
    ("model.data.fim_rate=1.5", "model.data.fim_rate", ["at least 0 and at most 1", "1 or less"]),
    (
        "model.data.validation_fraction=1",
        "model.data.validation_fraction",
        ["at least 0 and below 1", "use less than 1"],
    ),
    ("model.data.num_workers=-1", "model.data.num_workers", ["must be at least 0"]),
    ("model.tokenizer.vocab_size=100", "model.tokenizer.vocab_size", ["must be at least 262"]),
    ("trainer.max_steps=0", "trainer.max_steps", ["must be at least 1"]),
    ("trainer.devices=-1", "trainer.devices", ["must be at least 1"]),
    ("trainer.devices=many", "trainer.devices", ["must be a whole number", "default is 1"]),
    ("trainer.devices=auto", "trainer.devices", ["in `deepseek train` and", "give a value"]),
    ("seed=-1", "seed", ["at least 0 and below 4294967296"]),
    ("model.num_nextn_predict_layers=-1", "model.num_nextn_predict_layers", ["at least 0"]),
    ("model.scoring_func=sigmod", "model.scoring_func", ["sigmoid or softmax", "use sigmoid"]),
    (
        "model.topk_method=noauxtc",
        "model.topk_method",
        ["noaux_tc, group_limited_greedy or greedy", "use noaux_tc"],
    ),
    ("model.optim.name=adam", "model.optim.name", ["must be adamw or muon", "use adamw"]),
    (
        "model.optim.sched.name=cosine",
        "model.optim.sched.name",
        ["CosineAnnealing, WarmupConstantCosine or WarmupStable", "use CosineAnnealing"],
    ),
    ("trainer.precision=16", "trainer.precision", ["32, bf16-mixed or auto", "use bf16-mixed"]),
    ("trainer.precision=bf16", "trainer.precision", ["32, bf16-mixed or auto", "use bf16-mixed"]),
    ("trainer.precision=[32]", "trainer.precision", ["32, bf16-mixed or auto"]),
    ("trainer.accelerator=cuda", "trainer.accelerator", ["auto, cpu or gpu", "use gpu"]),
    (
        "model.activations_checkpoint_granularity=select",
        "model.activations_checkpoint_granularity",
        ["must be full, selective or null", "use selective"],
    ),
    ("model.rope_scaling={type: linear}", "model.rope_scaling.type", ["must be yarn"]),
    ("model.rope_scaling={factor: 0.5}", "model.rope_scaling.factor", ["must be at least 1"]),
    # architecture
    ("model.qk_rope_head_dim=15", "model.qk_rope_head_dim", ["must be even", "use 14 or 16"]),
    (
        "model.num_experts_per_tok=17",
        "model.num_experts_per_tok",
        ["is more than model.n_routed_experts=16", "use 1 to 16"],
    ),
    (
        "model.num_experts_per_tok=9",
        "model.num_experts_per_tok",
        ["model.topk_group=2 groups of 4 experts hold 8", "use 1 to 8", "model.topk_group=3"],
    ),
    (
        "model.n_group=3",
        "model.n_group",
        ["does not divide model.n_routed_experts=16", "use one of 1, 2, 4, 8, 16"],
    ),
    ("model.n_group=16", "model.n_group", ["leaves 1 expert", "two best", "one of 1, 2, 4, 8"]),
    ("model.topk_group=5", "model.topk_group", ["is more than model.n_group=4", "use 1 to 4"]),
    (
        "model.topk_method=group_limited_greedy",
        "model.moe_router_bias_update_rate",
        ["would be ignored", "has no correction bias", "use 0, or model.topk_method=noaux_tc"],
    ),
    (
        "model.topk_method=greedy & model.topk_group=1 & model.moe_router_bias_update_rate=0",
        "model.n_group",
        ["would be ignored", "greedy knows no groups", "use 1 (the default), or model.topk_method"],
    ),
    (
        "model.num_experts_per_tok=1",
        "model.norm_topk_prob",
        ["every normalised weight is 1", "no gradient", "use false"],
    ),
    (
        "model.first_k_dense_replace=5",
        "model.first_k_dense_replace",
        ["is more than model.num_hidden_layers=4", "use 0 to 4"],
    ),
    (
        "model.first_k_dense_replace=4 & model.num_nextn_predict_layers=0 "
        "& model.moe_z_loss_coeff=1e-3",
        "model.moe_z_loss_coeff",
        ["would be ignored", "=4 blocks are dense", "model.first_k_dense_replace=3 or less"],
    ),
    (
        "model.first_k_dense_replace=4 & model.num_nextn_predict_layers=0 "
        "& model.moe_aux_loss_coeff=0.01",
        "model.moe_aux_loss_coeff",
        ["would be ignored", "=4 blocks are dense", "use 0.0001 (the default), or"],
    ),
    (
        "model.num_nextn_predict_layers=256",
        "model.num_nextn_predict_layers",
        ["beyond the end of model.data.seq_length=256"],
    ),
    (
        "model.num_nextn_predict_layers=0 & model.mtp_loss_scaling_factor=0.1",
        "model.mtp_loss_scaling_factor",
        ["would be ignored", "use 0.3"],
    ),
    ("model.mtp_loss_scaling_factor=0", "model.mtp_loss_scaling_factor", ["without gradient"]),
    ("model.tie_word_embeddings=true", "model.tie_word_embeddings", ["use false"]),
    (
        "model.data.seq_length=8192",
        "model.data.seq_length",
        ["more than model.max_position_embeddings=4096", "model.max_position_embeddings=8192"],
    ),
    (
        "model.rope_scaling={factor: 2, original_max_position_embeddings: 100}",
        "model.data.seq_length",
        ["factor 2 x original 100 = 200", "model.rope_scaling.factor=3"],
    ),
    (
        "model.rope_scaling={beta_fast: 1, beta_slow: 32}",
        "model.rope_scaling.beta_fast",
        ["less than beta_slow=32", "use 32 or more"],
    ),
    # a batch that grows
    ("model.rampup_batch_size=[2]", "model.rampup_batch_size", ["must be three numbers"]),
    (
        "model.rampup_batch_size=[4,5,100]",
        "model.rampup_batch_size",
        ["not lead from 4 to model.global_batch_size=", "increments of 5", "increment of "],
    ),
    (
        "model.rampup_batch_size=[64,1,100]",
        "model.rampup_batch_size",
        ["not lead from 64", "use a start below", "or null"],
    ),
    (
        "model.rampup_batch_size=[1,1,100]",
        "model.rampup_batch_size",
        ["a batch of 1 sequences: no multiple of model.micro_batch_size x", "multiples of 4"],
    ),
    # optimiser
    ("model.optim.betas=[0.9]", "model.optim.betas", ["must be two numbers", "[0.9, 0.95]"]),
    ("model.optim.betas=[0.9, 1.0]", "model.optim.betas", ["below 1"]),
    ("model.optim.muon_momentum=0.9", "model.optim.muon_momentum", ["ignored", "name=muon"]),
    (
        "model.optim.sched.min_lr=0.1",
        "model.optim.sched.min_lr",
        ["more than the peak model.optim.lr=0.001", "use 0.0001 (a tenth)"],
    ),
    (
        "model.optim.sched.max_steps=10",
        "model.optim.sched.warmup_steps",
        ["40 steps is more than model.optim.sched.max_steps=10"],
    ),
    # batch and layout
    (
        "model.micro_batch_size=3",
        "model.micro_batch_size",
        [
            "x data-parallel size 1 = 3 does not divide model.global_batch_size=8",
            "one of 1, 2, 4, 8",
        ],
    ),
    (
        "trainer.devices=6 & model.pipeline_model_parallel_size=2",
        "model.micro_batch_size",
        ["devices 6 x nodes 1 / (tensor 1 x pipeline 2) = 3", "model.global_batch_size=12"],
    ),
    (
        "trainer.devices=6 & model.tensor_model_parallel_size=4",
        "trainer.devices",
        ["= 6 processes is not a multiple of tensor 4 x pipeline 1 = 4", "use trainer.devices=4"],
    ),
    (
        "trainer.devices=16 & model.tensor_model_parallel_size=16",
        "model.tensor_model_parallel_size",
        ["does not divide model.num_attention_heads=8", "one of 1, 2, 4, 8"],
    ),
    (
        "trainer.devices=8 & model.pipeline_model_parallel_size=8",
        "model.pipeline_model_parallel_size",
        ["more than model.num_hidden_layers=4", "stage would be empty", "use one of 1, 2, 4"],
    ),
    (
        "trainer.devices=2 & model.expert_model_parallel_size=4",
        "model.expert_model_parallel_size",
        ["does not divide data-parallel x tensor ranks = 2 x 1 = 2", "use one of 1, 2"],
    ),
    (
        "trainer.devices=3 & model.expert_model_parallel_size=3 & model.global_batch_size=12",
        "model.expert_model_parallel_size",
        ["does not divide model.n_routed_experts=16", "use 1"],
    ),
    (
        "trainer.devices=2 & model.data_parallel_replicate_size=2 "
        "& model.expert_model_parallel_size=2",
        "model.expert_model_parallel_size",
        ["ranks = 1 x 1 = 1", "/ 2 replicas", "use 1"],
    ),
    (
        "trainer.devices=2 & model.data_parallel_replicate_size=3",
        "model.data_parallel_replicate_size",
        ["does not divide the data-parallel size", "use one of 1, 2"],
    ),
    (
        "model.reshard_after_forward=true",
        "model.reshard_after_forward",
        ["would be ignored", "no two ranks share", "(the default), or more trainer.devices"],
    ),
    (
        "trainer.devices=2 & model.tensor_model_parallel_size=2 & "
        "model.expert_model_parallel_size=2 & model.reshard_after_forward=false",
        "model.reshard_after_forward",
        ["would be ignored", "use null"],
    ),
    (
        f"{PP2} & model.reshard_after_forward=true",
        "model.reshard_after_forward",
        ["model.pipeline_model_parallel_size=2 keeps weights gathered", "use null or false"],
    ),
    (
        "trainer.devices=2 & model.reshard_after_forward=sometimes",
        "model.reshard_after_forward",
        ["true or false"],
    ),
    (
        f"{PP2} & model.reduce_gradients=true",
        "model.reduce_gradients",
        ["model.pipeline_model_parallel_size=2 add gradients up", "use null or false"],
    ),
    (
        "model.reduce_gradients=false",
        "model.reduce_gradients",
        ["would be ignored", "no two ranks share", "more trainer.devices"],
    ),
    (
        "model.moe_token_dispatcher_type=deepep",
        "model.moe_token_dispatcher_type",
        ["would be ignored", "no token travels", "model.expert_model_parallel_size=2 or more"],
    ),
    (
        "model.moe_dispatch_fp8=true",
        "model.moe_dispatch_fp8",
        ["would be ignored", "no token travels", "model.expert_model_parallel_size=2 or more"],
    ),
    (
        f"{DEEP_EP} & trainer.precision=bf16-mixed & trainer.accelerator=gpu & "
        "model.moe_dispatch_fp8=true",
        "model.moe_dispatch_fp8",
        ["would be ignored, since model.moe_token_dispatcher_type=deepep", "use false"],
    ),
    (
        "trainer.devices=2 & model.expert_model_parallel_size=2 & "
        "model.overlap_moe_expert_parallel_comm=true",
        "model.overlap_moe_expert_parallel_comm",
        ["would be ignored", "parallel_size=1 computes no two passes", "more with DualPipeV"],
    ),
    (
        "trainer.devices=4 & model.expert_model_parallel_size=2 & model.global_batch_size=8 & "
        "model.micro_batch_size=1 & model.pipeline_model_parallel_size=2 & "
        "model.overlap_moe_expert_parallel_comm=true",
        "model.overlap_moe_expert_parallel_comm",
        ["schedule=1F1B computes no two passes", "schedule=DualPipeV"],
    ),
    (
        f"{DEEP_EP} & trainer.precision=bf16-mixed & trainer.accelerator=gpu & trainer.devices=4 & "
        "model.pipeline_model_parallel_size=2 & model.pipeline_schedule=DualPipeV & "
        "model.global_batch_size=8 & model.micro_batch_size=1 & "
        "model.overlap_moe_expert_parallel_comm=true",
        "model.overlap_moe_expert_parallel_comm",
        ["would be ignored, since model.moe_token_dispatcher_type=deepep", "use false"],
    ),
    (
        "trainer.devices=4 & model.expert_model_parallel_size=4 & model.micro_batch_size=1 & "
        "model.moe_ranks_per_node=3",
        "model.moe_ranks_per_node",
        ["does not divide model.expert_model_parallel_size=4 and trainer.devices=4", "use 2"],
    ),
    (
        "trainer.devices=2 & model.expert_model_parallel_size=2 & model.micro_batch_size=1 & "
        "model.moe_ranks_per_node=2",
        "model.moe_ranks_per_node",
        ["does not divide", "into two or more", "use null"],
    ),
    (
        f"{DEEP_EP} & trainer.precision=32",
        "model.moe_token_dispatcher_type",
        ["sends bf16, and trainer.precision=32", "use auto or alltoall"],
    ),
    (
        f"{DEEP_EP} & trainer.precision=auto & trainer.accelerator=cpu",
        "model.moe_token_dispatcher_type",
        ["runs on GPUs, and trainer.accelerator=cpu"],
    ),
    (
        f"{DEEP_EP} & trainer.precision=auto & model.hidden_size=252",
        "model.moe_token_dispatcher_type",
        ["model.hidden_size=252 are 504 bytes"],
    ),
    (
        "model.moe_token_dispatcher_type=flex",
        "model.moe_token_dispatcher_type",
        ["auto, alltoall or deepep", "use deepep"],
    ),
    (
        f"{TP4} & model.num_attention_heads=6",
        "model.tensor_model_parallel_size",
        ["does not divide model.num_attention_heads=6;", "use one of 1, 2"],
    ),
    (
        f"{TP4} & model.vocab_size=4098 & model.data.seq_length=130",
        "model.tensor_model_parallel_size",
        ["model.vocab_size=4098 and model.data.seq_length=130", "use one of 1, 2"],
    ),
    (
        f"{TP4} & model.intermediate_size=642",
        "model.tensor_model_parallel_size",
        ["does not divide model.intermediate_size=642", "use one of 1, 2"],
    ),
    (
        f"{TP4} & model.moe_intermediate_size=126",
        "model.tensor_model_parallel_size",
        ["model.n_shared_experts 1 x moe_intermediate_size 126=126", "use one of 1, 2"],
    ),
    (
        "trainer.devices=6 & model.tensor_model_parallel_size=2 & model.global_batch_size=12",
        "model.tensor_model_parallel_size",
        [
            "leaves [2048, 256] of embed.weight [4096, 256] to a rank",
            "the 3 parts for data-parallel ranks",
            "use 1, or another model.data_parallel_replicate_size",
        ],
    ),
    (
        "trainer.devices=12 & model.expert_model_parallel_size=4 & model.global_batch_size=48",
        "model.expert_model_parallel_size",
        [
            "leaves [4, 128, 256] of ffn.experts.w1 [16, 128, 256] to a rank",
            "the 12 x 1 / 4 = 3 ranks that share these experts",
            "use 1, or another",
        ],
    ),
    # pipeline
    (
        "model.pipeline_schedule=1f1b",
        "model.pipeline_schedule",
        ["must be GPipe, 1F1B, Interleaved1F1B,", "or DualPipeV", "use 1F1B"],
    ),
    ("model.pipeline_schedule=dualpipe", "model.pipeline_schedule", ["use DualPipeV"]),
    (
        "model.pipeline_schedule=GPipe",
        "model.pipeline_schedule",
        ["would be ignored, since model.pipeline_model_parallel_size=1", "use 1F1B (the default)"],
    ),
    (
        "model.virtual_pipeline_model_parallel_size=2",
        "model.virtual_pipeline_model_parallel_size",
        ["would be ignored", "use 1 (the default), or model.pipeline_model_parallel_size=2"],
    ),
    (
        "model.pipeline_layers_per_stage=[4]",
        "model.pipeline_layers_per_stage",
        ["=[4]: would be ignored", "use null (the default)"],
    ),
    (
        f"{PP2} & model.pipeline_schedule=Interleaved1F1B",
        "model.virtual_pipeline_model_parallel_size",
        ["=1: leaves nothing to interleave", "needs at least 2 stages a rank", "use 2, or"],
    ),
    (
        f"{PP2} & model.pipeline_schedule=ZBVZeroBubble "
        "& model.virtual_pipeline_model_parallel_size=2",
        "model.virtual_pipeline_model_parallel_size",
        ["would be ignored", "ZBVZeroBubble always has 2 stages a rank", "use 1 (the default)"],
    ),
    (
        f"{PP2} & model.virtual_pipeline_model_parallel_size=3",
        "model.virtual_pipeline_model_parallel_size",
        ["model.pipeline_schedule=1F1B always has 1 stage a rank", "Interleaved1F1B"],
    ),
    (
        f"{PP2} & model.pipeline_schedule=DualPipeV & model.num_hidden_layers=3",
        "model.pipeline_model_parallel_size",
        ["x 2 stages a rank = 4 stages is more than model.num_hidden_layers=3", "use 1, or"],
    ),
    (
        f"{PP2} & model.pipeline_schedule=ZBVZeroBubble & model.torch_compile=true",
        "model.torch_compile",
        ["gradients of inputs and weights apart", "use null or false, or"],
    ),
    (
        "model.activations_checkpoint_granularity=selective & model.torch_compile=true",
        "model.torch_compile",
        ["decides by itself what is cheap", "use model.activations_checkpoint_granularity=null"],
    ),
    (
        "trainer.devices=2 & model.tensor_model_parallel_size=2 & model.fp8_recipe=blockwise",
        "model.fp8_recipe",
        ["a scale for each 128", "would cut between: ", "no multiple of 256", "use null, or"],
    ),
    (
        "trainer.accelerator=cpu & model.cpu_offloading_activations=true",
        "model.cpu_offloading_activations",
        ["no effect on what trainer.accelerator=cpu computes in the host's", "use false, or"],
    ),
    (
        "model.fp8_kernels=true",
        "model.fp8_kernels",
        ["would be ignored, since model.fp8_recipe=null", "model.fp8_recipe=blockwise"],
    ),
    (
        "trainer.accelerator=cpu & model.fp8_recipe=blockwise & model.fp8_kernels=true",
        "model.fp8_kernels",
        ["would be ignored, since trainer.accelerator=cpu has no", "use false"],
    ),
    (
        "model.fp8_recipe=blockwise & model.fp8_kernels=true & model.data.seq_length=36 & "
        "model.hidden_size=72 & model.q_lora_rank=24 & model.kv_lora_rank=24 & "
        "model.num_attention_heads=1 & model.intermediate_size=72 & model.moe_intermediate_size=40",
        "model.fp8_kernels",
        ["would multiply nothing", "of 144 tokens", "smallest matrix is", "use false, which"],
    ),
    (
        "trainer.accelerator=cpu & model.optim.cpu_offload=true",
        "model.optim.cpu_offload",
        ["would be ignored, since trainer.accelerator=cpu computes in the host's", "use false"],
    ),
    (
        "model.cpu_offloading_activations=true & trainer.accelerator=gpu & "
        "model.activations_checkpoint_granularity=selective",
        "model.cpu_offloading_activations",
        ["granularity=selective keeps results itself", "use false, or another model.activations_"],
    ),
    (
        "model.torch_compile=true & model.cpu_offloading_activations=true",
        "model.cpu_offloading_activations",
        ["no effect on what model.torch_compile=true keeps", "use false, or"],
    ),
    (
        "model.activations_checkpoint_num_layers=1",
        "model.activations_checkpoint_num_layers",
        ["would be ignored, since", "granularity=null keeps all", "use null (the default), or"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[2, 2] & "
        "model.activations_checkpoint_granularity=full & model.activations_checkpoint_num_layers=2",
        "model.activations_checkpoint_num_layers",
        ["no pipeline stage has more than 2 blocks", "use null, or at most 1"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[2, 1, 1]",
        "model.pipeline_layers_per_stage",
        ["has 3 entries, for pipeline 2;", "use 2 numbers", "add up to 4, such as [2, 2], or null"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[]",
        "model.pipeline_layers_per_stage",
        ["=[]: has no entries, for pipeline 2; use 2 numbers", "such as [2, 2], or null"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[] & "
        "model.activations_checkpoint_granularity=full & model.activations_checkpoint_num_layers=2",
        "model.pipeline_layers_per_stage",
        ["=[]: has no entries, for pipeline 2;"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[3]",
        "model.pipeline_layers_per_stage",
        ["=[3]: has 1 entry, for pipeline 2 and has 3 of model.num_hidden_layers=4; use 2"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[2, 3]",
        "model.pipeline_layers_per_stage",
        ["=[2, 3]: has 2 + 3 = 5 of model.num_hidden_layers=4", "such as [2, 2]"],
    ),
    (
        f"{PP2} & model.pipeline_layers_per_stage=[0, 4]",
        "model.pipeline_layers_per_stage",
        ["leaves a stage without a layer, as only one with the output may be;", "(the last: 0)"],
    ),
    (
        f"{PP2} & model.pipeline_output_stages=2 & model.pipeline_layers_per_stage=[2, 2] & "
        "model.num_nextn_predict_layers=1",
        "model.pipeline_layers_per_stage",
        [
            "=[2, 2]: has a layer after the main loss, which is in stage 0 with "
            "model.pipeline_output_stages=2;",
            "use 2 numbers of at least 1 (the last 2: 0) that add up to 4, such as [4, 0], or null",
        ],
    ),
    (
        f"{PP2} & model.pipeline_output_stages=3 & model.num_nextn_predict_layers=2",
        "model.pipeline_output_stages",
        ["=3: is more than can share the output", "and 2 stages: 2;", "use at most 2"],
    ),
    (
        "model.pipeline_output_stages=2",
        "model.pipeline_output_stages",
        ["would be ignored", "use 1 (the default), or model.pipeline_model_parallel_size=2"],
    ),
    (
        f"{PP2} & model.pipeline_schedule=ZBVZeroBubble & model.pipeline_layers_per_stage=[3, 2]",
        "model.pipeline_layers_per_stage",
        ["has 2 entries, for pipeline 2 x 2 stages a rank = 4 stages and has 3 + 2 = 5 of"],
    ),
    ("model.pipeline_layers_per_stage=3", "model.pipeline_layers_per_stage", ["or null; write it"]),
    (
        "model.pipeline_layers_per_stage=[2, 1.5]",
        "model.pipeline_layers_per_stage",
        ["must be a list of whole numbers or null", "write it as [2, 1]"],
    ),
    ("model.pipeline_layers_per_stage=[2, true]", "model.pipeline_layers_per_stage", ["whole"]),
    ("model.pipeline_layers_per_stage=[2, '1']", "model.pipeline_layers_per_stage", ["whole"]),
    (
        f"{PP4} & model.micro_batch_size=4",
        "model.global_batch_size",
        [
            "/ (model.micro_batch_size 4 x data-parallel size 1) = 2 micro-batches a step",
            "model.pipeline_schedule=1F1B over 4 ranks needs at least 4",
            "use model.global_batch_size=16, or for model.micro_batch_size one of 1, 2, or",
            "model.pipeline_schedule=GPipe, which takes any number",
        ],
    ),
    (
        f"{PP2} & model.micro_batch_size=4 & model.pipeline_schedule=DualPipeV",
        "model.global_batch_size",
        ["needs at least 4, one for each of its 2 x 2 stages", "ZBVZeroBubble, which takes any"],
    ),
    (
        f"{PP2} & {INTERLEAVED} & model.micro_batch_size=1 & model.global_batch_size=7",
        "model.global_batch_size",
        ["= 7 micro-batches", "a multiple of its rounds = 7 // 2 = 3", "batch_size=6 or 8"],
    ),
    # processes that are lost
    ("trainer.max_restarts=-1", "trainer.max_restarts", ["at least 0", "(default 3)"]),
    (
        "trainer.collective_timeout_minutes=0",
        "trainer.collective_timeout_minutes",
        ["must be above 0", "use more than 0 (default 30.0)"],
    ),
    (
        "trainer.collective_timeout_minutes=1e7",
        "trainer.collective_timeout_minutes",
        ["at most 1000000"],
    ),
    # data, files, folders
    (
        "model.vocab_size=200",
        "model.vocab_size",
        ["less than the 262 ids of the smallest tokenizer", "use 262 or more, or give a smaller"],
    ),
    (
        "model.tokenizer.vocab_size=5000",
        "model.tokenizer.vocab_size",
        ["model.vocab_size=4096 has no rows for", "model.vocab_size=5000"],
    ),
    (
        "model.tokenizer.path=/nowhere/tokenizer.json",
        "model.tokenizer.path",
        ["there is no file /nowhere/tokenizer.json"],
    ),
    ("model.tokenizer.path=.", "model.tokenizer.path", ["holds no tokenizer.json"]),
    (
        "model.data.data_prefix=/nowhere/corpus",
        "model.data.data_prefix",
        ["no file /nowhere/corpus.bin and no file /nowhere/corpus.idx", "deepseek prepare-data"],
    ),
    ("model.data.data_prefix=a.bin", "model.data.data_prefix", ["without .bin", "use a"]),
    ("model.data.data_prefix=[0.5, a, b]", "model.data.data_prefix", ["got 3 entries"]),
    ("model.data.data_prefix=[]", "model.data.data_prefix", ["got 0 entries"]),
    ("model.data.data_prefix=[a, b]", "model.data.data_prefix", ["write [0.5, a, 0.5, b]"]),
    ("model.data.data_prefix=[1, 2]", "model.data.data_prefix", ["the prefix 2 must be text"]),
    ("model.data.data_prefix=7", "model.data.data_prefix", ["must be a prefix, a blend or null"]),
    ("model.data.validation_prefix=b.idx", "model.data.validation_prefix", ["without .idx"]),
    (
        "model.data.validation_fraction=0",
        "trainer.val_check_interval",
        ["nothing to validate on", "use trainer.val_check_interval=0"],
    ),
    ("model.data.cache_dir=~/cache", "model.data.cache_dir", ["~ is not expanded"]),
    ('exp_manager.exp_dir=""', "exp_manager.exp_dir", ["must name a folder", "use runs"]),
    ("exp_manager.name=a/b", "exp_manager.name", ["no path separators", "use a_b"]),
    ("exp_manager.version=../x", "exp_manager.version", ["no path separators", "use .._x"]),
    ("name=..", "name", ["becomes one folder"]),
    (
        "exp_manager.checkpoint_callback_params.save_top_k=0",
        "exp_manager.checkpoint_callback_params.save_top_k",
        ["would keep no checkpoint", "-1 for all"],
    ),
    (
        "exp_manager.checkpoint_callback_params.save_top_k=-2",
        "exp_manager.checkpoint_callback_params.save_top_k",
        ["must be at least -1"],
    ),
    (
        "exp_manager.create_checkpoint_callback=false "
        "& exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end",
        ["would be ignored"],
    ),
]

# Overrides that are none: no field, the override is named.
BROKEN_OVERRIDES = [
    ("trainer.max_steps", ["an override is written section.key=value", "trainer.max_steps=VALUE"]),
    ("--trainer.max_steps 5", ["an override is written section.key=value"]),
    ("~trainer.max_steps", ["a key cannot be removed"]),
    ("trainer.max_steps=", ["has no value", "trainer.max_steps=null"]),
    ("trainer max=3", ["is not a key"]),
    ("=3", ["is not a key"]),
    ("trainer.max_steps=[1", ["is not valid YAML", "expected ',' or ']'"]),
    ("trainer.max_steps=!!int 3", ["the tag !!int is not read"]),
    ("model.optim={lr: 1, lr: 2}", ["the key lr stands twice"]),
]


# What the messages below quote, so that tuning the shipped file changes no test.
BASE = [
    "model.global_batch_size=8",
    "model.optim.lr=1e-3",
    "model.optim.sched.min_lr=1e-4",
    "model.optim.sched.warmup_steps=40",
]


def problems_of(overrides: list[str]) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config("deepseek_v3_tiny", [*BASE, *overrides])
    return caught.value.problems


def test_one_mistake_gives_one_message() -> None:
    for overrides, field, phrases in ONE_PROBLEM:
        problems = problems_of(overrides.split(" & "))
        assert [problem.field for problem in problems] == [field], overrides
        for phrase in phrases:
            assert phrase in str(problems[0]), overrides


def test_an_override_that_is_none() -> None:
    for override, phrases in BROKEN_OVERRIDES:
        (problem,) = problems_of([override])
        for phrase in (f"override `{override}`", *phrases):
            assert phrase in str(problem), override


def test_all_problems_are_raised_at_once() -> None:
    """Keys, types, ranges, names, arithmetic, files and broken overrides, in one error."""
    chosen = [
        "model.hiden_size=4",
        "model.torch_compile=yes",
        "model.initializer_range=0",
        "model.scoring_func=sigmod",
        "model.qk_rope_head_dim=15",
        "model.n_group=3",
        "model.micro_batch_size=3",
        "model.optim.sched.min_lr=0.1",
        "model.data.data_prefix=/nowhere/corpus",
        "model.data.cache_dir=${oc.env:HOME}",
        "exp_manager.name=a/b",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config("deepseek_v3_tiny", [*chosen, "nonsense"])
    assert {problem.field for problem in caught.value.problems} == {
        *(override.partition("=")[0] for override in chosen),
        "",
    }
    text = str(caught.value)
    assert text.startswith("configuration deepseek_v3_tiny has 12 problems:\n  ")
    for problem in caught.value.problems:
        assert f"  {problem}" in text.splitlines()


def test_a_blend_names_every_bad_entry() -> None:
    problems = problems_of(["model.data.data_prefix=[-1, /nowhere/a, 0.5, /nowhere/b]"])
    assert [str(problem.rule) for problem in problems] == [
        "the weight -1 must be a number above 0",
        "there is no file /nowhere/a.bin and no file /nowhere/a.idx",
        "there is no file /nowhere/b.bin and no file /nowhere/b.idx",
    ]


def test_a_circle_of_references_is_named_on_both_sides() -> None:
    problems = problems_of(["name=${exp_manager.name}", "exp_manager.name=${name}"])
    assert [problem.field for problem in problems] == ["name", "exp_manager.name"]
    assert all("refers to itself in a circle" in problem.rule for problem in problems)


def test_a_wrong_value_brings_no_messages_about_what_depends_on_it() -> None:
    """The batch does not fit 0 devices, and nothing divides by a number that is text."""
    assert [p.field for p in problems_of(["trainer.devices=0"])] == ["trainer.devices"]
    assert [p.field for p in problems_of(["model.n_group=many"])] == ["model.n_group"]
    assert [p.field for p in problems_of(["trainer=5", "model.micro_batch_size=3"])] == ["trainer"]


def test_values_are_shown_as_yaml_and_not_at_length() -> None:
    (problem,) = problems_of([f"model.optim.lr={'x' * 500}"])
    assert len(str(problem)) < 200
    (problem,) = problems_of(["model.tie_word_embeddings=true"])
    assert str(problem).startswith("model.tie_word_embeddings=true: ")


def test_the_table_is_as_large_as_promised() -> None:
    assert len(ONE_PROBLEM) + len(BROKEN_OVERRIDES) >= 60
