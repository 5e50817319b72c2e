"""Whether a package keeps what its recipe promises."""
