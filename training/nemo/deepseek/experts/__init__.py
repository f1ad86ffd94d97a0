"""Wing: what the experts of a trained model do (``deepseek experts``)."""
