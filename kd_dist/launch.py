"""`accelerate launch` for our own commands, silent about processes that end with an error: they have said it."""

import logging
import sys

from kd_dist.errors import INTERRUPTED


def main() -> None:
    """Run the launcher on `sys.argv`; exit with 1 when a process of several fails."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the launcher's own account of a failed process
    try:
        launch()
    except ChildFailedError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
