"""Text in, training batches out.

corpus -> tokenizer -> prepare -> indexed (``.bin/.idx``) -> dataset -> blend -> sampler; ``opened``
does it all from a configuration. Ranks are plain ints here. Nothing is imported by this file:
``prepare``'s worker processes start faster without torch.
"""
