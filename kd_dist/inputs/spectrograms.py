"""stub"""
from dataclasses import dataclass
class LogMel: pass
@dataclass(frozen=True)
class Spectrograms:
    kind = "spectrogram"
    channels = 1
