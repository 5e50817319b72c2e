"""A program: an encoded recording on standard input -> its samples on standard output.

It is a process of its own, so that a recording on which libsndfile dies, or asks for all the memory there is, costs
that recording alone. Arguments: the first and the last second wanted (`inf`: to the end). Answers are lines of JSON:
`{"rate": Hz, "channels": n}`, then for each block `{"bytes": n}` and behind it that many bytes of interleaved float32,
at last `{"end": seconds}`, how far it was decoded, or at any point `{"error": reason}`.
"""

import io
import json
import math
import resource
import sys
from typing import Any, BinaryIO

LONGEST = 3600  # s from the start; no more is decoded
MOST = 2 * 48_000 * LONGEST  # samples of all channels together, so that no rate fills the memory
BLOCK = 2**18  # samples of all channels that are read at a time
CHANNELS = 64
RATES = (1_000, 384_000)  # Hz
UNREAD = 0.25  # share of a file that may lie behind its sound: tags, pictures
MISSING = 0.05  # share of its length that an mp3 may be short of: without a header, it is a guess from the bit rate
UNKNOWN = 2**63 - 1  # frames of a flac that was written before its length was known
STREAMED = 0x7FFFF000  # bytes of a wav's sound, or more: likewise
CPU_SECONDS = 600  # an hour of mp3 takes one or two
MEMORY = 2**32  # bytes of address space, beside four times the recording's own


def decode(payload: bytes, first: float, last: float, out: BinaryIO) -> None:
    """Answer with the samples from one second to another. What comes before is decoded too: seeking in an mp3 loses
    what the next frames need."""
    import soundfile

    class Forward(soundfile.SoundFile):
        """One that, unlike its base, does not seek behind every block that it has read."""

        def seekable(self) -> bool:
            return False

    stream = io.BytesIO(payload)
    with Forward(stream) as sound:
        rate, channels = sound.samplerate, sound.channels
        if not RATES[0] <= rate <= RATES[1] or channels > CHANNELS:
            return answer(out, error=f"it claims {channels} channels at {rate} Hz")
        answer(out, rate=rate, channels=channels)
        most = min(LONGEST * rate, MOST // channels)  # frames
        start, stop, position = round(first * rate), last if math.isinf(last) else round(last * rate), 0
        while position < stop:
            block = sound.read(min(BLOCK // channels, stop - position), "float32", always_2d=True)
            if not len(block):
                break
            wanted = block[max(start - position, 0) :]
            position += len(block)
            if position > most:
                return answer(out, error=f"no more than {most / rate:.0f} s are decoded, and it is longer; cut it")
            answer(out, bytes=wanted.nbytes)
            out.write(wanted.tobytes())
        # Of an mp3 whose bit rate varies and which does not say so, libsndfile guesses the length and stops there.
        if position < stop and stream.tell() < (1 - UNREAD) * len(payload):
            return answer(out, error=f"only {stream.tell():,} of its {len(payload):,} bytes are read; encode it again")
        promised = 0 if sound.frames == UNKNOWN else sound.frames * cut_by(payload)
        if position < min(stop, (1 - MISSING) * promised):
            said = promised / rate
            return answer(out, error=f"it ends at {position / rate:.2f} s and says that it has {said:.2f} s")
        answer(out, end=position / rate)


def cut_by(payload: bytes) -> float:
    """How many times longer a wav says that its sound is than what there is of it, of which libsndfile says nothing; 1
    for any other file, and for one that was written before its length was known."""
    if payload[:4] != b"RIFF" or payload[8:12] != b"WAVE":
        return 1.0
    at = 12
    while at + 8 < len(payload):
        size = int.from_bytes(payload[at + 4 : at + 8], "little")
        if payload[at : at + 4] == b"data":
            return 1.0 if size >= STREAMED else max(1.0, size / (len(payload) - at - 8))
        at += 8 + size + size % 2
    return 1.0


def answer(out: BinaryIO, **message: Any) -> None:
    """Write one line of JSON."""
    out.write(json.dumps(message).encode() + b"\n")


def main() -> None:
    """Decode standard input under limits of time and memory."""
    import soundfile

    payload, out = sys.stdin.buffer.read(), sys.stdout.buffer
    room = MEMORY + 4 * len(payload)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        decode(payload, float(sys.argv[1]), float(sys.argv[2]), out)
    except soundfile.LibsndfileError as error:  # its own words hold an address, others in every run's manifest
        answer(out, error=error.error_string.rstrip("."))
    except MemoryError:
        answer(out, error="it asks for too much memory")
    out.flush()


if __name__ == "__main__":
    main()
