"""Train DeepSeek-V3-class models from one YAML file, on a laptop or a cluster."""

__version__ = "0.1.0"
