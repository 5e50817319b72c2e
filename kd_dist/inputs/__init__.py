"""Inputs. One file a kind: raw data -> members of an example, checked, and members -> (H, W, channels) uint8."""
