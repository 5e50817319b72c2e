"""`accelerate launch` for our own commands: `python -m kd_dist.launch [--config_file FILE ...] SCRIPT ...`.

Three things differ. SIGTERM and SIGUSR1 are handed on to the processes, for which it waits as long as they need. When
it is killed none of them outlives it. And it is silent about a process that ends with an error, which has said it; of
one that a signal has ended it says so in a sentence.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from typing import NoReturn

from kd_dist.errors import INTERRUPTED, KdError, check_mark, mark_stopped
from kd_dist.preempt import SIGNALS

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
TIED = "--tied-to"
PATIENCE = 10  # seconds for the processes to end after Ctrl-C, which they have had too


def tied(command: list[str]) -> list[str]:
    """What to start instead of `command` so that it is killed when this process ends, even by SIGKILL."""
    return [sys.executable, "-m", "kd_dist.launch", TIED, str(os.getpid()), *command]


def tie(parent: int) -> None:
    """Have the kernel kill this process as soon as `parent`, which started it, has ended."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
        os._exit(1)  # it had ended before


def become(parent: int, command: list[str]) -> NoReturn:
    """Replace this process by `command`, which the kernel kills as soon as `parent`, which started it, has ended."""
    tie(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.execvp(command[0], command)


def hand_on() -> NoReturn:
    """Hand each of SIGNALS that comes on to every process of the launcher, once.

    This is a thread, since the launcher itself may hang in a rendezvous; it must have the signals blocked. What comes
    before there is any process ends the launcher, with exit status 0: nothing was begun.
    """
    import psutil

    number, told = signal.sigwait(SIGNALS), set()
    launcher = psutil.Process()
    if not launcher.children():
        try:
            mark_stopped()
        except SystemExit as error:  # it would end this thread alone
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    while True:
        for child in set(launcher.children()) - told:  # a process may be started after it came
            told.add(child)
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        more = signal.sigtimedwait(SIGNALS, 0.1)
        if more is not None and more.si_signo != number:
            number, told = more.si_signo, set()


def ready(arguments: Namespace) -> Namespace:
    """The launcher's arguments, changed so that what it starts is tied to it."""
    python = [] if arguments.no_python else [sys.executable, "-u", *(["-m"] if arguments.module else [])]
    first, *rest = tied([*python, arguments.training_script, *arguments.training_script_args])
    changed = {"training_script": first, "training_script_args": rest, "no_python": True, "module": False}
    return Namespace(**{**vars(arguments), **changed, "quiet": False})


def on_cpu(arguments: Namespace) -> bool:
    """Whether the processes are to find each other on the CPU: unless told, each would take itself for the only one.

    DeepSpeed must not be told so, for Accelerate would leave it out.
    """
    import torch
    from accelerate import DistributedType
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = arguments.config_file or default_config_file
    config = load_config_from_file(path) if os.path.isfile(path) else None
    if arguments.use_deepspeed or (config and config.distributed_type == DistributedType.DEEPSPEED):
        return False
    return bool(config and config.use_cpu) or not torch.cuda.is_available()


def launch() -> None:
    """Start the processes that `sys.argv` asks for and wait for them."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args()
    if on_cpu(arguments):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    launch_command(ready(arguments))


def killed(what: str, number: int) -> str:
    """What is said of a process that a signal has ended, which cannot say it itself."""
    name = {one.value: one.name for one in signal.Signals}.get(number, f"signal {number}")
    go_on = "the same command goes on from the last checkpoint or finished shards"
    if number != signal.SIGKILL:
        return f"error: {what} was ended by {name}; {go_on}"
    return (
        f"error: {what} was ended by {name}, most often for lack of memory; raise the stage's `accumulate`, lower "
        f"data.workers, start fewer processes or run it where there is more: {go_on}"
    )


def main() -> None:
    """Run the launcher on `sys.argv`. Exit status: 0 when no process failed, else 1; one that had not yet begun to note
    SIGNALS, and that one of them ended, did not fail."""
    if sys.argv[1:2] == [TIED]:
        become(int(sys.argv[2]), sys.argv[3:])
    try:
        check_mark()
    except KdError as error:
        sys.exit(f"error: {error}")
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=hand_on, daemon=True).start()
    import psutil
    import yaml
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the launcher's own account of a failed process
    try:
        launch()
        return
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except subprocess.CalledProcessError as error:
        ended = {0: error.returncode}
    except (KeyboardInterrupt, SignalException):
        psutil.wait_procs(psutil.Process().children(), timeout=PATIENCE)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        sys.exit(f"error: accelerate launch: {' '.join(str(error).split())}")
    failed = {rank: status for rank, status in ended.items() if -status not in SIGNALS}
    if not failed:
        mark_stopped()
        return
    for rank, status in sorted(failed.items()):
        if status < 0:
            print(killed(f"rank {rank}", -status), file=sys.stderr, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
