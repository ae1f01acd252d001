"""dpkd: distributed prior-knowledge distillation."""

__version__ = "0.1.0"
