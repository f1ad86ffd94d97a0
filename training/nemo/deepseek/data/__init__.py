"""Text in, training batches out.

corpus -> tokenizer -> prepare, or chat -> indexed (``.bin/.idx``) -> dataset -> blend -> loader;
``open_data`` does it all from a configuration. Ranks are plain ints here. Nothing is imported by
this file: the worker processes of ``prepare`` start faster without torch.
"""
