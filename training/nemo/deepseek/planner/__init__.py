"""How long a step takes and what it needs, on GPUs that need not be there: arithmetic alone.

hardware            what a GPU can do
architecture        the sizes of a model that time depends on
job                 one training step, whoever's program takes it
flops               FLOPs of a token, by the convention a figure names
layer_time          seconds of one block on one GPU
pipeline_timeline   when which rank works on what
step_time           seconds of a step, and where they go
published           predictions of published runs
"""
