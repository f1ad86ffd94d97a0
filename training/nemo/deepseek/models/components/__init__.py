"""Building blocks of the model: single-device modules."""
