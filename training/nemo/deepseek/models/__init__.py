"""The model: single-device code, ignorant of ranks; parallelism is applied from outside."""
