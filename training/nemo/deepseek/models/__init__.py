"""The model: single-device code, ignorant of ranks; parallelism is applied from outside.

Shapes. Local tensors end in their dims (``x_TD``), parameters never do; here and in ``ops/``,
``parallel/`` and ``training/`` the letters mean:

B batch, S sequence, T = B*S tokens, D model, V vocabulary, L layers;
N heads, H dims of a head's query or key (of the part that the name says: nope, rope or both),
U dims of a head's value, C latent, A angles (rotated pairs), M tokens in the cache;
E experts, K experts chosen per token, G groups of experts, F hidden dims of an expert;
R = T*K rows, one per (token, choice), Q rows received from other ranks, P rows with padding;
I input dims, O output dims of a matrix; n ranks of a group.

A small letter is a part of what its capital names: e of the experts, s of the sequence,
v of the vocabulary, t of the tokens. 1 is a dim of one, 2 of two.
"""
