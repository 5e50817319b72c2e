"""kd_dist: offline knowledge distillation. The teacher runs once; students train from shards."""

__version__ = "0.1.0"
