"""Pure tensor functions, each fast path beside its slow, readable reference implementation."""
